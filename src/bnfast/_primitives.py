"""The primitives on arrays: moments, scale_shift, gradient, and normalize: the first two in one.

Each validates, plans, chooses the number of threads and calls the core, in this order; nothing is
written before everything has been checked. The only room that hands arrays to ``_core``.

A common call, small and on plain arrays of a shape that has been planned, is checked and done by
the core at once; whatever else comes gets None there, and goes this way.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from bnfast import _core, _threads, _validation
from bnfast._layout import plan_layout
from bnfast._threads import threads_for
from bnfast._validation import Array

Evaluation = _core.Evaluation  # what a layer keeps from one `scale_shift` to the next


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
    aligned = tuple([operand.flags.aligned for operand in operands])
    geometry = _geometry(
        first.shape,
        axis,
        first.itemsize,
        tuple([operand.strides for operand in operands]),
        aligned,
    )
    if all(aligned) and all(operand.flags.c_contiguous for operand in operands):
        _core.remember(first, axis, len(operands), geometry)
    return geometry


def _writable(statistic: Array) -> Array:
    """Return the statistic as the core needs it: contiguous and aligned, or a copy to put back."""
    flags = statistic.flags
    return statistic if flags.c_contiguous and flags.aligned else statistic.copy()


def _put_back(updated: Array | None, statistic: Array) -> None:
    if updated is not None and updated is not statistic:
        statistic[...] = updated


def probe_memory(kind: str, x: Array, y: Array, num_threads: int) -> None:
    """Move memory and compute nothing, for the benchmark: see ``_core.probe_memory``."""
    _core.probe_memory(kind, x, y, min(num_threads, _threads.get_num_threads()))


def moments(x: object, axis: object) -> tuple[int, Array, Array]:
    """Return the count, and the mean and m2 of each channel (float64)."""
    array, axis, channels = _validation.batch("x", x, axis)
    mean, m2 = np.zeros(channels), np.zeros(channels)
    if array.size == 0:
        return 0, mean, m2
    _core.moments(_geometry_of(axis, array), array, mean, m2, threads_for(array.nbytes))
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
    done = _core.normalize_at_once(
        *(x, axis, weight, bias, eps, running_mean, running_var, momentum, unbiased, out),
        _threads.SERIAL_BYTES,
    )
    if done is not None:
        return done
    array, axis, channels = _validation.batch("x", x, axis)
    epsilon = _validation.epsilon(eps, training=True)
    new_weight = _validation.real("momentum", momentum)
    scale = _validation.channel_parameter("weight", weight, channels)
    shift = _validation.channel_parameter("bias", bias, channels)
    tracked = _validation.running_statistics(running_mean, running_var, array, channels)
    if out is None:
        y = _core.empty_output(array)
    else:
        statistics = tracked or (None, None)
        others = {"x": array, "weight": scale, "bias": shift}
        others |= {"running_mean": statistics[0], "running_var": statistics[1]}
        y = _validation.output(out, array, others)
    if array.ndim > 1:
        _validation.more_than_one_value("x", array, axis)
    if array.size == 0:
        return y, np.zeros(channels), np.full(channels, epsilon**-0.5)

    mean, invstd = np.empty(channels), np.empty(channels)
    written_mean = written_var = None
    if tracked is not None:
        written_mean, written_var = _writable(tracked[0]), _writable(tracked[1])
    _core.normalize(
        _geometry_of(axis, array, y),
        array,
        y,
        scale,
        shift,
        epsilon,
        mean,
        invstd,
        written_mean,
        written_var,
        new_weight,
        1.0 if unbiased else 0.0,
        threads_for(3 * array.nbytes),
    )
    if tracked is not None:
        _put_back(written_mean, tracked[0])
        _put_back(written_var, tracked[1])
    return y, mean, invstd


def scale_shift(
    x: object,
    axis: object,
    mean: object,
    variance: object,
    weight: object,
    bias: object,
    eps: object,
    kept: Evaluation | None = None,
    out: object = None,
) -> Array:
    """Return y from given statistics, called running_mean and running_var in messages.

    What statistics and parameters are turned into is `kept` for the next call, if there is such an
    object, and used again where they are the same then; an empty x needs none.
    """
    done = _core.scale_shift_at_once(
        x, axis, mean, variance, weight, bias, eps, kept, out, _threads.SERIAL_BYTES
    )
    if done is not None:
        return done
    array, axis, channels = _validation.batch("x", x, axis)
    epsilon = _validation.epsilon(eps, training=False)
    centre = _validation.required_channel_parameter("running_mean", mean, channels)
    spread = _validation.required_channel_parameter("running_var", variance, channels)
    scale = _validation.channel_parameter("weight", weight, channels)
    shift = _validation.channel_parameter("bias", bias, channels)
    if out is None:
        y = _core.empty_output(array)
    else:
        others = {"x": array, "weight": scale, "bias": shift}
        others |= {"running_mean": centre, "running_var": spread}
        y = _validation.output(out, array, others)
    if array.size > 0:
        _core.scale_shift(
            _geometry_of(axis, array, y),
            array,
            y,
            scale,
            shift,
            epsilon,
            centre,
            spread,
            kept,
            threads_for(2 * array.nbytes),
        )
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
    """Return dx, dweight and dbias, the latter of the dtype of `weight`, or of x without one."""
    done = _core.gradient_at_once(
        dy, x, axis, mean, invstd, weight, constant_statistics, out, _threads.SERIAL_BYTES
    )
    if done is not None:
        return done
    array, axis, channels = _validation.batch("x", x, axis)
    upstream = _validation.upstream_gradient(dy, array)
    centre = _validation.required_channel_parameter("mean", mean, channels)
    inverse_std = _validation.required_channel_parameter("invstd", invstd, channels)
    scale = _validation.channel_parameter("weight", weight, channels)
    if out is None:
        dx = _core.empty_output(array)
    else:
        others = {"dy": upstream, "x": array, "weight": scale}
        others |= {"mean": centre, "invstd": inverse_std}
        dx = _validation.output(out, array, others)
    dtype = array.dtype if scale is None else scale.dtype
    dweight, dbias = np.zeros(channels, dtype), np.zeros(channels, dtype)
    if array.size > 0:
        _core.gradient(
            _geometry_of(axis, array, upstream, dx),
            array,
            upstream,
            dx,
            scale,
            centre,
            inverse_std,
            dweight,
            dbias,
            constant_statistics,
            threads_for(5 * array.nbytes),
        )
    return dx, dweight, dbias
