"""Arguments that are not arrays: numbers, sizes, flags and words, returned as such or refused.

Callers find these checks in `_validation`, beside those of arrays.
"""

from __future__ import annotations

import math
import operator
import reprlib
import sys
from numbers import Real
from typing import Any

import numpy as np

from bnfast import _dtypes

# What an array can have, of float64.
MOST_AXES = 64 if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else 32
_MOST_ELEMENTS = sys.maxsize // 8


def describe(value: object) -> str:
    """Return what came instead, for a message."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} array of shape {value.shape}"
    return f"{reprlib.repr(value)} of type {type(value).__name__}"


def instance(name: str, value: object, wanted: type) -> None:
    """Refuse what is not of a class of ours."""
    if not isinstance(value, wanted):
        raise TypeError(f"{name} must be an instance of {wanted.__name__}, got {describe(value)}")


def flag(name: str, value: object) -> bool:
    """Return True or False; nothing else is either."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")
    return bool(value)


def text(name: str, value: object) -> str:
    """Return a string."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {describe(value)}")
    return value


def choice(name: str, value: object, choices: tuple[str, ...], *, or_none: bool = False) -> str:
    """Return one of some words; in the message, None will do as well where it is asked first."""
    if not isinstance(value, str) or value not in choices:
        words = " or ".join([*map(repr, choices), *["None"] * or_none])
        raise ValueError(f"{name} must be {words}, got {reprlib.repr(value)}")
    return value


def integer(name: str, value: object) -> int:
    """Return an integer; booleans are none."""
    if type(value) is int:
        return value
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {describe(value)}") from None


def integer_from(name: str, value: object, least: int) -> int:
    """Return an integer that is at least `least`."""
    number = integer(name, value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def integers(name: str, value: object) -> tuple[int, ...]:
    """Return one integer or several as a tuple."""
    if isinstance(value, (list, tuple)):
        return tuple(integer(name, item) for item in value)
    return (integer(name, value),)


def integers_from(name: str, value: object, least: int) -> tuple[int, ...]:
    """Return one integer or several, each at least `least`, as a tuple."""
    return tuple(integer_from(name, number, least) for number in integers(name, value))


def size(name: str, value: object, least: int = 0) -> int:
    """Return a number of channels, or of what else an array has a place for each of."""
    number = integer_from(name, value, least)
    if number > _MOST_ELEMENTS:
        raise ValueError(f"{name} must be at most {_MOST_ELEMENTS}, got {number}")
    return number


def sizes(name: str, value: object) -> tuple[int, ...]:
    """Return one size or several as a tuple."""
    shape = integers(name, value)
    if not shape:
        raise ValueError(f"{name} must have at least one size, got none")
    if min(shape) < 0:
        raise ValueError(f"{name} must have no negative size, got {value}")
    if len(shape) > MOST_AXES or math.prod(shape) > _MOST_ELEMENTS:
        raise ValueError(
            f"{name} must be that of an array, of at most {MOST_AXES} axes and {_MOST_ELEMENTS} "
            f"elements, got {reprlib.repr(value)}"
        )
    return shape


def _as_float(name: str, value: object) -> float:
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if not isinstance(value, Real) or isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be a real number, got {describe(value)}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def real(name: str, value: object) -> float:
    """Return a finite number."""
    number = value if type(value) is float else _as_float(name, value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def positive(name: str, value: object) -> float:
    """Return a finite number above 0."""
    number = real(name, value)
    if number <= 0.0:
        raise ValueError(f"{name} must be positive, got {number}")
    return number


def share(name: str, value: object) -> float:
    """Return a number from 0 to 1."""
    number = real(name, value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} must be from 0 to 1, got {number}")
    return number


def estimate(name: str, value: object) -> float:
    """Return a number that a forward pass returned: of NaN it may be NaN."""
    return _as_float(name, value)


def epsilon(value: object, *, training: bool) -> float:
    """Return eps: positive where batch statistics are used, else not negative."""
    eps = real("eps", value)
    if training and eps <= 0.0:
        raise ValueError(f"eps must be positive in training, got {eps}")
    if eps < 0.0:
        raise ValueError(f"eps must not be negative, got {eps}")
    return eps


def factor_limit(name: str, value: object) -> float:
    """Return by what a batch may be multiplied or divided at most."""
    most = real(name, value)
    if most < 1.0:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return most


def renorm_limits(r_max: object, d_max: object) -> tuple[float, float]:
    """Return how far batch renormalization may correct a batch."""
    most, furthest = real("r_max", r_max), real("d_max", d_max)
    if most < 1.0 or furthest < 0.0:
        raise ValueError(f"r_max must be at least 1 and d_max at least 0, got {r_max} and {d_max}")
    return most, furthest


def floating_dtype(name: str, value: Any) -> np.dtype[Any]:
    """Return float32 or float64 as a dtype."""
    try:
        dtype: np.dtype[Any] = np.dtype(value)
    except TypeError:
        raise TypeError(f"{name} must be {_dtypes.NAMES}, got {describe(value)}") from None
    if not _dtypes.is_floating(dtype):
        raise TypeError(f"{name} must be {_dtypes.NAMES} in native byte order, got {dtype}")
    return dtype
