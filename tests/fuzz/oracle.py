"""Normalizations of data, written down once more from the papers: plain NumPy in long double.

Nothing of bnfast is used. An array is folded so that all that has its statistics together lies
along some axes; after that every member is the same few lines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fuzz.judge import DOUBLE, SINGLE, Quantity, arithmetic

Array = np.ndarray
WIDE = np.longdouble

# Where nothing is promised: means of more standard deviations than this, and numbers that leave
# the range of the data when they are multiplied.
LARGEST_RATIO = {SINGLE: 1e7, DOUBLE: 1e10}
LARGEST_FACTOR = {SINGLE: 2.0**50, DOUBLE: 2.0**400}
LARGE_MEAN = 4  # standard deviations: from there on the mean of float64 data is found again


class Fold(NamedTuple):
    """Axes of an array: those of statistics that are summed over, and those of parameters.

    `split` is (axis, groups) where the channels of each sample are cut into groups; the axes are
    then those of (samples, groups, channels of a group, ...).
    """

    shape: tuple[int, ...]
    over: tuple[int, ...]
    of_parameters: tuple[int, ...]
    parameter_shape: tuple[int, ...]
    split: tuple[int, int] | None = None

    def fold(self, array: Array) -> Array:
        """The array in long double, with the axes of this fold."""
        wide = np.asarray(array).astype(WIDE)
        if self.split is None:
            return wide
        axis, groups = self.split
        moved = np.moveaxis(wide, axis, 1)
        each = moved.shape[1] // groups if groups else 0
        return moved.reshape(moved.shape[0], groups, each, *moved.shape[2:])

    def unfold(self, array: Array) -> Array:
        if self.split is None:
            return array
        axis, _ = self.split
        samples, groups, each, *rest = array.shape
        return np.moveaxis(array.reshape(samples, groups * each, *rest), 1, axis)

    def folded_shape(self) -> tuple[int, ...]:
        if self.split is None:
            return self.shape
        axis, groups = self.split
        samples, channels = self.shape[0], self.shape[axis]
        rest = [n for d, n in enumerate(self.shape) if d not in (0, axis)]
        return samples, groups, channels // groups if groups else 0, *rest

    def place(self, parameter: Array | None, default: float) -> Array:
        """A parameter, such that it broadcasts against what is folded."""
        shape = self.folded_shape()
        if parameter is None:
            return np.full([1] * len(shape), default, WIDE)
        sizes = [shape[d] for d in self.of_parameters]
        order = np.argsort(self.of_parameters)
        ordered = np.asarray(parameter).astype(WIDE).reshape(sizes).transpose(order)
        return ordered.reshape([n if d in self.of_parameters else 1 for d, n in enumerate(shape)])

    def gather(self, array: Array) -> Array:
        """Sums over all that has a parameter in common, in the shape of the parameters."""
        shape = self.folded_shape()
        others = tuple(d for d in range(len(shape)) if d not in self.of_parameters)
        sums = np.broadcast_to(array, shape).sum(others)
        ranks = np.argsort(np.argsort(self.of_parameters))
        return sums.transpose(ranks).reshape(self.parameter_shape)

    def statistic(self, kept: Array) -> Array:
        """Of a result that kept its axes: without those that were summed over."""
        return kept.reshape([n for d, n in enumerate(kept.shape) if d not in self.over])

    def keep(self, statistic: Array) -> Array:
        """A statistic as it was returned, such that it broadcasts."""
        shape = self.folded_shape()
        kept = [1 if d in self.over else n for d, n in enumerate(shape)]
        return np.asarray(statistic).astype(WIDE).reshape(kept)

    @property
    def count(self) -> int:
        shape = self.folded_shape()
        return int(np.prod([shape[d] for d in self.over], dtype=np.int64))


def of_channels(shape: tuple[int, ...], axis: int) -> Fold:
    """Of a batch: each channel has its statistics."""
    axis %= len(shape)
    others = tuple(d for d in range(len(shape)) if d != axis)
    return Fold(shape, others, (axis,), (shape[axis],))


def of_conditions(shape: tuple[int, ...], axis: int) -> Fold:
    """Each channel has its statistics, each sample its parameters."""
    fold = of_channels(shape, axis)
    axis %= len(shape)
    return fold._replace(of_parameters=(0, axis), parameter_shape=(shape[0], shape[axis]))


def of_planes(shape: tuple[int, ...], axis: int) -> Fold:
    """Each channel of each sample has its statistics."""
    fold = of_channels(shape, axis)
    return fold._replace(over=tuple(d for d in fold.over if d != 0))


def of_groups(shape: tuple[int, ...], axis: int, groups: int, per_group: bool = False) -> Fold:
    """Each group of channels of each sample has its statistics."""
    axis %= len(shape)
    over = (2, *range(3, len(shape) + 1))
    of_parameters = (1,) if per_group else (1, 2)
    number = groups if per_group else shape[axis]
    return Fold(shape, over, of_parameters, (number,), (axis, groups))


def of_rows(shape: tuple[int, ...], axes: tuple[int, ...]) -> Fold:
    """Each row has its statistics, each of its elements its parameters."""
    axes = tuple(d % len(shape) for d in axes)
    return Fold(shape, axes, axes, tuple(shape[d] for d in axes))


def of_filters(shape: tuple[int, ...], axis: int | None) -> Fold:
    """Each filter has its statistics; without an axis the whole array is one."""
    if axis is None:
        return Fold(shape, tuple(range(len(shape))), (), ())
    return of_channels(shape, axis)


def mean_over(array: Array, fold: Fold) -> Array:
    return array.sum(fold.over, keepdims=True) / max(fold.count, 1)


class Statistics(NamedTuple):
    """Of folded data, with all axes kept; `usable` where they have a promise."""

    mean: Array
    var: Array
    deviation: Array
    constant: Array
    usable: Array


def statistics(x: Array, fold: Fold, centred: bool = True) -> Statistics:
    """Two passes around the first value, the second of which takes what rounding left."""
    wide, dtype = fold.fold(x), arithmetic(x.dtype)
    first = tuple(slice(0, 1) if d in fold.over else slice(None) for d in range(wide.ndim))
    start = np.zeros_like(wide.sum(fold.over, keepdims=True))
    if centred and fold.count:
        start = wide[first]
    deviation, offset = wide - start, np.zeros_like(start)
    for _ in range(2 if centred else 0):
        more = mean_over(deviation, fold)
        offset, deviation = offset + more, deviation - more
    mean, var = start + offset, mean_over(deviation**2, fold)
    constant = (wide == start).all(fold.over, keepdims=True)
    largest = np.abs(wide).max(fold.over, keepdims=True, initial=0)
    usable = np.isfinite(largest) & (largest <= np.finfo(dtype).max / 4)
    if centred:
        # What is all equal has no deviations, however wide its mean.
        deviation = np.where(constant & usable, 0, deviation)
        var = np.where(constant & usable, 0, var)
        mean = np.where(constant & usable, start, mean)
        usable = usable & (constant | (np.abs(mean) <= LARGEST_RATIO[dtype] * np.sqrt(var)))
    return Statistics(mean, var, deviation, constant, usable)


def mean_of(of: Statistics, fold: Fold, dtype: np.dtype) -> Quantity:
    """The mean as it is returned. Quotients of sums by counts may leave the normal numbers."""
    std = fold.statistic(unjudged(np.sqrt(of.var), of.usable))
    sizes = {"statistics": std, "smallest": np.ones(std.shape)}
    return Quantity(fold.statistic(of.mean), sizes, dtype, DOUBLE)


def is_rounded(mean: Array, given: Array) -> Array:
    """Whether a mean is what float64 holds of another one."""
    return np.abs(mean - given) <= 2 * np.spacing(np.abs(given).astype(np.float64))


def moderate(factor: Array, dtype: np.dtype) -> Array:
    """Whether what is multiplied by this keeps its bits."""
    size, largest = np.abs(factor), LARGEST_FACTOR[arithmetic(dtype)]
    return (size <= largest) & ((size >= 1 / largest) | (size == 0))


def unjudged(size: Array, usable: Array) -> Array:
    return np.where(usable, size, np.inf)


class Forward(NamedTuple):
    """What a forward pass returns, and what follows from its statistics."""

    y: Quantity
    mean: Quantity
    invstd: Quantity
    of: Statistics


def scaled(
    fold: Fold,
    deviation: Array,
    invstd: Array,
    weight: Array,
    bias: Array,
    usable: Array,
    dtype: np.dtype,
) -> tuple[Array, dict[str, Array]]:
    """weight * deviation * invstd + bias, and its sizes."""
    factor = weight * invstd
    xhat = deviation * invstd
    y = weight * xhat + bias
    size = np.abs(weight) * np.maximum(1, np.abs(xhat)) + np.abs(bias)
    good = usable & moderate(factor, dtype)
    return y, {
        "output": unjudged(size, np.broadcast_to(good, size.shape)),
        "smallest": 1 + np.abs(deviation) + 0 * size,
    }


def forward(
    x: Array,
    fold: Fold,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    centred: bool = True,
    more_eps: Array | None = None,
) -> Forward:
    """Normalize with the statistics of x."""
    of = statistics(x, fold, centred)
    variance = of.var + WIDE(eps) + np.abs(fold.place(more_eps, 0))
    invstd = 1 / np.sqrt(variance)
    placed = fold.place(weight, 1), fold.place(bias, 0)
    y, sizes = scaled(fold, of.deviation, invstd, *placed, of.usable, x.dtype)
    if centred:  # a constant channel gives exactly its bias, in the type of the arithmetic
        exact = of.constant & of.usable & moderate(invstd, x.dtype)
        rounded = np.broadcast_to(placed[1], y.shape).astype(arithmetic(x.dtype)).astype(WIDE)
        y = np.where(exact, rounded, y)
        sizes = {kind: np.where(exact, 0, size) for kind, size in sizes.items()}
    unfolded = {kind: fold.unfold(size) for kind, size in sizes.items()}
    return Forward(
        Quantity(fold.unfold(y), unfolded, x.dtype, x.dtype),
        mean_of(of, fold, x.dtype),
        Quantity(
            fold.statistic(invstd),
            {"statistics": fold.statistic(unjudged(invstd, of.usable & moderate(invstd, DOUBLE)))},
            x.dtype,
            DOUBLE,
        ),
        of,
    )


def activated(y: Quantity, fused: dict[str, Any]) -> Quantity:
    """What a residual and an activation make of an output."""
    residual, name, slope = (fused.get(k) for k in ("residual", "activation", "negative_slope"))
    z = y.value if residual is None else y.value + np.asarray(residual).astype(WIDE)
    terms = np.abs(y.value) + np.abs(z)
    made = {
        None: lambda: z,
        "relu": lambda: np.where(z > 0, z, 0 * z),
        "leaky_relu": lambda: np.where(z > 0, z, slope * z),
        "relu6": lambda: np.clip(z, 0, 6),
        "silu": lambda: z / (1 + np.exp(-z)),
        "hardswish": lambda: z * np.clip(z + 3, 0, 6) / 6,
    }[name]()
    # No slope is larger than 1.5; sums and what curves are made of round a few times more.
    sizes = {kind: 1.5 * size for kind, size in y.sizes.items()}
    usable = terms < np.finfo(arithmetic(y.dtype)).max / 8
    sizes["rounding"] = unjudged(4 * terms, usable)
    sizes["smallest"] = sizes.get("smallest", 0) + np.ones(z.shape, WIDE)
    return y._replace(value=made, sizes=sizes)


def evaluate(
    x: Array,
    fold: Fold,
    mean: Array,
    variance: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
) -> Quantity:
    """Normalize with given statistics."""
    wide, largest = fold.fold(x), np.finfo(arithmetic(x.dtype)).max / 4
    invstd = 1 / np.sqrt(fold.keep(variance) + WIDE(eps))
    deviation = wide - fold.keep(mean)
    usable = (np.abs(wide) <= largest) & (np.abs(fold.keep(mean)) <= largest)
    usable = usable & np.isfinite(invstd) & (invstd > 0)
    y, sizes = scaled(
        fold, deviation, invstd, fold.place(weight, 1), fold.place(bias, 0), usable, x.dtype
    )
    sizes = {kind: fold.unfold(size) for kind, size in sizes.items()}
    return Quantity(fold.unfold(y), sizes, x.dtype, x.dtype)


def by_statistics(
    y: Quantity,
    x: Array,
    fold: Fold,
    mean: Array,
    variance: Array,
    weight: Array | None,
    eps: float,
    sizes: tuple[dict[str, Array], dict[str, Array]],
) -> Quantity:
    """An output with the errors of the mean and of the variance that it was made with."""
    invstd = 1 / np.sqrt(variance + WIDE(eps))
    slope = np.abs(fold.place(weight, 1)) * fold.keep(invstd)
    bend = slope * np.abs(fold.fold(x) - fold.keep(mean)) * fold.keep(invstd) ** 2 / 2
    of_mean, of_var = sizes
    more = {
        kind: slope * fold.keep(of_mean[kind]) + bend * fold.keep(of_var[kind]) for kind in of_mean
    }
    return y._replace(sizes=y.sizes | more)


def blended(
    old: Array,
    new: Array,
    momentum: float,
    error: Array,
    precision: np.dtype,
    averaged: Array | None = None,
) -> Quantity:
    """(1 - momentum) * old + momentum * new, where what has no weight leaves nothing.

    A new one may be the mean over samples of what is `averaged`, whose sum in float64 may cancel.
    """
    share = WIDE(momentum)
    with np.errstate(all="ignore"):
        kept = np.where(share == 1, 0, (1 - share) * old.astype(WIDE))
        added = np.where(share == 0, 0, share * new)
        sizes = {"running": np.abs(kept) + np.abs(added), "statistics": np.abs(share) * error}
        sizes["smallest"] = np.ones(old.shape)
        if averaged is not None:
            of_sum = np.finfo(DOUBLE).eps / 2 * np.abs(averaged).sum(0)
            sizes["known"] = np.abs(share) * np.where(np.isfinite(of_sum), of_sum, 0)
    if share == 0:
        sizes = {"running": np.zeros(old.shape, WIDE)}
    return Quantity(kept + added, sizes, precision, old.dtype)


class Gradients(NamedTuple):
    """What a backward pass returns."""

    dx: Quantity
    dweight: Quantity
    dbias: Quantity


def backward(
    dy: Array,
    x: Array,
    fold: Fold,
    mean: Array | None,
    invstd: Array,
    weight: Array | None,
    *,
    constant: bool = False,
    dtype: np.dtype | None = None,
    mean_is_whole: bool = True,
    kept: Array | None = None,
) -> Gradients:
    """The gradient through the statistics, or beside them where these are `constant`.

    `kept` says where dy counts. Without `mean_is_whole`, dweight has what one float64 holds of it.
    """
    precision = arithmetic(x.dtype)
    result = dtype or (precision if weight is None else weight.dtype)
    wide, upstream, inverse = fold.fold(x), fold.fold(dy), fold.keep(invstd)
    center = np.zeros_like(inverse) if mean is None else fold.keep(mean)
    if kept is not None:
        upstream = np.where(kept, upstream, 0)
    deviation = wide - center
    large, unknown = np.zeros(inverse.shape, bool), np.zeros(inverse.shape, WIDE)
    if mean is not None and not constant and precision == DOUBLE:
        of = statistics(x, fold)
        large, near = np.abs(center * inverse) > LARGE_MEAN, is_rounded(of.mean, center)
        deviation = np.where(near & large, of.deviation, deviation)
        # Of a smaller one it may be found again or not.
        unknown = np.where(near & ~large, np.abs(of.mean - center), 0)
    xhat = deviation * inverse
    factor = fold.place(weight, 1)
    g = upstream * factor
    terms, products = np.abs(g), np.abs(g * xhat)
    if constant:
        dx, size, off = inverse * g, np.abs(inverse) * terms, np.zeros_like(terms)
    else:
        dx = g - mean_over(g * xhat, fold) * xhat
        steep, level = mean_over(products, fold), mean_over(terms, fold)
        size = terms + np.abs(xhat) * (steep + large * level)
        off = unknown * inverse * (steep + np.abs(xhat) * level)
        if mean is not None:
            dx, size = dx - mean_over(g, fold), size + level
        dx, size, off = (part * inverse for part in (dx, size, off))
    most = LARGEST_FACTOR[precision]
    sound = np.isfinite(wide) & np.isfinite(upstream)
    if fold.over:
        sound = sound.all(fold.over, keepdims=True)
    largest_dy = np.abs(upstream).max(fold.over, keepdims=True, initial=0)
    good = sound & (np.abs(xhat) < most) & (np.abs(center) < np.finfo(precision).max / 4)
    for number in (inverse, factor, inverse * factor, largest_dy):
        good = good & moderate(number, precision)
    good = good & (inverse > 0)  # else it was rounded away
    lost = 1 + np.abs(inverse) * (1 + np.abs(factor)) * (1 + np.abs(xhat)) * (
        1 + np.abs(xhat).max(fold.over, keepdims=True, initial=0)
    )
    weighed = np.abs(upstream * xhat)
    # What rounding left of a mean may be left out where it is below half the step of 1.
    weighed = weighed + np.abs(upstream) * np.where(large, 1, 0.1)
    if not mean_is_whole:
        weighed = weighed + np.abs(upstream) * np.abs(center * inverse)
    sums = {"sums": fold.gather(unjudged(np.abs(upstream), sound))}
    of_weight = {
        "sums": fold.gather(unjudged(weighed, good)),
        "known": fold.gather(np.abs(upstream) * unknown * inverse),
        "smallest": fold.gather(1 + np.abs(inverse) * (1 + np.abs(upstream)) + 0 * xhat),
    }
    return Gradients(
        Quantity(
            fold.unfold(dx),
            {
                "dx": fold.unfold(unjudged(size, good)),
                "smallest": fold.unfold(lost + 0 * size),
                "known": fold.unfold(off),
            },
            precision,
            x.dtype,
        ),
        Quantity(fold.gather(upstream * xhat), of_weight, precision, result),
        Quantity(fold.gather(upstream), sums, precision, result),
    )


def ghosts(samples: int, size: int) -> list[slice]:
    """The parts of a batch."""
    return [slice(start, min(start + size, samples)) for start in range(0, samples, size)]


def concatenated(parts: list[Quantity], join: Callable[..., Array] = np.concatenate) -> Quantity:
    """Quantities of parts as one."""
    first = parts[0]
    sizes = {kind: join([part.sizes[kind] for part in parts]) for kind in first.sizes}
    return first._replace(value=join([part.value for part in parts]), sizes=sizes)


def added(parts: list[Quantity]) -> Quantity:
    """The sum of quantities."""
    return concatenated(parts, lambda arrays: np.sum(np.stack(arrays), 0))


def sums_of(quantity: Quantity, factor: Array, other: Quantity, more: Array) -> Quantity:
    """quantity * factor + other * more, where they are sums over the same terms."""
    kinds = {*quantity.sizes, *other.sizes}
    none: Any = np.zeros(quantity.value.shape, WIDE)
    sizes = {
        kind: quantity.sizes.get(kind, none) * np.abs(factor)
        + other.sizes.get(kind, none) * np.abs(more)
        for kind in kinds
    }
    value = quantity.value * factor + other.value * more
    return quantity._replace(value=value, sizes=sizes)
