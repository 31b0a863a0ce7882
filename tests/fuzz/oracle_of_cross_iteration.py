"""Cross-iteration batch normalization, written down once more from the paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fuzz import oracle
from fuzz.judge import DOUBLE, Quantity
from fuzz.oracle import WIDE, Array, Fold, unjudged


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
    y = oracle.evaluate(x, fold, mean, var, weight, bias, eps)
    slope = np.abs(fold.place(weight, 1)) * fold.keep(invstd)
    bend = slope * np.abs(fold.fold(x) - fold.keep(mean)) * fold.keep(invstd) ** 2 / 2
    sizes = dict(y.sizes)
    for kind in ("statistics", "matrices"):
        size = slope * fold.keep(of_mean[kind]) + bend * fold.keep(of_var[kind])
        sizes[kind] = unjudged(size, fold.keep(usable) != 0)
    of_sum = {**of_var, "matrices": of_var["matrices"] + var + WIDE(eps)}
    of_invstd = {kind: unjudged(size * invstd**3 / 2, usable) for kind, size in of_sum.items()}
    return Normalized(
        y._replace(sizes=sizes),
        Quantity(
            mean, {kind: unjudged(size, usable) for kind, size in of_mean.items()}, x.dtype, DOUBLE
        ),
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
