"""Batch normalization with a momentum that is learned, from what bnfast says of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fuzz import oracle
from fuzz.judge import DOUBLE, Quantity, allowed
from fuzz.oracle import WIDE, Array, Fold, moderate, unjudged

Sizes = dict[str, Array]


class Blended(NamedTuple):
    """What a batch makes of the running statistics, and the statistics of the batch: (C,) each."""

    mean: Array
    var: Array
    share: Array
    own_mean: Array
    own_std: Array
    mean_step: Array
    var_step: Array
    of_mean: Sizes
    of_var: Sizes
    of_mean_step: Sizes
    of_var_step: Sizes
    usable: Array
    count: int
    divisor: int
    running: tuple[Quantity, Quantity]


def blended(
    x: Array,
    fold: Fold,
    old: tuple[Array, Array],
    doubt: tuple[Array, Array],
    share: Array,
    unbiased: bool,
) -> Blended:
    """Of a batch that is not empty. The `doubt` is how far off the old statistics may be."""
    of = oracle.statistics(x, fold)
    usable = fold.statistic(of.usable) & moderate(fold.statistic(of.var), x.dtype)
    divisor = fold.count - unbiased
    std = np.sqrt(fold.statistic(of.var))
    own = fold.statistic(of.mean), fold.statistic(of.var) * fold.count / divisor
    errors = std, own[1]
    made, sizes, of_steps, running = [], [], [], []
    for before, new, error, off in zip(old, own, errors, doubt, strict=True):
        kept = np.where(share == 1, 0, (1 - share) * before.astype(WIDE))
        added = share * new
        rounding = np.finfo(DOUBLE).eps * (np.abs(kept) + np.abs(added))
        carried = np.where(share == 1, 0, (1 - share) * off)
        made.append(kept + added)
        sizes.append({"statistics": unjudged(share * error, usable), "known": rounding + carried})
        of_steps.append(
            {
                "statistics": unjudged(error, usable),
                "known": off + np.finfo(DOUBLE).eps * (np.abs(before) + np.abs(new)),
            }
        )
        of_running = {"running": np.abs(kept) + np.abs(added), "smallest": np.ones(kept.shape)}
        running.append(Quantity(made[-1], of_running | sizes[-1], x.dtype, before.dtype))
    steps = (new - before.astype(WIDE) for new, before in zip(own, old, strict=True))
    return Blended(
        *(*made, share, own[0], std, *steps, *sizes, *of_steps),
        *(usable, fold.count, divisor, tuple(running)),
    )


def doubts(running: tuple[Quantity, Quantity]) -> tuple[Array, Array]:
    """How far off running statistics may be."""
    return allowed(running[0]), allowed(running[1])


def normalized(
    x: Array, fold: Fold, of: Blended, weight: Array | None, bias: Array | None, eps: float
) -> Quantity:
    """The output, by the statistics that the batch has been blended into."""
    y = oracle.evaluate(x, fold, of.mean, of.var, weight, bias, eps)
    return oracle.by_statistics(y, x, fold, of.mean, of.var, weight, eps, (of.of_mean, of.of_var))


def backward(
    dy: Array, x: Array, fold: Fold, of: Blended, weight: Array | None, eps: float
) -> tuple[oracle.Gradients, Quantity]:
    """The gradients, and that of the logit of each channel."""
    invstd = 1 / np.sqrt(of.var + WIDE(eps))
    beside = oracle.backward(
        *(dy, x, fold, of.mean, invstd, weight), constant=True, mean_is_whole=x.dtype != DOUBLE
    )
    upstream, inverse = fold.fold(dy), fold.keep(invstd)
    g, xhat = upstream * fold.place(weight, 1), (fold.fold(x) - fold.keep(of.mean)) * inverse

    def total(array: Array) -> Array:
        return fold.statistic(array.sum(fold.over, keepdims=True))

    dmean, dvar = -invstd * total(g), -(invstd**2) / 2 * total(g * xhat)
    sound = np.isfinite(total(fold.fold(x) * 0 + g * 0)) & of.usable
    for number in (invstd, dmean, dvar, of.mean_step, of.var_step):
        sound = sound & moderate(number, x.dtype)
    # How far off invstd may be, relative to itself, by each kind of error of the variance.
    relative = {kind: size * invstd**2 for kind, size in of.of_var.items()}
    terms, products = total(np.abs(g)), total(np.abs(g * xhat))
    of_dmean = {kind: invstd * terms * size for kind, size in relative.items()}
    of_dvar = {
        kind: invstd**2 / 2 * (products * size + terms * invstd * of.of_mean[kind])
        for kind, size in relative.items()
    }
    of_dmean["sums"], of_dvar["sums"] = invstd * terms, invstd**2 / 2 * products
    deviation = fold.fold(x) - fold.keep(of.own_mean)
    level, slope = of.share / of.count, 2 * of.share / of.divisor
    dx = fold.fold(beside.dx.value)
    dx = dx + fold.keep(level * dmean) + fold.keep(slope * dvar) * deviation
    own, dx_sizes = np.abs(deviation) + fold.keep(of.own_std), dict(beside.dx.sizes)
    for kind in of_dmean:
        size = fold.keep(level * of_dmean[kind]) + fold.keep(slope * of_dvar[kind]) * own
        if kind in relative:
            size = size + np.abs(inverse * g) * fold.keep(relative[kind])
        if kind == "known":  # what one float64 holds of the mean of the batch
            lost = np.finfo(DOUBLE).eps * np.abs(of.own_mean)
            size = size + fold.keep(slope * np.abs(dvar) * lost)
        name = "dx" if kind == "sums" else kind
        dx_sizes[name] = dx_sizes.get(name, 0) + unjudged(size, fold.keep(sound) != 0)
    dweight_sizes = dict(beside.dweight.sizes)
    for kind in relative:
        size = np.abs(upstream) * inverse * fold.keep(of.of_mean[kind])
        size = size + np.abs(upstream * xhat) * fold.keep(relative[kind])
        dweight_sizes[kind] = dweight_sizes.get(kind, 0) + fold.gather(size)
    gradients = oracle.Gradients(
        beside.dx._replace(value=dx, sizes=dx_sizes),
        beside.dweight._replace(sizes=dweight_sizes),
        beside.dbias,
    )
    return gradients, _of_logit(of, (dmean, dvar), (of_dmean, of_dvar), sound, x.dtype)


def _of_logit(
    of: Blended,
    derivatives: tuple[Array, Array],
    sizes: tuple[Sizes, Sizes],
    sound: Array,
    dtype: np.dtype,
) -> Quantity:
    """Of a first batch, which is blended with nothing, there is none."""
    slope = of.share * (1 - of.share)
    steps, of_steps = (of.mean_step, of.var_step), (of.of_mean_step, of.of_var_step)
    value, found = np.zeros(slope.shape, WIDE), {}
    for derivative, step, size, of_step in zip(derivatives, steps, sizes, of_steps, strict=True):
        value = value + derivative * step
        for kind in size:
            more = size[kind] * np.abs(step) + np.abs(derivative) * of_step.get(kind, 0)
            found[kind] = found.get(kind, 0) + unjudged(more, sound)
    first = slope == 0
    found = {kind: np.where(first, 0, slope * size) for kind, size in found.items()}
    return Quantity(np.where(first, 0, slope * value), found, dtype, DOUBLE)
