"""Shapes, numbers and flags that are awkward for a reason, drawn from a generator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fuzz.judge import DOUBLE, HALVES, SINGLE, limits_of

DTYPES = (SINGLE, DOUBLE)

# Around 1, lanes (8, 16, 64), short planes, and what a line has.
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 49, 63, 64, 65, 97, 127, 128, 129)

# Around what is summed together, chunks and blocks.
LONG = (255, 256, 257, 511, 512, 513, 639, 641, 1023, 1025, 2047, 2049, 4095, 4096, 4097, 8200)

# The most values of an array, and how often: most calls are small, and so many more.
BUDGETS = (60, 60, 60, 300, 300, 300, 2500, 2500, 12000)

RARELY, OFTEN = 0.05, 0.5


def chance(rng: np.random.Generator, share: float) -> bool:
    return bool(rng.random() < share)


def pick(rng: np.random.Generator, these: Sequence[Any]) -> Any:
    return these[int(rng.integers(len(these)))]


def dtype(rng: np.random.Generator) -> np.dtype:
    return pick(rng, DTYPES)


def data_dtype(rng: np.random.Generator) -> np.dtype:
    """Of what is normalized, unless it must have more than 16 bits."""
    return pick(rng, HALVES) if chance(rng, 0.3) else dtype(rng)


def parameter_dtype(rng: np.random.Generator) -> np.dtype:
    return pick(rng, HALVES) if chance(rng, 0.15) else dtype(rng)


def shape(
    rng: np.random.Generator, least: int = 2, most: int = 6, multiple: tuple[int, int] = (0, 1)
) -> tuple[int, ...]:
    """Sizes of some axes; that of `multiple[0]` is a multiple of `multiple[1]`."""
    ndim = int(rng.integers(least, most + 1))
    budget = pick(rng, BUDGETS)
    sizes = [1] * ndim
    axis, of = multiple[0] % ndim, multiple[1]
    sizes[axis] = of
    for d in rng.permutation(ndim):
        left = budget // math.prod(sizes)
        choices = [n for n in (*SIZES, *(LONG if chance(rng, 0.2) else ())) if n <= left]
        if choices:
            sizes[d] *= pick(rng, choices)
    if chance(rng, RARELY):
        sizes[int(rng.integers(ndim))] = 0
    return tuple(sizes)


def axis(rng: np.random.Generator, ndim: int, first: int = 0) -> int:
    """Often 1 or the last one; from both ends."""
    d = pick(rng, (1, 1, ndim - 1, int(rng.integers(first, ndim))))
    return d - ndim if chance(rng, 0.4) else d


def eps(rng: np.random.Generator) -> float:
    return pick(rng, (1e-5, 1e-5, 1e-3, 1e-8, 1.0, 1e-12, 1e-300, 100.0))


def momentum(rng: np.random.Generator) -> float:
    return pick(rng, (0.1, 0.1, 0.0, 1.0, 0.5, 0.99, -0.25, 1.5))


# Values


def _within(rng: np.random.Generator, found: np.ndarray, half: np.dtype) -> np.ndarray:
    """Values of 16 bits: where they leave the range, most are brought back to somewhere in it."""
    limits, largest = limits_of(half), float(np.abs(found).max(initial=0))
    low, high = float(limits.smallest_subnormal), float(limits.max)
    with np.errstate(all="ignore"):
        if largest > 0 and not low < largest < high and chance(rng, 0.8):
            wanted = 2.0 ** rng.uniform(math.log2(low), math.log2(high))
            found = found * (wanted / largest)
        return found.astype(half)


def values(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An input: normal, or what breaks sums."""
    if dtype in HALVES:
        return _within(rng, values(rng, shape, SINGLE), dtype)
    kind = pick(rng, tuple(KINDS))
    with np.errstate(all="ignore"):
        return np.ascontiguousarray(KINDS[kind](rng, shape, dtype), dtype)


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return rng.normal(rng.normal(), rng.uniform(0.5, 2), shape)


def _constant(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.full(shape, pick(rng, (0.0, 1.0, -3.3, 1e6, 1e-30, rng.normal())))


def _few(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Two or three values."""
    return rng.choice(rng.normal(size=int(rng.integers(2, 4))), shape)


def _large_mean(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Means of up to so many standard deviations that there is a promise, or few bits beyond."""
    most = 7.5 if dtype == np.float32 else 10.5
    return rng.normal(size=shape) + 10 ** rng.uniform(1, most) * pick(rng, (-1, 1))


def _scaled(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    exponent = 45 if dtype == np.float32 else 380
    return rng.normal(size=shape) * 2.0 ** rng.uniform(-exponent, exponent)


def _extreme(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """At an end of the range."""
    limits = np.finfo(dtype)
    size = pick(rng, (float(limits.max) / 64, float(limits.tiny) * 64, float(limits.tiny) / 64))
    return rng.normal(size=shape) * size


def _denormal(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return rng.integers(-50, 50, shape) * float(np.finfo(dtype).smallest_subnormal)


def _outliers(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return rng.standard_t(1.5, shape)


def _sorted(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.sort(rng.normal(size=math.prod(shape))).reshape(shape)


def _by_index(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Another scale and mean at each index of one axis."""
    d = int(rng.integers(len(shape)))
    each = [shape[d] if k == d else 1 for k in range(len(shape))]
    scale = 10.0 ** rng.uniform(-4, 4, each)
    return rng.normal(size=shape) * scale + rng.normal(size=each) * scale * 100


KINDS = {
    "normal": _normal,
    "normal, too": _normal,
    "constant": _constant,
    "few": _few,
    "large mean": _large_mean,
    "scaled": _scaled,
    "extreme": _extreme,
    "denormal": _denormal,
    "outliers": _outliers,
    "sorted": _sorted,
    "by index": _by_index,
}


def mild_values(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Where a formula has a condition: no extremes."""
    kind = pick(rng, (_normal, _normal, _few, _outliers, _constant))
    return np.ascontiguousarray(kind(rng, shape, dtype), dtype)


def parameter(
    rng: np.random.Generator, shape: tuple[int, ...], share: float = 0.7
) -> np.ndarray | None:
    """A weight or a bias of any dtype, or None."""
    if not chance(rng, share):
        return None
    scale = pick(rng, (1, 1, 1, 0, 1e-3, 1e3, 1e-9))
    return np.ascontiguousarray(rng.normal(size=shape) * scale, parameter_dtype(rng))


def running(
    rng: np.random.Generator, shape: tuple[int, ...], positive: bool = False, *, full: bool = False
) -> np.ndarray:
    """A running statistic of any dtype; a `full` one has no 16 bits."""
    found = rng.normal(size=shape)
    kind = dtype(rng) if full else parameter_dtype(rng)
    return np.ascontiguousarray(np.abs(found) + 0.01 if positive else found, kind)


def saved(rng: np.random.Generator, exact: np.ndarray) -> np.ndarray:
    """What a forward pass returned, sometimes rounded by its user."""
    rounded = np.asarray(exact, np.float64)
    with np.errstate(all="ignore"):
        return rounded.astype(np.float32) if chance(rng, 0.1) else rounded
