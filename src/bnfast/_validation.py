"""User input in, checked arrays out; every check of an argument, those of `_scalars` included.

Each check says which argument it is about, what was expected and what came, and comes before
anything is written.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bnfast._arrays import as_array as as_array
from bnfast._arrays import counts as counts
from bnfast._arrays import data_array as data_array
from bnfast._arrays import finite_floats as finite_floats
from bnfast._arrays import floating_array as floating_array
from bnfast._arrays import floats_to_copy as floats_to_copy
from bnfast._arrays import integers_of_samples, of_shape, on_the_cpu
from bnfast._arrays import kept_axes as kept_axes
from bnfast._arrays import mask as mask
from bnfast._arrays import numbers as numbers
from bnfast._arrays import statistics as statistics
from bnfast._dtypes import is_half
from bnfast._masks import PADDING as PADDING
from bnfast._masks import CheckedLengths as CheckedLengths
from bnfast._masks import counted as counted
from bnfast._masks import mask_or_lengths as mask_or_lengths
from bnfast._masks import nothing_counts as nothing_counts
from bnfast._masks import positions as positions
from bnfast._masks import within_lengths as within_lengths
from bnfast._overlap import address, is_same_memory, overlaps_itself
from bnfast._overlap import memory_of as memory_of
from bnfast._overlap import shares_memory as shares_memory
from bnfast._scalars import MOST_AXES as MOST_AXES
from bnfast._scalars import choice as choice
from bnfast._scalars import describe
from bnfast._scalars import epsilon as epsilon
from bnfast._scalars import estimate as estimate
from bnfast._scalars import factor_limit as factor_limit
from bnfast._scalars import flag as flag
from bnfast._scalars import floating_dtype as floating_dtype
from bnfast._scalars import instance as instance
from bnfast._scalars import integer as integer
from bnfast._scalars import integer_from as integer_from
from bnfast._scalars import integers as integers
from bnfast._scalars import integers_from as integers_from
from bnfast._scalars import positive as positive
from bnfast._scalars import real as real
from bnfast._scalars import renorm_limits as renorm_limits
from bnfast._scalars import share as share
from bnfast._scalars import size as size
from bnfast._scalars import sizes as sizes
from bnfast._scalars import text as text
from bnfast._typing import Array

Saved = TypeVar("Saved")


def batch(
    name: str,
    value: object,
    axis: object,
    called: str = "axis",
    dimensions: str = "a batch and channels",
) -> tuple[Array, int, int]:
    """Return the input as an array, its channel axis (not negative) and its number of channels."""
    x = data_array(name, value)
    ndim = x.ndim
    if ndim < 2:
        if ndim == 1 and x.size == 0:
            return x, 0, 0  # PyTorch lets (0,) pass as an empty batch
        raise ValueError(
            f"{name} must have at least 2 dimensions, {dimensions}, got shape {x.shape}"
        )
    channel_axis = integer(called, axis)
    if not -ndim <= channel_axis < ndim:
        raise ValueError(
            f"{called} must be from {-ndim} to {ndim - 1} for {name} of shape {x.shape}, got {axis}"
        )
    channel_axis %= ndim
    return x, channel_axis, x.shape[channel_axis]


def full_precision(name: str, array: Array) -> None:
    """Refuse data of 16 bits."""
    data_array(name, array, half=False)


def weights(name: str, value: object, axis: object, called: str = "axis") -> tuple[Array, int, int]:
    """Return weights as an array, the axis of their filters (not negative) and their number."""
    array = data_array(name, value, half=False)
    return batch(name, array, axis, called, "filters and what they are made of")


def axis_of_filters(name: str, x: Array, dim: object) -> int:
    """Return the axis of the filters of weights, which is not counted from the end."""
    axis = integer("dim", dim)
    if axis < 0:
        raise ValueError(
            f"dim must not be negative, got {dim}: in PyTorch -1 means the norm of the whole "
            f"array, which is dim=None here, and the last axis is {x.ndim - 1}"
        )
    if axis >= x.ndim:
        raise ValueError(f"dim must be less than {x.ndim} for {name} of shape {x.shape}, got {dim}")
    return axis


def lengths(name: str, value: object, shape: tuple[int, ...], axis: int | None) -> Array:
    """Return one length for each filter of weights of this shape, contiguous and aligned.

    Without an axis the first has the only filter, and may be missing in the shape of the lengths.
    """
    array = floating_array(name, value)
    count = shape[axis or 0]
    full_shape = tuple(count if d == axis else 1 for d in range(len(shape)))
    if array.shape not in {(count,), full_shape, (count,) if axis is not None else ()}:
        raise ValueError(
            f"{name} must have one value for each of the {count} filters, shape ({count},) or "
            f"{full_shape}, got shape {array.shape}"
        )
    flags = array.flags
    return array if flags.c_contiguous and flags.aligned else array.copy()


def channel_axis_of_samples(x: object, axis: object) -> tuple[Array, int]:
    """Return the input and its number of channels, which are not along axis 0: samples are."""
    array, channel_axis, channels = batch("x", x, axis)
    if array.ndim > 1 and channel_axis == 0:
        raise ValueError(f"axis must not be 0, that of the samples, got {axis}")
    return array, channels


def channels_of_group(num_groups: object, channels: int) -> int:
    """Return how many channels a group has."""
    groups = integer_from("num_groups", num_groups, 1)
    if channels % groups:
        raise ValueError(f"num_groups must divide the {channels} channels, got {groups}")
    return channels // groups if channels else 1


def matrices_of_groups(name: str, value: object, channels: int | None = None) -> Array:
    """Return a square matrix for each group of channels: of so many, or of any number."""
    array = floating_array(name, value)
    shape = array.shape
    if len(shape) != 3 or shape[1] != shape[2] or channels not in (None, shape[0] * shape[1]):
        what = "channels" if channels is None else f"the {channels} channels"
        raise ValueError(
            f"{name} must have a square matrix for each group of {what}, shape "
            f"(G, C / G, C / G), got {describe(array)}"
        )
    return array


def groups_of_statistics(name: str, value: object, channels: int) -> int:
    """Return how many groups the saved statistics of a group normalization have."""
    array = floating_array(name, value)
    groups: int = array.shape[1] if array.ndim == 2 else 0
    if groups == 0 or channels % groups:
        raise ValueError(
            f"{name} must be as forward returned it, of shape (N, G) where G groups divide the "
            f"{channels} channels, got {describe(array)}"
        )
    return groups


def normalized_axes(
    x: object, normalized_shape: object, axis: object
) -> tuple[Array, tuple[int, ...]]:
    """Return the input, and the axes that make a row of it, none of them negative."""
    array = data_array("x", x)
    if axis is None and type(normalized_shape) is int and array.shape[-1:] == (normalized_shape,):
        return array, (array.ndim - 1,)
    shape = sizes("normalized_shape", normalized_shape)
    if axis is None:
        axes = tuple(range(array.ndim - len(shape), array.ndim))
    else:
        given = integers("axis", axis)
        if any(not -array.ndim <= d < array.ndim for d in given):
            raise ValueError(
                f"axis must be from {-array.ndim} to {array.ndim - 1} for x of shape "
                f"{array.shape}, got {axis}"
            )
        axes = tuple(d % array.ndim for d in given)
        if len(set(axes)) != len(axes):
            raise ValueError(f"axis must not name an axis twice, got {axis}")
    if len(shape) > array.ndim or tuple(array.shape[d] for d in axes) != shape:
        where = "the last axes" if axis is None else f"the axes {axis}"
        hint = ""
        if axis is None and len(shape) == 1 and shape[0] in array.shape[:-1]:
            hint = f"; of channels first it is axis={array.shape.index(shape[0])}"
        raise ValueError(
            f"normalized_shape must be the sizes of {where} of x, which has the shape "
            f"{array.shape}, got {shape}{hint}"
        )
    return array, axes


def same_channels(name: str, x: Array, axis: int, channels: int, called: str = "channels") -> None:
    """Refuse a batch with another number of channels than a layer has."""
    if x.ndim < 2 or x.shape[axis] != channels:
        hint = "; of channels last it is axis=-1" if x.shape[-1:] == (channels,) else ""
        raise ValueError(
            f"{name} must have {channels} {called} along axis {axis}, got shape {x.shape}{hint}"
        )


def upstream_gradient(value: object, x: Array, names: tuple[str, str] = ("dy", "x")) -> Array:
    """Return dy, of the shape and dtype of x, or what else their names are."""
    dy = data_array(names[0], value)
    if dy.shape != x.shape or dy.dtype != x.dtype:
        raise ValueError(
            f"{names[0]} must have the shape and dtype of {names[1]}, {describe(x)}, "
            f"got {describe(dy)}"
        )
    return dy


def _one_for_each_channel(name: str, array: Array, channels: int, called: str = "channels") -> None:
    if array.shape != (channels,):
        raise ValueError(
            f"{name} must have one value for each of the {channels} {called}, shape "
            f"({channels},), got {describe(array)}"
        )


def channel_parameter(
    name: str, value: object, channels: int, called: str = "channels"
) -> Array | None:
    """Return one value a channel, contiguous and aligned, or None."""
    if value is None:
        return None
    array = floating_array(name, value)
    _one_for_each_channel(name, array, channels, called)
    flags = array.flags
    if not (flags.c_contiguous and flags.aligned):
        array = array.copy()
    return array


def of_each_channel(name: str, value: object, channels: int, together: int) -> Array | None:
    """Return the parameter of each group for each of its channels, or None."""
    of_groups = channel_parameter(name, value, channels // together, "groups")
    return None if of_groups is None else np.repeat(of_groups, together)


def finite_channel_parameter(
    name: str, value: object, channels: int, called: str = "channels"
) -> NDArray[np.float64]:
    """Return one finite value a channel, of any float type, as a float64 copy."""
    array = finite_floats(name, value)
    _one_for_each_channel(name, array, channels, called)
    return array.astype(np.float64)


def sample_parameter(name: str, value: object, samples: int, channels: int) -> Array | None:
    """Return one value for each channel of each sample, contiguous and aligned, or None."""
    if value is None:
        return None
    array = floating_array(name, value)
    if array.shape != (samples, channels):
        raise ValueError(
            f"{name} must have one value for each of the {channels} channels of each of the "
            f"{samples} samples, shape ({samples}, {channels}), got {describe(array)}"
        )
    flags = array.flags
    return array if flags.c_contiguous and flags.aligned else array.copy()


def class_labels(value: object, samples: int, classes: int) -> NDArray[np.intp]:
    """Return a copy of the class of each sample, counted from 0."""
    array = integers_of_samples("labels", value, samples)
    wrong = array[(array < 0) | (array >= classes)]
    if wrong.size:
        raise ValueError(
            f"labels must be from 0 to {classes - 1}, for {classes} classes, got {wrong[0]}"
        )
    return array.astype(np.intp)


def element_parameter(
    name: str,
    value: object,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    finite: bool = False,
) -> Array | None:
    """Return one value for each element of a row, contiguous and of this dtype, or None.

    Where what is `finite` has to stay so, values beyond the range of the dtype become its largest.
    """
    if value is None:
        return None
    array = floating_array(name, value)
    if array.shape != shape:
        raise ValueError(
            f"{name} must have one value for each normalized element, shape {shape}, "
            f"got {describe(array)}"
        )
    flags = array.flags
    if array.dtype == dtype and flags.c_contiguous and flags.aligned:
        return array
    with np.errstate(all="ignore"):
        if finite:
            largest = np.finfo(dtype).max
            array = np.where(np.isfinite(array), np.clip(array, -largest, largest), array)
        return np.array(array, dtype, order="C")


def gradient_of(name: str, parameter: object, gradient: Array) -> Array:
    """Return the gradient of a parameter in the dtype that the parameter came in."""
    dtype = data_array(name, parameter).dtype
    if not is_half(dtype):
        return gradient
    with np.errstate(all="ignore"):
        return gradient.astype(dtype)


def rounded_gradient(name: str, parameter: object, sums: Array, x: Array) -> Array:
    """Return float64 sums in the dtype of a parameter; without one, in that of the arithmetic."""
    dtype = x.dtype if parameter is None else data_array(name, parameter).dtype
    with np.errstate(all="ignore"):
        gradient = sums.astype(np.float64 if dtype == np.float64 else np.float32)
    return gradient if parameter is None else gradient_of(name, parameter, gradient)


def state(name: str, value: object, shape: tuple[int, ...]) -> Array:
    """Return an array of a layer's state, to be copied."""
    value = None if value is None else floats_to_copy(name, value)
    if len(shape) == 1:
        return required_channel_parameter(name, value, shape[0])
    return shaped(name, value, shape)


def shaped(name: str, value: object, shape: tuple[int, ...]) -> Array:
    """Return an array of this shape."""
    array = floating_array(name, value)
    of_shape(name, array, shape)
    return array


def counter(name: str, value: object) -> int:
    """Return a number of batches, which a state keeps as int64."""
    number = integer_from(name, np.asarray(on_the_cpu(name, value))[()], 0)
    max_count = np.iinfo(np.int64).max
    if number > max_count:
        raise ValueError(f"{name} must be at most {max_count}, got {number}")
    return number


def required_channel_parameter(
    name: str, value: object, channels: int, called: str = "channels"
) -> Array:
    """Return one value a channel, contiguous and aligned."""
    array = channel_parameter(name, value, channels, called)
    if array is None:
        hint = (
            "; without them, the statistics of x must be used: training=True, or "
            "use_input_stats=True of instance_norm"
            if name[:7] == "running"
            else ""
        )
        raise TypeError(f"{name} must be an array of shape ({channels},), got None{hint}")
    return array


def saved_statistic(name: str, value: object, shape: tuple[int, ...]) -> Array:
    """Return what the forward pass returned, contiguous and aligned."""
    if len(shape) == 1:
        return required_channel_parameter(name, value, shape[0])
    if value is None:
        raise TypeError(f"{name} must be an array of shape {shape}, got None")
    array = floating_array(name, value)
    if array.shape != shape:
        raise ValueError(
            f"{name} must be as forward returned it, shape {shape}, got {describe(array)}"
        )
    flags = array.flags
    return array if flags.c_contiguous and flags.aligned else array.copy()


def saved_value(value: object, kind: type[Saved], function: str) -> Saved:
    """Return what the forward pass returned for its backward pass."""
    if not isinstance(value, kind):
        raise TypeError(f"saved must be what {function} returned, got {type(value).__name__}")
    return value


def _same_memory(name: str, value: object) -> str:
    """Return what to write for the memory of a tensor, which is to be written to."""
    return f"; {name}.detach().numpy() is its memory" if hasattr(value, "detach") else ""


def running_statistic(name: str, value: object, shape: tuple[int, ...]) -> Array:
    """Return the memory that came, of this shape, to be updated in place."""
    if not isinstance(value, np.ndarray):
        raise TypeError(
            f"{name} is updated in place and must be a numpy array, got {describe(value)}"
            f"{_same_memory(name, value)}"
        )
    array = data_array(name, value)
    if len(shape) == 1:
        _one_for_each_channel(name, array, shape[0])
    else:
        of_shape(name, array, shape)
    if not array.flags.writeable:
        raise ValueError(
            f"{name} is updated in place and must be writable, got a read-only {describe(array)}"
        )
    return array


def running_statistics(
    mean: object,
    var: object,
    x: Array,
    channels: int,
    names: tuple[str, str] = ("running_mean", "running_var"),
    shape: tuple[int, ...] | None = None,
    called: str = "x",
) -> tuple[Array, Array] | None:
    """Return the memory that came, to be updated in place, or None for none.

    `shape` is that of the second, where it has not one value for each channel; x may be `called`
    something else.
    """
    if mean is None and var is None:
        return None
    both = " and ".join(names)
    if mean is None or var is None:
        missing = names[0] if mean is None else names[1]
        raise ValueError(f"{both} must both be given or both be None, got None for {missing}")
    mean_array = running_statistic(names[0], mean, (channels,))
    var_array = running_statistic(names[1], var, shape or (channels,))
    if overlaps_itself(mean_array) or overlaps_itself(var_array):
        raise ValueError(f"{both} must have a place for each channel")
    if shares_memory(mean_array, var_array):
        raise ValueError(f"{both} must not share memory")
    for name, array in zip(names, (mean_array, var_array), strict=True):
        if shares_memory(array, x):
            raise ValueError(f"{name} is updated in place and must not share memory with {called}")
    return mean_array, var_array


def updated_in_place(
    name: str, value: object, channels: int, apart: Mapping[str, Array], *, rows: bool = False
) -> Array:
    """Return the memory that came, of one value a channel or of rows of these, to be updated.

    It has no element in common with what is to be `apart`, by name.
    """
    own_shape = value.shape if rows and isinstance(value, np.ndarray) else (channels,)
    array = running_statistic(name, value, own_shape)
    full_precision(name, array)
    if rows and (array.ndim != 2 or len(array) == 0 or array.shape[1] != channels):
        raise ValueError(
            f"{name} must have rows of one value for each of the {channels} channels, at least one "
            f"row, got {describe(array)}"
        )
    if overlaps_itself(array):
        raise ValueError(f"{name} must have a place for each value")
    for other, memory in apart.items():
        if shares_memory(array, memory):
            raise ValueError(f"{name} is updated in place and must not share memory with {other}")
    return array


def output(
    value: object,
    x: Array,
    arguments: Mapping[str, object],
    names: tuple[str, ...] = ("dy", "x"),
) -> Array:
    """Return the array to write to.

    `arguments` are the others of the call, as they were given: what was copied of them is safe, but
    they are not. Those in `names` may be `out`: of them each element is read before the one that
    takes its place is written. The last of `names` is that of x.
    """
    if not isinstance(value, np.ndarray):
        hint = _same_memory("out", value)
        raise TypeError(f"out must be a numpy array, got {describe(value)}{hint}")
    out: Array = value
    if isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"out must be an array without a mask, got a masked {describe(out)}")
    if out.dtype != x.dtype or out.shape != x.shape:
        raise ValueError(
            f"out must have the shape and dtype of {names[-1]}, {describe(x)}, got {describe(out)}"
        )
    if not out.flags.writeable:
        raise ValueError(f"out must be writable, got a read-only {describe(out)}")
    if overlaps_itself(out):
        raise ValueError(
            f"out must not overlap itself, got strides {out.strides} for shape {out.shape}"
        )
    for name, given in arguments.items():
        argument = memory_of(given)
        if argument is None or not shares_memory(out, argument):
            continue
        if name not in names:
            raise ValueError(f"out must not share memory with {name}")
        if not is_same_memory(out, argument):
            raise ValueError(
                f"out must be {name} itself or share no element with it: got one that begins "
                f"{address(out) - address(argument)} bytes after {name}, with strides "
                f"{out.strides} beside {argument.strides}"
            )
    return out


def room_for_axes(name: str, x: Array, more: int) -> None:
    """Refuse an array with so many axes that NumPy has none left where some more are used."""
    if x.ndim + more > MOST_AXES:
        raise ValueError(
            f"{name} must have at most {MOST_AXES - more} dimensions, got {x.ndim}: NumPy has "
            f"{MOST_AXES}, and {more} more are used"
        )


def fewest_values(unbiased: bool) -> int:
    """Return of how many values there are statistics, where they are of any.

    The rule of every member and every size of batch, for whatever has its statistics together: a
    channel, that of a sample or of a ghost, a group, a row, a filter. A biased variance is divided
    by the number of values: that of one value is 0, and the output the bias, as in Keras. An
    unbiased one, as running variances are and those of filters may be, is divided by one less: one
    value has none.
    """
    return 2 if unbiased else 1


def enough_values(name: str, x: Array, values: int, what: str, *, unbiased: bool) -> None:
    """Refuse so few values per channel, or `what` else, that they have no such variance."""
    if 0 < values < fewest_values(unbiased):
        raise ValueError(
            f"{name} must have more than one value per {what} for an unbiased variance, "
            f"got shape {x.shape}"
        )


def warn(message: str) -> None:
    """Warn the caller of bnfast."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "")[:7] == "bnfast.":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)


def warn_too_large(name: str) -> None:
    """Warn the caller of bnfast that a running statistic has left the range of its dtype."""
    warn(
        f"{name} is infinite from now on: what the batch makes of it is finite, but beyond the "
        f"range of float32. Keep running statistics in float64: dtype=numpy.float64 of a layer, or "
        f"arrays of float64"
    )
