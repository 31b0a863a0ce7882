"""The types in which data may be stored, and those in which it is computed.

Kernels compute in float32 and float64. Data of another type is converted while it is read and
written, chunk by chunk: a new type is a row here, a line of ``kernel_list.h``, and its two
conversions in ``conversions.inc``.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import numpy as np


class StorageType(NamedTuple):
    """A dtype of arrays, what its elements are computed in, and its name.

    ``kernel_list.h`` has the name of what is converted: not of what is computed as it is stored.
    """

    dtype: np.dtype[Any]
    arithmetic: np.dtype[Any]
    name: str


_F32, _F64 = np.dtype(np.float32), np.dtype(np.float64)

STORAGE_TYPES = (
    StorageType(np.dtype(np.float16), _F32, "f16"),
    StorageType(_F32, _F32, "f32"),
    StorageType(_F64, _F64, "f64"),
)

# NumPy has no bfloat16: ml_dtypes adds it when it is imported, with a number of that moment. Its
# arrays bring it along, and nothing here imports it.
BFLOAT16 = "bf16"


def _integer_type(code: str) -> StorageType:
    dtype = np.dtype(code)
    kind = "i" if dtype.kind == "i" else "u"
    return StorageType(dtype, _F32 if dtype.itemsize == 1 else _F64, f"{kind}{8 * dtype.itemsize}")


# Types that `moments` and `summary` read, and nothing writes. NumPy has one for each integer type
# of C, several of which have the same size.
INTEGER_TYPES = tuple(_integer_type(code) for code in "?bBhHiIlLqQ")

# Their sums are exact: with more bits, squares are not.
MOST_EXACT_BYTES = 2

# Of the arithmetic.
NAMES = "float32 or float64"

# Of data and parameters.
NAMES_OF_DATA = "float16, bfloat16, float32 or float64"


def is_floating(dtype: np.dtype[Any]) -> bool:
    """Return whether arithmetic is done in this dtype as it is: native float32 or float64."""
    return dtype.char in "fd" and dtype.isnative


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Return whether this is ml_dtypes's bfloat16, which has one byte order."""
    return dtype.type.__name__ == "bfloat16" and dtype.type.__module__ == "ml_dtypes"


def is_half(dtype: np.dtype[Any]) -> bool:
    """Return whether this is a float type of 16 bits, in native byte order."""
    return (dtype.char == "e" or is_bfloat16(dtype)) and dtype.isnative


def computed_in(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype in which floats of this dtype are computed: float32 for 16 bits."""
    return _F32 if is_half(dtype) else dtype


def named(name: str) -> np.dtype[Any]:
    """Return the dtype of this name; for bfloat16, ml_dtypes must be installed."""
    return np.dtype(importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)
