"""Channels at the ends of the range of their dtype: copies of them, times powers of two.

That changes no bit of what they are normalized to, and keeps squares and quotients in the range.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bnfast._typing import Array

# Lengths up to this power of two, and down to its reciprocal, need no care: squares and quotients
# of them and of ordinary gradients stay within the range of the dtype.
MODEST_EXPONENT = {np.dtype(np.float32): 40, np.dtype(np.float64): 400}


class ScaledChannels(NamedTuple):
    """Copies of some channels, along the first axis, each times ``2 ** exponent``."""

    which: Array
    copies: Array
    exponent: Array


def exponents_to_one(sizes: ArrayLike) -> Array:
    """Return the powers of two that bring sizes to between 0.5 and 1; 0 for what has none."""
    sizes = np.asarray(sizes)
    _, powers = np.frexp(np.where(np.isfinite(sizes), sizes, 0.0))
    return np.asarray(-powers)


def _largest_values(x: Array, axis: int, which: Array) -> Array:
    """Return the largest magnitude of each of some channels, without a copy of any."""
    channels = np.moveaxis(x, axis, 0)
    pairs = ((channels[c].max(initial=0), channels[c].min(initial=0)) for c in which)
    return np.array([max(largest, -smallest) for largest, smallest in pairs], x.dtype)


def channels_not_between(
    x: Array, axis: int, sizes: Array, lower: float, upper: float, modest: int = -1
) -> ScaledChannels | None:
    """Return the channels whose size is NaN or not between two limits, with largest values near 1.

    Those whose largest value needs a power of two of at most `modest` are left out. None if none is
    left.
    """
    which = np.flatnonzero(~((sizes > lower) & (sizes < upper)))
    exponent = exponents_to_one(_largest_values(x, axis, which))
    is_far = np.abs(exponent) > modest
    return _scaled_channels(x, axis, which[is_far], exponent[is_far])


def channels_far_from_one(
    x: Array, axis: int, sizes: Array, furthest: int
) -> ScaledChannels | None:
    """Return the channels whose size needs a power of two beyond this to be near 1, or None."""
    exponent = exponents_to_one(sizes)
    which = np.flatnonzero(np.abs(exponent) > furthest)
    return _scaled_channels(x, axis, which, exponent[which])


def _scaled_channels(x: Array, axis: int, which: Array, exponent: Array) -> ScaledChannels | None:
    """Return some channels, each times its power of two: exactly, unless it becomes denormal."""
    if not which.size:
        return None
    return ScaledChannels(which, scaled(np.moveaxis(x, axis, 0)[which], exponent), exponent)


def scaled(x: Array, exponent: Array) -> Array:
    """Return x with each index of its first axis times its power of two."""
    powers = np.expand_dims(exponent, tuple(range(1, x.ndim)))
    with np.errstate(all="ignore"):
        return np.asarray(np.ldexp(x, powers))
