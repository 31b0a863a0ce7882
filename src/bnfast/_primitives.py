"""The primitives on arrays: moments, scale_shift, gradient, and normalize: the first two in one.

Each validates, plans, chooses the number of threads and calls the core, in this order; nothing is
written before everything has been checked. The only room that hands arrays to ``_core``.

A common call, on plain arrays of a shape that has been planned, is checked and done by the core at
once; whatever else comes gets None there, and goes this way.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from bnfast import _core, _threads, _validation
from bnfast._layout import plan_layout, plan_rows
from bnfast._scaling import exponents_to_one, largest_values, scaled_channels
from bnfast._threads import threads_for
from bnfast._validation import Array

Evaluation = _core.Evaluation  # what a layer keeps from one `scale_shift` to the next
empty_output = _core.empty_output  # a new array that begins at a cache line


class Sharing(NamedTuple):
    """Which elements have their statistics together: those of one channel, over all other axes."""

    repeated: tuple[int, ...] = ()  # ... but for these, each of whose indices has its own
    channels: int = 1  # ... and so many neighbouring channels
    uncentred: bool = False  # statistics around 0 rather than the mean
    any_eps: bool = True  # rather than positive ones

    def shape_of_statistics(self, x: Array, axis: int) -> tuple[int, ...]:
        """(..., C / channels), after the sizes of the repeated axes."""
        return (*[x.shape[d] for d in self.repeated], x.shape[axis] // self.channels)

    def values(self, x: Array, axis: int) -> int:
        """How many elements have their statistics together."""
        kept = {axis, *self.repeated}
        each: int = math.prod([size for d, size in enumerate(x.shape) if d not in kept])
        return each * self.channels


class Floors(NamedTuple):
    """What channels may have besides: checked arrays, one value for each, or None."""

    tau: Array | None = None  # no output goes below it
    more_eps: Array | None = None  # added to eps


BATCH = Sharing(any_eps=False)
APART = BATCH._replace(repeated=(0,))  # a batch for each index of the first axis


@lru_cache(maxsize=1024)
def _geometry(
    shape: tuple[int, ...],
    axis: int,
    repeated: tuple[int, ...],
    itemsize: int,
    strides: tuple[tuple[int, ...], ...],
    aligned: tuple[bool, ...],
) -> _core.Geometry:
    return _core.Geometry(plan_layout(shape, (axis,), repeated, itemsize, strides, aligned))


@lru_cache(maxsize=1024)
def _geometry_of_rows(
    shape: tuple[int, ...],
    normalized: tuple[int, ...],
    itemsize: int,
    strides: tuple[tuple[int, ...], ...],
    aligned: tuple[bool, ...],
    parameters: int,
) -> _core.Geometry:
    inputs = len(strides) - 1  # all but the output
    return _core.Geometry(
        plan_rows(shape, normalized, itemsize, strides, aligned, inputs, parameters)
    )


def _rows(normalized: tuple[int, ...], parameters: int, *operands: Array) -> _core.Geometry:
    first = operands[0]
    aligned = tuple([operand.flags.aligned for operand in operands])
    geometry = _geometry_of_rows(
        first.shape,
        normalized,
        first.itemsize,
        tuple([operand.strides for operand in operands]),
        aligned,
        parameters,
    )
    last = tuple(range(first.ndim - len(normalized), first.ndim))
    if normalized == last and all(aligned) and all(o.flags.c_contiguous for o in operands):
        _core.remember_rows(first, len(last), len(operands), parameters, geometry)
    return geometry


def _geometry_of(axis: int, repeated: tuple[int, ...], *operands: Array) -> _core.Geometry:
    first = operands[0]
    aligned = tuple([operand.flags.aligned for operand in operands])
    geometry = _geometry(
        first.shape,
        axis,
        repeated,
        first.itemsize,
        tuple([operand.strides for operand in operands]),
        aligned,
    )
    if not repeated and all(aligned) and all(operand.flags.c_contiguous for operand in operands):
        _core.remember(first, axis, len(operands), geometry)
    return geometry


def _writable(statistic: Array) -> Array:
    """Return the statistic as the core needs it: contiguous and aligned, or a copy to put back."""
    flags = statistic.flags
    return statistic if flags.c_contiguous and flags.aligned else statistic.copy()


def _put_back(updated: Array | None, statistic: Array) -> None:
    if updated is not None and updated is not statistic:
        statistic[...] = updated


def _warn_of(too_large: int) -> None:
    """Warn of running statistics that the core found too large for their dtype."""
    if too_large & _core.MEAN_TOO_LARGE:
        _validation.warn_too_large("running_mean")
    if too_large & _core.VAR_TOO_LARGE:
        _validation.warn_too_large("running_var")


def update_running(
    name: str, running: Array, momentum: float, divided: Array, divisor: float = 1.0
) -> None:
    """Blend divided / divisor, of float64, into a checked running statistic, as `normalize` does.

    A weight of 0 leaves nothing of what it weighs, also of NaN and infinity: with a `momentum` of 0
    the statistic stays as it is, with 1 it is that of the batch.
    """
    written = _writable(running)
    too_large = _core.update_running(written, np.ascontiguousarray(divided), momentum, divisor)
    _put_back(written, running)
    if too_large:
        _validation.warn_too_large(name)


def probe_memory(kind: str, x: Array, y: Array, num_threads: int) -> None:
    """Move memory and compute nothing, for the benchmark: see ``_core.probe_memory``."""
    _core.probe_memory(kind, x, y, min(num_threads, _threads.get_num_threads()))


def moments(x: object, axis: object, mean_low: Array | None = None) -> tuple[int, Array, Array]:
    """Return the count, and the mean and m2 of each channel (float64).

    `mean_low`, a float64 array of the shape of the mean, receives what rounding left of it.
    """
    array, axis, channels = _validation.batch("x", x, axis)
    mean, m2 = np.zeros(channels), np.zeros(channels)
    if array.size == 0:
        return 0, mean, m2
    geometry, threads = _geometry_of(axis, (), array), threads_for(array.nbytes)
    _core.moments(geometry, array, mean, m2, threads, mean_low)
    return array.size // channels, mean, m2


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
        return _deviations(*moments(array, axis), None, lost)
    low = np.zeros(channels)
    count, mean, m2 = moments(array, axis, low)
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
) -> Array:
    """Return (x - mean) * scale + shift, with a scale (float64) for each channel."""
    if of.mean_low is not None:
        with np.errstate(all="ignore"):
            shift = (0.0 if shift is None else shift) - of.mean_low * scale
    unit = np.ones(len(scale))
    return scale_shift(x, axis, of.mean, unit, scale, shift, 0.0, None, out)


def _invstd_of_nothing(eps: float) -> float:
    """Return 1 / sqrt(0 + eps)."""
    if eps > 0:
        return float(eps**-0.5)
    return np.inf if eps == 0 else np.nan


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
    sharing: Sharing = BATCH,
    m2: Array | None = None,
    floors: Floors | None = None,
) -> tuple[Array, Array, Array]:
    """Return y, and the mean and invstd (float64) that made it.

    The running statistics, both given or neither, are updated with `momentum` as the weight of the
    batch: of the average of its repeats, where it has some. `m2`, a float64 array of the shape of
    the mean, receives that of the batch.
    """
    if sharing is BATCH and m2 is None and floors is None:
        done = _core.normalize_at_once(
            x,
            axis,
            weight,
            bias,
            eps,
            running_mean,
            running_var,
            momentum,
            unbiased,
            out,
            _threads.SERIAL_BYTES,
            threads_for,
            _warn_of,
        )
        if done is not None:
            return done
    array, axis, channels = _validation.batch("x", x, axis)
    if sharing.any_eps:
        epsilon = _validation.real("eps", eps)
    else:
        epsilon = _validation.epsilon(eps, training=True)
    new_weight = _validation.real("momentum", momentum)
    scale = _validation.channel_parameter("weight", weight, channels)
    shift = _validation.channel_parameter("bias", bias, channels)
    tracked = _validation.running_statistics(running_mean, running_var, array, channels)
    tau, more_eps = floors or (None, None)
    if out is None:
        y = _core.empty_output(array)
    else:
        others = {"x": array, "weight": weight, "bias": bias}
        others |= {"running_mean": running_mean, "running_var": running_var}
        y = _validation.output(out, array, others)
    shape = sharing.shape_of_statistics(array, axis)
    if array.ndim > 1:
        values, tracks_unbiased = sharing.values(array, axis), tracked is not None and unbiased
        what = "channel of each sample" if sharing.repeated else "channel"
        _validation.enough_values("x", array, values, what, unbiased=tracks_unbiased)
    if array.size == 0:
        return y, np.zeros(shape), np.full(shape, _invstd_of_nothing(epsilon))

    each = shape if sharing.channels == 1 else (*shape, sharing.channels)
    mean, invstd = np.empty(each), np.empty(each)
    written_mean = written_var = None
    if tracked is not None:
        written_mean, written_var = _writable(tracked[0]), _writable(tracked[1])
    too_large = _core.normalize(
        _geometry_of(axis, sharing.repeated, array, y),
        array,
        y,
        scale,
        shift,
        epsilon,
        mean,
        invstd,
        m2,
        sharing.channels,
        sharing.uncentred,
        written_mean,
        written_var,
        new_weight,
        1.0 if unbiased else 0.0,
        threads_for(3 * array.nbytes),
        tau,
        more_eps,
    )
    if tracked is not None:
        _put_back(written_mean, tracked[0])
        _put_back(written_var, tracked[1])
        if too_large:
            _warn_of(too_large)
    if sharing.channels > 1:
        return y, mean[..., 0].copy(), invstd[..., 0].copy()
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
        x, axis, mean, variance, weight, bias, eps, kept, out, _threads.SERIAL_BYTES, threads_for
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
        others = {"x": array, "weight": weight, "bias": bias}
        others |= {"running_mean": mean, "running_var": variance}
        y = _validation.output(out, array, others)
    if array.size > 0:
        _core.scale_shift(
            _geometry_of(axis, (), array, y),
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
    sharing: Sharing = BATCH,
    bias: Array | None = None,
    tau: Array | None = None,
    sums: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Return dx, dweight and dbias, the latter of the dtype of `weight`, or of x without one.

    With the floors `tau`, and then the `bias`, of the forward pass, both checked, dy counts where y
    was not below them. `sums`, float64 (2, *shape of the mean), receives sum(dy) where y was, and
    sum(dy * (x - mean) * invstd) where it was not.
    """
    if sharing is BATCH:
        done = _core.gradient_at_once(
            dy,
            x,
            axis,
            mean,
            invstd,
            weight,
            constant_statistics,
            out,
            _threads.SERIAL_BYTES,
            threads_for,
        )
        if done is not None:
            return done
    array, axis, channels = _validation.batch("x", x, axis)
    upstream = _validation.upstream_gradient(dy, array)
    shape = sharing.shape_of_statistics(array, axis)
    centre = _validation.saved_statistic("mean", mean, shape)
    inverse_std = _validation.saved_statistic("invstd", invstd, shape)
    scale = _validation.channel_parameter("weight", weight, channels)
    if out is None:
        dx = _core.empty_output(array)
    else:
        others = {"dy": upstream, "x": array, "weight": weight}
        others |= {"mean": mean, "invstd": invstd}
        dx = _validation.output(out, array, others)
    dtype = array.dtype if scale is None else scale.dtype
    dweight, dbias = np.zeros(channels, dtype), np.zeros(channels, dtype)
    if array.size > 0:
        _core.gradient(
            _geometry_of(axis, sharing.repeated, array, upstream, dx),
            array,
            upstream,
            dx,
            scale,
            np.repeat(centre, sharing.channels) if sharing.channels > 1 else centre,
            np.repeat(inverse_std, sharing.channels) if sharing.channels > 1 else inverse_std,
            dweight,
            dbias,
            sharing.channels,
            sharing.uncentred,
            constant_statistics,
            threads_for(5 * array.nbytes),
            bias,
            tau,
            None if sums is None else sums[0],
            None if sums is None else sums[1],
        )
    return dx, dweight, dbias


@lru_cache(maxsize=1024)
def _sizes_of_rows(shape: tuple[int, ...], normalized: tuple[int, ...]) -> tuple[int, ...]:
    return tuple([size for d, size in enumerate(shape) if d not in normalized])


def normalize_rows(
    x_: object,
    normalized_shape: object,
    axis: object,
    weight: object,
    bias: object,
    eps: object,
    uncentred: bool,
    out: object = None,
) -> tuple[Array, Array, Array]:
    """Return y, and the mean and invstd (float64) of every row: over the last axes, or `axis`.

    `weight` and `bias` have their sizes. Around 0 rather than the mean where it is `uncentred`.
    """
    if axis is None:
        done = _core.normalize_rows_at_once(
            x_,
            normalized_shape,
            weight,
            bias,
            eps,
            uncentred,
            out,
            _threads.SERIAL_BYTES,
            threads_for,
        )
        if done is not None:
            return done
    x, normalized = _validation.normalized_axes(x_, normalized_shape, axis)
    epsilon = _validation.real("eps", eps)
    shape = tuple([x.shape[d] for d in normalized])
    # 0 times infinity would make NaN of what is equal to its mean.
    scale = _validation.element_parameter("weight", weight, shape, x.dtype, finite=True)
    shift = _validation.element_parameter("bias", bias, shape, x.dtype)
    if out is None:
        y = _core.empty_output(x)
    else:
        y = _validation.output(out, x, {"x": x, "weight": weight, "bias": bias})
    rows = _sizes_of_rows(x.shape, normalized)
    if x.size == 0:
        return y, np.zeros(rows), np.full(rows, _invstd_of_nothing(epsilon))
    mean, invstd = np.empty(rows), np.empty(rows)
    if scale is None and shift is None:
        geometry = _rows(normalized, 0, x, y)
    else:
        scale = np.ones(shape, x.dtype) if scale is None else scale
        if shift is None and not uncentred:
            shift = np.zeros(shape, x.dtype)
        geometry = _rows(normalized, 2, x, y)
    _core.normalize_rows(
        geometry,
        x,
        y,
        _as_walked(scale, geometry.walked),
        _as_walked(shift, geometry.walked),
        epsilon,
        mean,
        invstd,
        uncentred,
        threads_for(3 * x.nbytes),
    )
    return y, mean, invstd


def row_gradient(
    dy: object,
    x_: object,
    normalized_shape: object,
    axis: object,
    mean: object,
    invstd: object,
    weight: object,
    uncentred: bool,
    parameters: bool,
    out: object = None,
) -> tuple[Array, Array | None, Array | None]:
    """Return dx, and where `parameters` have gradients dweight and dbias, of the dtype of `weight`.

    `mean` is None where the statistics are `uncentred`.
    """
    if axis is None:
        done = _core.row_gradient_at_once(
            dy,
            x_,
            normalized_shape,
            mean,
            invstd,
            weight,
            uncentred,
            parameters,
            out,
            _threads.SERIAL_BYTES,
            threads_for,
        )
        if done is not None:
            return done
    x, normalized = _validation.normalized_axes(x_, normalized_shape, axis)
    shape = tuple([x.shape[d] for d in normalized])
    rows = _sizes_of_rows(x.shape, normalized)
    upstream = _validation.upstream_gradient(dy, x)
    inverse_std = _validation.saved_statistic("invstd", invstd, rows)
    centre = np.zeros(rows) if uncentred else _validation.saved_statistic("mean", mean, rows)
    # 0 times infinity would make NaN of what is equal to its mean.
    scale = _validation.element_parameter("weight", weight, shape, x.dtype, finite=True)
    if out is None:
        dx = _core.empty_output(x)
    else:
        others = {"dy": upstream, "x": x, "weight": weight, "mean": mean, "invstd": invstd}
        dx = _validation.output(out, x, others)
    dtype = x.dtype if weight is None else np.asarray(weight).dtype
    if x.size == 0:
        zeros = np.zeros((2, *shape), dtype)
        return (dx, *zeros) if parameters else (dx, None, None)
    geometry = _rows(normalized, 0 if scale is None else 1, x, upstream, dx)
    sums = np.empty((geometry.row_blocks, 2, math.prod(shape))) if parameters else None
    _core.row_gradient(
        geometry,
        x,
        upstream,
        dx,
        _as_walked(scale, geometry.walked),
        centre,
        inverse_std,
        sums,
        uncentred,
        threads_for(5 * x.nbytes),
    )
    if sums is None:
        return dx, None, None
    with np.errstate(all="ignore"):
        return (dx, *_in_order(sums[0], geometry.walked, shape).astype(dtype))


def _as_walked(parameter: Array | None, walked: tuple[int, ...]) -> Array | None:
    """Return the parameter of the elements of a row in the order in which they are walked."""
    if parameter is None or walked == tuple(sorted(walked)):
        return parameter
    others = [d for d in range(parameter.ndim) if d not in walked]  # of a single element
    return np.ascontiguousarray(parameter.transpose(*walked, *others))


def _in_order(columns: Array, walked: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """Return sums of the elements of a row, in the order of `shape` rather than of the walk."""
    sizes = [shape[d] for d in walked]
    order = sorted(range(len(walked)), key=walked.__getitem__)
    turned = columns.reshape(len(columns), *sizes).transpose(0, *(d + 1 for d in order))
    return turned.reshape(len(columns), *shape)
