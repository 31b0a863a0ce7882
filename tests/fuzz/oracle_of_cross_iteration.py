"""Cross-iteration batch normalization, written down once more from the paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fuzz import oracle
from fuzz.judge import DOUBLE, Quantity, allowed
from fuzz.oracle import WIDE, Array, Fold, unjudged


class Layer(NamedTuple):
    """A linear layer or a convolution, with one number for each spatial axis; its filters vary."""

    filter_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def kernel(self) -> tuple[int, ...]:
        """Of a linear layer, a single position."""
        return self.filter_shape[2:] or (1,) * len(self.stride)

    def sizes_of(self, made: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial sizes of inputs of which so much is made, where there are any without padding."""
        return tuple(
            max(step * (size - 1) + spacing * (length - 1) + 1 - 2 * pad, 1)
            for size, length, step, pad, spacing in zip(
                made, self.kernel(), self.stride, self.padding, self.dilation, strict=True
            )
        )

    def columns(self, inputs: Array) -> tuple[Array, tuple[int, ...]]:
        """What filters are multiplied by: (groups, weights of a filter, values of a channel).

        And the shape of an output but for its channels. Inputs are (N, K, ...).
        """
        axes = tuple(range(2, inputs.ndim))
        padded = np.pad(inputs.astype(WIDE), [(0, 0), (0, 0), *((p, p) for p in self.padding)])
        widths = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel(), strict=True)]
        found = padded
        if axes:
            found = np.lib.stride_tricks.sliding_window_view(padded, widths, axes)
        steps = [slice(None, None, step) for step in (*self.stride, *self.dilation)]
        found = found[(slice(None), slice(None), *steps)]
        samples, channels, *rest = found.shape
        made, kernel = rest[: len(axes)], rest[len(axes) :]
        order = (1, *range(2 + len(axes), found.ndim), 0, *axes)
        each = channels // self.groups * int(np.prod(kernel))
        return found.transpose(order).reshape(self.groups, each, -1), (samples, *made)

    def rows(self, filters: Array) -> Array:
        """(groups, filters of a group, weights of a filter)."""
        each = len(filters) // self.groups
        return filters.astype(WIDE).reshape(self.groups, each, -1)

    def output(self, inputs: Array, filters: Array) -> Array:
        """(N, C, ...)."""
        columns, (samples, *made) = self.columns(inputs)
        values = (self.rows(filters) @ columns).reshape(len(filters), samples, *made)
        return values.swapaxes(0, 1)


def derivatives(
    x: Array, fold: Fold, axis: int, inputs: Array, layer: Layer
) -> tuple[Quantity, ...]:
    """Of the means and variances of x, which is not empty, by the filters that it was made with."""
    of = oracle.statistics(x, fold)
    columns, _ = layer.columns(np.moveaxis(inputs, axis, 1))
    each = layer.filter_shape[0] // layer.groups

    def by_filter(of_groups: Array) -> Array:
        return np.broadcast_to(of_groups, (layer.groups, each, columns.shape[1])).reshape(
            layer.filter_shape
        )

    deviation = np.moveaxis(of.deviation, (axis, 0), (0, 1)).reshape(layer.groups, each, -1)
    size = np.abs(columns).mean(2)[:, None]
    dvar = 2 / WIDE(fold.count) * (deviation @ columns.swapaxes(1, 2))
    products = 2 / WIDE(fold.count) * (np.abs(deviation) @ np.abs(columns).swapaxes(1, 2))
    std, mean = (
        fold.statistic(kept).reshape(layer.groups, each, 1) for kept in (np.sqrt(of.var), of.mean)
    )
    of_dvar = {
        "matrices": by_filter(products),
        "statistics": by_filter(2 * size * std),
        "known": by_filter(2 * size * np.abs(mean) * np.finfo(DOUBLE).eps),  # of a single float64
    }
    return (
        Quantity(
            by_filter(columns.mean(2)[:, None]), {"matrices": by_filter(size)}, DOUBLE, DOUBLE
        ),
        Quantity(by_filter(dvar), of_dvar, x.dtype, DOUBLE),
    )


def iteration(
    x: Array, fold: Fold, axis: int, inputs: Array, filters: Array, layer: Layer
) -> tuple[Quantity, ...]:
    """What is kept of an iteration that is not empty, in float64."""
    of, exact = oracle.statistics(x, fold), filters.astype(WIDE)
    usable = fold.statistic(of.usable)
    var = fold.statistic(of.var)
    return (
        Quantity(exact, {"matrices": np.zeros(exact.shape)}, DOUBLE, DOUBLE),
        oracle.mean_of(of, fold, x.dtype),
        Quantity(var, {"statistics": unjudged(var, usable)}, x.dtype, DOUBLE),
        *derivatives(x, fold, axis, inputs, layer),
    )


class Averages(NamedTuple):
    """A mean and a variance over iterations, and the sizes of their errors."""

    mean: Array
    var: Array
    of_mean: dict[str, Array]
    of_var: dict[str, Array]


class Normalized(NamedTuple):
    """A forward pass."""

    y: Quantity
    mean: Quantity
    invstd: Quantity
    batch_mean: Quantity
    batch_var: Quantity


def _averages(of: oracle.Statistics, fold: Fold, filters: Array, window: Sequence[Any]) -> Averages:
    """Those of a batch and of the window's iterations, moved to the filters of now."""
    own_mean, own_var = fold.statistic(of.mean), fold.statistic(of.var)
    means, variances = [own_mean], [own_var]
    terms_of_mean, terms_of_var = np.abs(own_mean), own_var
    for entry in window:
        step = filters.astype(WIDE) - entry.filters.astype(WIDE)
        inner = tuple(range(1, step.ndim))
        shift, turn = (entry.dmean * step).sum(inner), (entry.dvar * step).sum(inner)
        means.append(entry.mean + shift)
        variances.append(np.maximum(entry.var + turn - shift**2, 0))
        size = np.abs(entry.dmean * step).sum(inner)
        terms_of_mean = terms_of_mean + np.abs(entry.mean) + size
        terms_of_var = terms_of_var + entry.var + np.abs(entry.dvar * step).sum(inner) + size**2
    k, mean = len(means), np.mean(means, 0)
    off = np.abs(np.array(means) - mean)
    var = np.mean(variances, 0) + np.mean(off**2, 0)
    std = np.sqrt(own_var)
    return Averages(
        mean,
        var,
        {"statistics": std / k, "matrices": terms_of_mean},
        {
            "statistics": (own_var + 2 * off[0] * std) / k,
            "matrices": terms_of_var + terms_of_mean * off.sum(0),
        },
    )


def normalized(
    x: Array,
    fold: Fold,
    filters: Array,
    window: Sequence[Any],
    weight: Array | None,
    bias: Array | None,
    eps: float,
) -> Normalized:
    """Of a batch that is not empty, with a window that is not."""
    of = oracle.statistics(x, fold)
    mean, var, of_mean, of_var = _averages(of, fold, filters, window)
    invstd = 1 / np.sqrt(var + WIDE(eps))
    usable = fold.statistic(of.usable) & oracle.moderate(fold.statistic(of.var), x.dtype)
    usable = usable & oracle.moderate(invstd, x.dtype)
    of_mean, of_var = (
        {kind: unjudged(size, usable) for kind, size in each.items()} for each in (of_mean, of_var)
    )
    y = oracle.evaluate(x, fold, mean, var, weight, bias, eps)
    y = oracle.by_statistics(y, x, fold, mean, var, weight, eps, (of_mean, of_var))
    of_sum = {**of_var, "matrices": of_var["matrices"] + var + WIDE(eps)}
    of_invstd = {kind: unjudged(size * invstd**3 / 2, usable) for kind, size in of_sum.items()}
    return Normalized(
        y,
        Quantity(mean, of_mean, x.dtype, DOUBLE),
        Quantity(invstd, of_invstd, x.dtype, DOUBLE),
        oracle.mean_of(of, fold, x.dtype),
        Quantity(
            fold.statistic(of.var),
            {"statistics": unjudged(fold.statistic(of.var), usable)},
            x.dtype,
            DOUBLE,
        ),
    )


def backward(
    dy: Array,
    x: Array,
    fold: Fold,
    mean: Array,
    invstd: Array,
    iterations: int,
    weight: Array | None,
) -> oracle.Gradients:
    """Through the share that the statistics of x have in those of all iterations."""
    whole = oracle.backward(dy, x, fold, mean, invstd, weight)
    beside = oracle.backward(dy, x, fold, mean, invstd, weight, constant=True)
    value = beside.dx.value + (whole.dx.value - beside.dx.value) / iterations
    sizes = {
        kind: np.asarray(size) + beside.dx.sizes.get(kind, 0)
        for kind, size in whole.dx.sizes.items()
    }
    return whole._replace(dx=whole.dx._replace(value=value, sizes=sizes))


def backward_of_layer(
    dy: Array, x: Array, fold: Fold, of: Normalized, iterations: int, weight: Array | None
) -> oracle.Gradients:
    """The same by statistics that are as far off as a forward pass may have made them."""
    found = backward(dy, x, fold, of.mean.value, of.invstd.value, iterations, weight)
    upstream, inverse = fold.fold(dy), fold.keep(of.invstd.value)
    xhat = (fold.fold(x) - fold.keep(of.mean.value)) * inverse
    g = np.abs(upstream * fold.place(weight, 1))
    shift = fold.keep(allowed(of.mean)) * inverse
    share = fold.keep(allowed(of.invstd)) / inverse
    steep, level = oracle.mean_over(g * np.abs(xhat), fold), oracle.mean_over(g, fold)
    by_shift = shift * inverse * (steep + (1 + np.abs(xhat)) * level)
    by_share = 2 * share * inverse * (g + level + np.abs(xhat) * steep)
    of_weight = fold.gather(np.abs(upstream) * (shift + np.abs(xhat) * share))
    return found._replace(
        dx=_more(found.dx, by_shift + by_share), dweight=_more(found.dweight, of_weight)
    )


def _more(quantity: Quantity, known: Array) -> Quantity:
    sizes = {**quantity.sizes, "known": quantity.sizes.get("known", 0) + known}
    return quantity._replace(sizes=sizes)
