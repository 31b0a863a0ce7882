"""How far off a result may be: the promises of README.md, applied to what the oracle says."""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import numpy as np

from tolerances import (
    FLOAT64_OF_ANY_DATA,
    GRADIENT_SUMS_OF_ANY_DATA,
    INPUT_GRADIENT_OF_ANY_DATA,
    OUTPUT_OF_ANY_DATA,
    RUNNING,
    STATISTICS_OF_ANY_DATA,
    eps_of,
)

SINGLE, DOUBLE = np.dtype(np.float32), np.dtype(np.float64)

# Of 16 bits: computed in float32, and rounded once.
HALVES = (np.dtype(np.float16),)
if importlib.util.find_spec("ml_dtypes"):
    import ml_dtypes

    HALVES += (np.dtype(ml_dtypes.bfloat16),)


def arithmetic(dtype: np.dtype) -> np.dtype:
    """What data of a dtype are computed in."""
    return SINGLE if dtype in HALVES else dtype


def limits_of(dtype: np.dtype) -> Any:
    """NumPy has none of bfloat16."""
    return np.finfo(dtype) if dtype.kind == "f" else ml_dtypes.finfo(dtype)


# Of float32 data. Data with outliers have these promises; search_for_worst.py tells others apart.
PROMISED = {
    "output": OUTPUT_OF_ANY_DATA[1],
    "statistics": STATISTICS_OF_ANY_DATA[1],
    "dx": INPUT_GRADIENT_OF_ANY_DATA[1],
    "sums": GRADIENT_SUMS_OF_ANY_DATA[1],
}

# Of matrix products in float64, in an order that a BLAS chooses. The sizes have the conditions.
OF_MATRICES = 64

# Products and quotients that leave the range of normal numbers lose bits: so many of the smallest
# numbers, each multiplied by what follows.
SMALLEST = 8


class Quantity(NamedTuple):
    """A number that is to come out, and the sizes of the terms that it is made of.

    `sizes` has one for each promise that counts; where one is infinite, nothing is promised.
    `precision` is the dtype of the data, `dtype` that of the result.
    """

    value: np.ndarray
    sizes: dict[str, np.ndarray]
    precision: np.dtype
    dtype: np.dtype


def promised(kind: str, quantity: Quantity) -> float:
    """How large an error of this kind may be, relative to its size."""
    if kind == "running":
        return RUNNING * float(limits_of(quantity.dtype).eps)
    if kind == "matrices":
        return OF_MATRICES * eps_of(DOUBLE)
    if kind == "known":  # an error that may be there
        return 2.0
    precision = arithmetic(quantity.precision)
    if kind == "rounding":  # of a factor to the dtype of the arithmetic, before it is multiplied
        return eps_of(precision)
    if kind == "smallest":
        return SMALLEST * float(np.finfo(precision).smallest_subnormal)
    in_single = PROMISED[kind]
    if precision == SINGLE:
        return in_single
    return FLOAT64_OF_ANY_DATA * in_single * eps_of(DOUBLE) / eps_of(SINGLE)


def allowed(quantity: Quantity) -> np.ndarray:
    """The largest error of each value: what is promised, and a rounding to the dtype."""
    limits = limits_of(quantity.dtype)
    rounding = np.abs(quantity.value) * (float(limits.eps) / 2)
    total = rounding + float(limits.smallest_subnormal)
    for kind, size in quantity.sizes.items():
        total = total + size * promised(kind, quantity)
    # What is beyond the range, or may be, is infinite, or nearly.
    beyond = ~(np.abs(quantity.value) + total < float(limits.max) / 8)
    return np.where(beyond, np.inf, np.where(np.isnan(total), np.inf, total))


def complaint(name: str, found: object, quantity: Quantity) -> str | None:
    """What is wrong with a result, or None."""
    if not isinstance(found, (np.ndarray, np.floating, float)):
        return f"{name} is a {type(found).__name__}, not an array"
    array = np.asarray(found)
    if array.dtype != quantity.dtype or array.shape != quantity.value.shape:
        return (
            f"{name} is {array.dtype} of shape {array.shape}, "
            f"not {quantity.dtype} of shape {quantity.value.shape}"
        )
    with np.errstate(all="ignore"):
        error = np.abs(array.astype(np.longdouble) - quantity.value)
        limit = allowed(quantity)
        wrong = ~(error <= limit) & ~np.isinf(limit)
        ratio = np.where(wrong, np.where(np.isnan(error), np.inf, error / limit), 0)
    if not wrong.any():
        return None
    place = np.unravel_index(np.argmax(ratio), ratio.shape)
    index = tuple(int(i) for i in place)
    return (
        f"{name}{list(index)} is {array[place]!r}, not {quantity.value[place]!r}: "
        f"{error[place]:.3g} off, {np.broadcast_to(limit, error.shape)[place]:.3g} allowed "
        f"({int(wrong.sum())} of {wrong.size} are wrong)"
    )


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have the same bits, but for what a NaN says besides."""
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and bool(((a == b) & (np.signbit(a) == np.signbit(b)) | (a != a) & (b != b)).all())
    )
