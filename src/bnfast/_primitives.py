"""The primitives on arrays: moments, scale_shift, gradient, and normalize: the first two in one.

Each validates, plans, chooses the number of threads and calls the core, in this order; nothing is
written before everything has been checked. The only room that calls ``_core``.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from bnfast import _core, _validation
from bnfast._layout import plan_layout
from bnfast._threads import threads_for
from bnfast._validation import Array


@lru_cache(maxsize=1024)
def _geometry(
    shape: tuple[int, ...],
    axis: int,
    itemsize: int,
    strides: tuple[tuple[int, ...], ...],
    aligned: tuple[bool, ...],
) -> _core.Geometry:
    return _core.Geometry(plan_layout(shape, axis, itemsize, strides, aligned))


def _geometry_of(axis: int, *operands: Array) -> _core.Geometry:
    first = operands[0]
    return _geometry(
        first.shape,
        axis,
        first.itemsize,
        tuple([operand.strides for operand in operands]),
        tuple([operand.flags.aligned for operand in operands]),
    )


def _writable(statistic: Array) -> Array:
    """Return the statistic as the core needs it: contiguous and aligned, or a copy to put back."""
    flags = statistic.flags
    return statistic if flags.c_contiguous and flags.aligned else statistic.copy()


def moments(x: object, axis: object) -> tuple[int, Array, Array]:
    """Return the count, and the mean and m2 of each channel (float64)."""
    array, axis, channels = _validation.batch("x", x, axis)
    mean, m2 = np.zeros(channels), np.zeros(channels)
    if array.size == 0:
        return 0, mean, m2
    geometry = _geometry_of(axis, array)
    _core.moments(geometry, array, mean, m2, threads_for(array.nbytes))
    return array.size // channels, mean, m2


def normalize(
    x: object,
    axis: object,
    weight: object,
    bias: object,
    eps: object,
    running_mean: object = None,
    running_var: object = None,
    momentum: object = 0.0,
    unbiased: bool = True,
    out: object = None,
) -> tuple[Array, Array, Array]:
    """Return y, and the mean and invstd (float64) of the batch that made it.

    The running statistics, both given or neither, are updated with `momentum` as the weight of the
    batch.
    """
    array, axis, channels = _validation.batch("x", x, axis)
    epsilon = _validation.epsilon(eps, training=True)
    new_weight = _validation.real("momentum", momentum)
    scale = _validation.channel_parameter("weight", weight, channels)
    shift = _validation.channel_parameter("bias", bias, channels)
    others = {"x": array, "weight": scale, "bias": shift}
    tracked = _validation.running_statistics(running_mean, running_var, array, channels)
    if tracked is not None:
        others |= {"running_mean": tracked[0], "running_var": tracked[1]}
    y = _validation.output(out, "x", array, others)
    if array.size == 0:
        return y, np.zeros(channels), np.full(channels, epsilon**-0.5)
    _validation.more_than_one_value("x", array, channels)

    mean, invstd = np.empty(channels), np.empty(channels)
    geometry = _geometry_of(axis, array, y)
    threads = threads_for(array.nbytes + y.nbytes)
    written = None if tracked is None else (_writable(tracked[0]), _writable(tracked[1]))
    running = (None, None) if written is None else written
    correction = 1.0 if unbiased else 0.0
    _core.normalize(
        *(geometry, array, y, scale, shift, epsilon, mean, invstd),
        *(running[0], running[1], new_weight, correction, threads),
    )
    if tracked is not None and written is not None:
        for statistic, updated in zip(tracked, written, strict=True):
            if updated is not statistic:
                statistic[...] = updated
    return y, mean, invstd


def scale_shift(
    x: object,
    axis: object,
    mean: object,
    variance: object,
    weight: object,
    bias: object,
    eps: object,
    out: object = None,
) -> Array:
    """Return y from given statistics, called running_mean and running_var in messages."""
    array, axis, channels = _validation.batch("x", x, axis)
    epsilon = _validation.epsilon(eps, training=False)
    centre = _validation.required_channel_parameter("running_mean", mean, channels)
    spread = _validation.required_channel_parameter("running_var", variance, channels)
    scale = _validation.channel_parameter("weight", weight, channels)
    shift = _validation.channel_parameter("bias", bias, channels)
    others = {
        **{"x": array, "weight": scale, "bias": shift},
        **{"running_mean": centre, "running_var": spread},
    }
    y = _validation.output(out, "x", array, others)
    if array.size > 0:
        geometry = _geometry_of(axis, array, y)
        threads = threads_for(array.nbytes + y.nbytes)
        _core.scale_shift(geometry, array, y, scale, shift, epsilon, centre, spread, threads)
    return y


def gradient(
    dy: object,
    x: object,
    axis: object,
    mean: object,
    invstd: object,
    weight: object,
    constant_statistics: bool,
    out: object = None,
) -> tuple[Array, Array, Array]:
    """Return dx, sum(dy * (x - mean)) * invstd and sum(dy), the sums in float64."""
    array, axis, channels = _validation.batch("x", x, axis)
    upstream = _validation.same_shape("dy", dy, "x", array)
    centre = _validation.required_channel_parameter("mean", mean, channels)
    inverse_std = _validation.required_channel_parameter("invstd", invstd, channels)
    scale = _validation.channel_parameter("weight", weight, channels)
    others = {
        **{"dy": upstream, "x": array, "weight": scale},
        **{"mean": centre, "invstd": inverse_std},
    }
    dx = _validation.output(out, "x", array, others)
    sum_dy, sum_dy_deviation = np.zeros(channels), np.zeros(channels)
    if array.size > 0:
        geometry = _geometry_of(axis, array, upstream, dx)
        threads = threads_for(array.nbytes + upstream.nbytes + dx.nbytes)
        _core.gradient(
            *(geometry, array, upstream, dx, scale, centre, inverse_std),
            *(sum_dy, sum_dy_deviation, constant_statistics, threads),
        )
    return dx, sum_dy_deviation * inverse_std, sum_dy
