"""Deviations of channels from their means, for a scale of one's own, at any size of values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from bnfast import _primitives, _validation
from bnfast._scaling import exponents_to_one, largest_values, scaled_channels
from bnfast._typing import Array


class Deviations(NamedTuple):
    """How the values of channels deviate from their mean, in float64: for a scale of one's own."""

    values: int
    mean: Array
    mean_low: Array | None  # of float64 data, which would lose |mean| / std ulps without it
    variance: Array
    std: Array
    extreme: Array | None  # those channels whose variance may have left the range

    def with_eps(self, eps: float) -> Array:
        """Return sqrt(variance + eps)."""
        with np.errstate(all="ignore"):
            root = np.sqrt(self.variance + eps)
            if self.extreme is not None:
                std = self.std[self.extreme]
                exponent = exponents_to_one(np.maximum(std, math.sqrt(eps)))
                scaled = np.ldexp(std, exponent) ** 2 + np.ldexp(eps, 2 * exponent)
                root[self.extreme] = np.ldexp(np.sqrt(scaled), -exponent)
        return np.asarray(root)


# Of float64. An m2 beyond these may be made of squares that have left the range, or lost bits in
# it; not where the largest value is within this power of two: there it is 0, of equal values.
_SMALLEST_M2, _LARGEST_M2, _MODEST_EXPONENT = 2.0**-900, 2.0**1000, 400


def deviations(x: object, axis: object, lost: int = 0) -> Deviations:
    """Return the mean and the deviation of each channel, whatever the size of its values.

    `lost` of the values do not count in the deviation.
    """
    array, axis, channels = _validation.batch("x", x, axis)
    if array.dtype != np.float64:  # in which others have their sums
        return _deviations(*_primitives.moments(array, axis), None, lost)
    low = np.zeros(channels)
    count, mean, m2 = _primitives.moments(array, axis, low)
    of = _deviations(count, mean, m2, low, lost)
    if not m2.size or (m2.min() > _SMALLEST_M2 and m2.max() < _LARGEST_M2):
        return of
    which = np.flatnonzero(~((m2 > _SMALLEST_M2) & (m2 < _LARGEST_M2)))
    exponent = exponents_to_one(largest_values(array, axis, which))
    some = np.abs(exponent) > _MODEST_EXPONENT
    if not some.any():
        return of
    which, copies, exponent = scaled_channels(array, axis, which[some], exponent[some])
    again = deviations(copies, 0, lost)
    pairs = (mean, again.mean), (low, again.mean_low), (of.std, again.std)
    with np.errstate(all="ignore"):
        for statistic, of_copies in pairs:
            statistic[which] = np.ldexp(np.asarray(of_copies), -exponent)
    return of._replace(extreme=which)


def _deviations(
    count: int, mean: Array, m2: Array, mean_low: Array | None, lost: int
) -> Deviations:
    with np.errstate(all="ignore"):
        variance = m2 / np.float64(count - lost)
    return Deviations(count, mean, mean_low, variance, np.sqrt(variance), None)


def scale_deviations(
    x: object,
    axis: object,
    of: Deviations,
    scale: Array,
    shift: Array | None = None,
    out: object = None,
    reads: Mapping[str, object] | None = None,
) -> Array:
    """Return (x - mean) * scale + shift, with a scale (float64) for each channel.

    `reads` are more arguments that `out` must share no memory with.
    """
    if of.mean_low is not None:
        with np.errstate(all="ignore"):
            shift = (0.0 if shift is None else shift) - of.mean_low * scale
    unit = np.ones(len(scale))
    return _primitives.scale_shift(x, axis, of.mean, unit, scale, shift, 0.0, None, out, reads)
