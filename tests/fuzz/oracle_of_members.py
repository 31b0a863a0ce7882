"""What members of the family do besides normalizing: floors, corrections, filters, vectors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fuzz.judge import DOUBLE, Quantity, arithmetic
from fuzz.oracle import (
    LARGE_MEAN,
    WIDE,
    Array,
    Fold,
    Gradients,
    backward,
    forward,
    is_rounded,
    mean_of,
    mean_over,
    moderate,
    of_filters,
    of_planes,
    statistics,
    sums_of,
    unjudged,
)

NEAR = 1e-5  # of two numbers of which the larger counts: so near that rounding may choose


# Filter response normalization


def response(
    x: Array,
    axis: int,
    weight: Array | None,
    bias: Array | None,
    tau: Array | None,
    eps: float,
    learned_eps: Array | None,
) -> tuple[Quantity, Quantity]:
    """max(weight * x / sqrt(mean(x**2) + eps + |learned_eps|) + bias, tau), and the inverse."""
    fold = of_planes(x.shape, axis)
    more = _of_each(learned_eps, x.shape[axis])
    y, _, inverse, _ = forward(x, fold, weight, bias, eps, False, more)
    if tau is None:
        return y, inverse
    floor = fold.place(tau, 0)
    sizes = {**y.sizes, "output": y.sizes["output"] + np.abs(floor)}
    return y._replace(value=np.maximum(y.value, floor), sizes=sizes), inverse


def _of_each(learned_eps: Array | None, channels: int) -> Array | None:
    return None if learned_eps is None else np.broadcast_to(learned_eps, (channels,))


def response_backward(
    dy: Array,
    x: Array,
    axis: int,
    invrms: Array,
    weight: Array | None,
    bias: Array | None,
    tau: Array | None,
    learned_eps: Array | None,
) -> tuple[Quantity, Quantity, Quantity, Quantity | None, Quantity | None]:
    fold = of_planes(x.shape, axis)
    result = arithmetic(x.dtype) if weight is None else weight.dtype
    wide, inverse = fold.fold(x), fold.keep(invrms)
    xhat, factor = wide * inverse, fold.place(weight, 1)
    shift, kept, doubtful = fold.place(bias, 0), None, np.zeros(x.shape, bool)
    if tau is not None:
        y, floor = factor * xhat + shift, fold.place(tau, 0)
        kept = y >= floor
        size = np.abs(factor) * np.maximum(1, np.abs(xhat)) + np.abs(shift) + np.abs(floor)
        precision = NEAR if arithmetic(x.dtype) == np.float32 else NEAR * 1e-8
        doubtful = ~(np.abs(y - floor) > precision * size)
        doubtful = doubtful | ~moderate(factor * inverse, x.dtype)
    found = backward(dy, x, fold, None, invrms, weight, dtype=result, kept=kept)
    cell = doubtful.any(fold.over, keepdims=True) if fold.over else doubtful
    channel = fold.gather(cell.astype(WIDE)) > 0
    dx = _doubted(found.dx, np.broadcast_to(cell, x.shape))
    dweight, dbias = (_doubted(part, channel) for part in found[1:])
    dtau = dlearned = None
    if tau is not None:
        below = np.where(kept, 0, fold.fold(dy))
        sizes = {"sums": fold.gather(np.abs(fold.fold(dy)))}
        dtau = _doubted(Quantity(fold.gather(below), sizes, x.dtype, tau.dtype), channel)
    if learned_eps is not None:
        g = fold.fold(dy) * factor * (1 if kept is None else kept)
        terms = inverse**2 / 2 * g * xhat
        sign = np.sign(_of_each(learned_eps, x.shape[axis]).astype(WIDE))
        value, size = -sign * fold.gather(terms), fold.gather(np.abs(terms))
        usable = np.isfinite(dweight.sizes["sums"]) & ~channel & moderate(size, x.dtype)
        lost = fold.gather(inverse**2 * (1 + np.abs(factor)) * (1 + np.abs(xhat)))
        sizes = {"sums": unjudged(size, usable), "smallest": lost}
        if learned_eps.shape != value.shape or len(learned_eps) == 1 != x.shape[axis]:
            value = value.sum(keepdims=True)
            sizes = {kind: size.sum(keepdims=True) for kind, size in sizes.items()}
        dlearned = Quantity(value, sizes, x.dtype, learned_eps.dtype)
    return dx, dweight, dbias, dtau, dlearned


def _doubted(quantity: Quantity, doubtful: Array) -> Quantity:
    sizes = {kind: unjudged(size, ~doubtful) for kind, size in quantity.sizes.items()}
    return quantity._replace(sizes=sizes)


# Batch renormalization


class Corrected(NamedTuple):
    """Forward: y, what was saved of the batch, and sigma."""

    y: Quantity
    mean: Quantity
    invstd: Quantity
    r: Quantity
    d: Quantity
    sigma: Array


def corrected(
    x: Array,
    fold: Fold,
    running_mean: Array,
    running_std: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    r_max: float,
    d_max: float,
) -> Corrected:
    plain = forward(x, fold, None, None, eps)
    mean, std = running_mean.astype(WIDE), running_std.astype(WIDE)
    sigma, usable = 1 / plain.invstd.value, np.isfinite(plain.invstd.sizes["statistics"])
    with np.errstate(all="ignore"):
        r = np.clip(sigma / std, 1 / WIDE(r_max), r_max)
        d = np.clip((plain.mean.value - mean) / std, -d_max, d_max)
        steps = fold.statistic(np.sqrt(plain.of.var)) / std + np.abs(d)
    kept_r, kept_d = fold.keep(r), fold.keep(d)
    xhat = fold.fold(x) * 0 + plain.of.deviation / fold.keep(sigma)
    factor, shift = fold.place(weight, 1), fold.place(bias, 0)
    size = np.abs(factor) * (kept_r * np.maximum(1, np.abs(xhat)) + np.abs(kept_d)) + np.abs(shift)
    size = size + np.abs(factor) * fold.keep(steps)
    good = (fold.keep(usable) > 0) & moderate(factor * kept_r / fold.keep(sigma), x.dtype)
    sizes = {
        "output": unjudged(size, np.broadcast_to(good, size.shape)),
        "smallest": 1 + np.abs(plain.of.deviation),
    }
    y = Quantity(factor * (xhat * kept_r + kept_d) + shift, sizes, x.dtype, x.dtype)
    saved = (
        Quantity(r, {"statistics": unjudged(2 * r, usable)}, x.dtype, DOUBLE),
        Quantity(d, {"statistics": unjudged(2 * steps, usable)}, x.dtype, DOUBLE),
    )
    return Corrected(y, plain.mean, plain.invstd, *saved, sigma)


def corrected_backward(
    dy: Array,
    x: Array,
    fold: Fold,
    mean: Array,
    invstd: Array,
    r: Array,
    d: Array,
    weight: Array | None,
) -> Gradients:
    """Of constants r and d: as batch normalization with the weight r * weight."""
    result = arithmetic(x.dtype) if weight is None else weight.dtype
    both = r.astype(WIDE) * (1 if weight is None else weight.astype(WIDE))
    dx, _, _ = backward(dy, x, fold, mean, invstd, both)
    _, plain, dbias = backward(dy, x, fold, mean, invstd, None, dtype=result)
    return Gradients(dx, sums_of(plain, r.astype(WIDE), dbias, d.astype(WIDE)), dbias)


# Weights


def lengths(v: Array, dim: int | None) -> Quantity:
    fold = of_filters(v.shape, dim)
    norm = np.sqrt((fold.fold(v) ** 2).sum(fold.over, keepdims=True))
    kept = norm.reshape(-1)  # a single one without `dim`
    return Quantity(kept, {"statistics": kept}, v.dtype, DOUBLE)


def with_lengths(v: Array, g: Array, dim: int | None, eps: float) -> Quantity:
    """g * v / max(||v||, eps)."""
    fold = of_filters(v.shape, dim)
    norm = np.maximum(fold.keep(lengths(v, dim).value), WIDE(eps))
    with np.errstate(all="ignore"):
        factor = fold.keep(g) / norm
        value = factor * fold.fold(v)
    good = moderate(factor, v.dtype) & (norm > 0)
    sizes = {"output": unjudged(np.abs(value), np.broadcast_to(good, v.shape))}
    return Quantity(value, {**sizes, "smallest": 1 + np.abs(fold.fold(v))}, v.dtype, v.dtype)


def with_lengths_backward(
    dw: Array, v: Array, g: Array, norm: Array, dim: int | None, eps: float
) -> tuple[Quantity, Quantity]:
    fold = of_filters(v.shape, dim)
    upstream, wide, length, given = fold.fold(dw), fold.fold(v), fold.keep(norm), fold.keep(g)
    short = length < WIDE(eps)
    products = (upstream * wide).sum(fold.over, keepdims=True)
    terms = np.abs(upstream * wide).sum(fold.over, keepdims=True)
    with np.errstate(all="ignore"):
        divisor = np.where(short, WIDE(eps), length)
        slope = np.where(short, 0, products / length**2)
        steep = np.where(short, 0, terms / length**2)
        factor = given / divisor
        dv, size = factor * (upstream - wide * slope), np.abs(factor)
        size = size * (np.abs(upstream) + np.abs(wide) * steep)
        dg, size_of_g = products / divisor, terms / divisor
    good = moderate(divisor, v.dtype) & moderate(factor, v.dtype) & (divisor > 0)
    good = good & moderate(np.abs(upstream).max(fold.over, keepdims=True, initial=0), v.dtype)
    with np.errstate(all="ignore"):
        lost = (1 + np.abs(factor)) * (1 + np.abs(wide) / divisor) * (1 + 1 / divisor)
    gain = {"sums": unjudged(size_of_g, good), "smallest": fold.count * (1 + 1 / divisor)}
    return (
        Quantity(
            dv,
            {"dx": unjudged(size, np.broadcast_to(good, dv.shape)), "smallest": lost},
            v.dtype,
            v.dtype,
        ),
        Quantity(
            fold.statistic(dg).reshape(g.shape),
            {kind: (0 * dg + part).reshape(g.shape) for kind, part in gain.items()},
            v.dtype,
            g.dtype,
        ),
    )


class Rule(NamedTuple):
    """How filters are standardized: by what they are divided, and what depends on them of it."""

    eps: float
    inside: bool = True
    unbiased: bool = False
    gamma: float | None = None  # of the scaled rule
    floor: bool = True


def _divisor(rule: Rule, std: Array, count: int) -> tuple[Array, Array, Array]:
    """The divisor D, q such that dD follows from sum(dy * c) / q, and where rounding chooses."""
    eps, var = WIDE(rule.eps), std**2
    doubtful = np.zeros(std.shape, bool)
    with np.errstate(all="ignore"):
        if rule.gamma is not None:
            gamma = WIDE(rule.gamma)
            if rule.floor:
                total = count * var
                doubtful = np.abs(total - eps) <= NEAR * eps
                over = np.where(total > eps, total, np.inf)
                return np.sqrt(np.maximum(total, eps)) / gamma, over, doubtful
            return np.sqrt(count * (var + eps)) / gamma, count * (var + eps), doubtful
        fewer = count - 1 if rule.unbiased else count
        if rule.inside:
            return np.sqrt(var + eps), fewer * (var + eps), doubtful
        return std + eps, fewer * std * (std + eps), doubtful


def centralized(w: Array, axis: int) -> tuple[Quantity, Quantity]:
    """The weights without the mean of their filter, and that."""
    fold = of_filters(w.shape, axis)
    of = statistics(w, fold)
    size = np.maximum(np.abs(of.deviation), np.sqrt(of.var))
    sizes = {"output": unjudged(size, np.broadcast_to(of.usable, size.shape))}
    y = Quantity(of.deviation, {**sizes, "smallest": 1 + 0 * size}, w.dtype, w.dtype)
    return y, mean_of(of, fold, w.dtype)


def standardized(
    w: Array, axis: int, gain: Array | None, rule: Rule
) -> tuple[Quantity, Quantity, Quantity]:
    """The weights, and mean and std of each filter."""
    fold = of_filters(w.shape, axis)
    of = statistics(w, fold)
    std = np.sqrt(of.var * (fold.count / (fold.count - 1) if rule.unbiased else 1))
    divisor, _, _ = _divisor(rule, std, fold.count)
    factor = fold.place(gain, 1)
    with np.errstate(all="ignore"):
        scale = factor / divisor
        value = scale * of.deviation
        size = np.abs(scale) * np.maximum(np.abs(of.deviation), std)
    good = of.usable & (divisor > 0) & moderate(scale, w.dtype) & moderate(std, w.dtype)
    size = unjudged(size, np.broadcast_to(good, size.shape))
    sizes = {"output": size, "smallest": 1 + np.abs(of.deviation)}
    kept = fold.statistic(unjudged(std, of.usable))
    return (
        Quantity(value, sizes, w.dtype, w.dtype),
        mean_of(of, fold, w.dtype),
        Quantity(fold.statistic(std), {"statistics": kept}, w.dtype, DOUBLE),
    )


def standardized_backward(
    dy: Array, w: Array, axis: int, mean: Array, std: Array, gain: Array | None, rule: Rule
) -> tuple[Quantity, Quantity]:
    fold = of_filters(w.shape, axis)
    result = w.dtype if gain is None else gain.dtype
    of, deviation = statistics(w, fold), fold.keep(std)
    given = fold.keep(mean)
    near = is_rounded(of.mean, given)
    c = np.where(near & (w.dtype == DOUBLE), of.deviation, fold.fold(w) - given)
    divisor, spread, doubtful = _divisor(rule, deviation, fold.count)
    upstream, factor = fold.fold(dy), fold.place(gain, 1)
    products, terms = upstream * c, np.abs(upstream * c)
    with np.errstate(all="ignore"):
        scale = factor / divisor
        slope, steep = (part.sum(fold.over, keepdims=True) / spread for part in (products, terms))
        dw = scale * (upstream - mean_over(upstream, fold) - c * slope)
        size = np.abs(upstream) + mean_over(np.abs(upstream), fold)
        # The mean is known to a rounding of the deviation.
        more = np.abs(c) * np.abs(upstream).sum(fold.over, keepdims=True) * deviation / spread
        size = np.abs(scale) * (size + np.abs(c) * steep + more)
        # Where the mean is small beside the divisor, eps included, what rounding left of it may be
        # found again or not.
        small = np.abs(given) * np.sqrt(fold.count / spread) <= LARGE_MEAN
        unknown = np.where(near & small, np.abs(of.mean - given), 0)
        level = np.abs(upstream).sum(fold.over, keepdims=True)
        off = np.abs(scale) * unknown * (np.abs(c) * level / spread + steep)
        dgain = products.sum(fold.over, keepdims=True) / divisor
        of_gain = terms + np.abs(upstream) * deviation
        lost = (1 + np.abs(scale)) * (1 + 1 / divisor) * (1 + np.abs(c) / divisor)
        lost = lost * (1 + (np.abs(c) / divisor).max(fold.over, keepdims=True, initial=0))
    largest = np.abs(upstream).max(fold.over, keepdims=True, initial=0)
    # A filter whose values are all equal has no deviations from a mean that is not theirs.
    good = of.usable & ~doubtful & (divisor > 0) & (near | (deviation > 0))
    with np.errstate(all="ignore"):
        steepest = np.abs(c).max(fold.over, keepdims=True, initial=0) / divisor
    for number in (divisor, scale, largest, given, deviation, steepest):
        good = good & moderate(number, w.dtype)
    good = good & (np.isinf(spread) | moderate(spread, DOUBLE) & (spread > 0))
    sizes = {"dx": unjudged(size, np.broadcast_to(good, size.shape)), "smallest": lost}
    sizes["known"] = off
    gains = {
        "known": level * unknown / divisor,
        "sums": unjudged(of_gain.sum(fold.over, keepdims=True) / divisor, good),
        "smallest": fold.count * (1 + 1 / divisor),
    }
    return (
        Quantity(dw, sizes, w.dtype, w.dtype),
        Quantity(
            fold.statistic(dgain),
            {kind: fold.statistic(part + 0 * dgain) for kind, part in gains.items()},
            w.dtype,
            result,
        ),
    )


# Spectral normalization, of weights of moderate size


class Divided(NamedTuple):
    """Forward: y, sigma, u and v."""

    y: Quantity
    sigma: Quantity
    u: Quantity
    v: Quantity


def matrix(w: Array, dim: int) -> Array:
    """A row for each index of `dim`."""
    moved = np.moveaxis(w.astype(WIDE), dim, 0)
    return moved.reshape(moved.shape[0], int(np.prod(moved.shape[1:])))


def divided(
    w: Array, u: Array, v: Array, iterations: int, eps: float, dim: int, v_first: bool
) -> Divided:
    rows, left, right = matrix(w, dim), u.astype(WIDE), v.astype(WIDE)
    largest = np.sqrt((rows**2).sum())
    # How far a length may be below that of the whole matrix: its rounding is that of large terms.
    condition, usable = WIDE(1), bool(largest > 0)

    def improved(product: Array, from_: Array) -> Array:
        nonlocal condition, usable
        length = np.sqrt((product**2).sum())
        with np.errstate(all="ignore"):
            condition = np.maximum(condition, largest * np.sqrt((from_**2).sum()) / length)
        usable &= bool(length > 1e3 * eps)
        return product / np.maximum(length, WIDE(eps))

    for _ in range(iterations):
        if v_first:
            right = improved(rows.T @ left, left)
            left = improved(rows @ right, right)
        else:
            left = improved(rows @ right, right)
            right = improved(rows.T @ left, left)
    sigma = left @ (rows @ right)
    spread = largest * np.sqrt((left**2).sum()) * np.sqrt((right**2).sum())
    usable &= bool(np.abs(sigma) > 1e3 * eps) and bool(condition < 1e6)
    usable &= bool(1e-6 < largest < 1e6) and bool(spread < 1e6 * np.abs(sigma)) and bool(sigma > 0)
    condition = np.where(usable, condition * (1 + iterations) * np.sqrt(rows.size), np.inf)
    with np.errstate(all="ignore"):
        y = w.astype(WIDE) / sigma
        off = condition * spread / np.abs(sigma)
        of_y = {"matrices": unjudged(np.abs(y) * off, usable), "rounding": np.abs(y)}
        of_sigma = {"matrices": np.asarray(unjudged(condition * spread, usable))}
    return Divided(
        Quantity(y, {**of_y, "smallest": np.ones(y.shape)}, w.dtype, w.dtype),
        Quantity(np.asarray(sigma), of_sigma, w.dtype, DOUBLE),
        Quantity(left, {"matrices": np.full(left.shape, condition)}, w.dtype, DOUBLE),
        Quantity(right, {"matrices": np.full(right.shape, condition)}, w.dtype, DOUBLE),
    )


def divided_backward(
    dy: Array, w: Array, sigma: float, u: Array, v: Array, eps: float, dim: int
) -> Quantity:
    """(dy - <dy, w / sigma> u v.T) / sigma."""
    if not w.size:
        return Quantity(w.astype(WIDE), {}, w.dtype, w.dtype)
    rows, upstream = matrix(w, dim), matrix(dy, dim)
    outer, scale = np.outer(u.astype(WIDE), v.astype(WIDE)), WIDE(sigma)
    largest = np.sqrt((rows**2).sum())
    usable = bool(sigma > 1e3 * eps) and bool(1e-6 < largest < 1e6)
    usable &= bool(sigma > 1e-6 * largest)
    usable &= bool(moderate(np.abs(upstream).max(initial=0), w.dtype))
    with np.errstate(all="ignore"):
        inner, size = (upstream * rows).sum() / scale, np.abs(upstream * rows).sum() / scale
        dw = (upstream - inner * outer) / scale
        sizes = {
            "dx": unjudged((np.abs(upstream) + size * np.abs(outer)) / np.abs(scale), usable),
            "smallest": (1 + size + np.abs(outer)) * (1 + 1 / np.abs(scale)) + 0 * dw,
        }
    moved = np.moveaxis(w, dim, 0).shape

    def back(array: Array) -> Array:
        return np.moveaxis(array.reshape(moved), 0, dim)

    return Quantity(back(dw), {kind: back(s) for kind, s in sizes.items()}, w.dtype, w.dtype)
