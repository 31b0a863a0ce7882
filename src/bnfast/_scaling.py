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


def largest_values(x: Array, axis: int, which: Array) -> Array:
    """Return the largest magnitude of each of some channels, without a copy of any."""
    channels = np.moveaxis(x, axis, 0)
    pairs = ((channels[c].max(initial=0), channels[c].min(initial=0)) for c in which)
    return np.array([max(most, -least) for most, least in pairs], x.dtype)


def scaled_channels(x: Array, axis: int, which: Array, exponent: Array) -> ScaledChannels:
    """Return some channels, each times its power of two: exactly, unless it becomes denormal."""
    copies = np.moveaxis(x, axis, 0)[which]
    with np.errstate(all="ignore"):
        return ScaledChannels(which, scaled(copies, exponent), exponent)


def scaled(x: Array, exponent: Array) -> Array:
    """Return x with each index of its first axis times its power of two."""
    powers = np.expand_dims(exponent, tuple(range(1, x.ndim)))
    return np.asarray(np.ldexp(x, powers))
