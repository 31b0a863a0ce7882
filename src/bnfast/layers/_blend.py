"""The statistics of a batch blended into running ones, and the gradient through that blend."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bnfast import _dtypes, _primitives, _validation
from bnfast._typing import Array

# How many values are widened to float64 at a time.
_AT_A_TIME = 1 << 14


class Blend(NamedTuple):
    """(1 - share) * old + share * batch, of mean and variance; (C,) of float64 each."""

    mean: Array
    variance: Array
    share: Array  # 1 of a first batch, of which nothing old is left
    mean_of_batch: Array
    mean_step: Array  # from the old mean to that of the batch
    variance_step: Array
    values: int  # of a channel
    divisor: int  # of the variance of the batch

    def invstd(self, eps: float) -> Array:
        """Return 1 / sqrt(variance + eps)."""
        with np.errstate(all="ignore"):
            return np.asarray(1.0 / np.sqrt(self.variance + eps))

    def write_gradient(
        self,
        dx: Array,
        dy: Array,
        scale: Array,
        x: Array,
        axis: int,
        eps: float,
        sums_of_g: tuple[Array, Array],
    ) -> Array:
        """Write to dx what reaches x, beside the statistics and through them, rounded once.

        Return the gradient of each logit. What goes beside them is scale * dy = s * g, with
        g = weight * dy; the sums are those of g, and of g times what x was normalized to.
        """
        s, (sum_g, sum_g_xhat) = self.invstd(eps), sums_of_g
        dmean, dvariance = -s * sum_g, -0.5 * s * s * sum_g_xhat
        _write_line(
            *(dx, dy, scale, x, axis, self.mean_of_batch),
            slope=self.share * dvariance * (2.0 / self.divisor),
            offset=self.share * dmean / self.values,
        )
        slope = self.share * (1.0 - self.share)
        through = dmean * self.mean_step + dvariance * self.variance_step
        # What a first batch is blended with has no weight, even if it is NaN or infinite.
        return np.where(slope == 0.0, 0.0, slope * through)


def _write_line(
    dx: Array,
    dy: Array,
    scale: Array,
    x: Array,
    axis: int,
    mean: Array,
    *,
    slope: Array,
    offset: Array,
) -> None:
    """Write scale * dy + slope * (x - mean) + offset to dx, which may be dy.

    In float64, rounded to the type of the arithmetic, and that to the type of dx.
    """
    shape = [1] * x.ndim
    shape[axis] = -1
    of_channels = (array.reshape(shape) for array in (scale, slope, mean, offset))
    parts = np.nditer(
        (dx, dy, x, *of_channels),
        ("external_loop", "buffered"),
        (("writeonly",), *(("readonly",),) * 6),
        (_dtypes.computed_in(dx.dtype), *(np.float64,) * 6),
        casting="same_kind",
        buffersize=_AT_A_TIME,
    )
    with parts:
        for some_dx, some_dy, some_x, scales, slopes, means, offsets in parts:
            some_dx[...] = scales * some_dy + (slopes * (some_x - means) + offsets)


def blend(
    x: Array, axis: int, old_mean: Array, old_variance: Array, share: Array, unbiased: bool
) -> Blend:
    """Return the running statistics as they are with a batch, which is not empty.

    `share` is what the batch weighs in each channel.
    """
    count, mean, m2 = _primitives.moments(x, axis)
    _validation.enough_values("x", x, count, "channel", unbiased=unbiased)
    divisor = count - 1 if unbiased else count
    variance = m2 / divisor

    def blended(old: Array, new: Array) -> Array:
        return np.where(share == 1.0, new, (1.0 - share) * old + share * new)

    before = old_mean.astype(np.float64), old_variance.astype(np.float64)
    return Blend(
        *(blended(before[0], mean), blended(before[1], variance), share, mean),
        *(mean - before[0], variance - before[1], count, divisor),
    )


def share_of_batch(logit: Array, channels: int) -> Array:
    """Return what a batch weighs in each channel, 1 / (1 + exp(-logit))."""
    wide = np.broadcast_to(logit.astype(np.float64), (channels,))
    with np.errstate(over="ignore"):  # of a share that is 0
        return np.asarray(1.0 / (1.0 + np.exp(-wide)))
