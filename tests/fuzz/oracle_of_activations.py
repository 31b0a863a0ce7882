"""Gradients through an activation and a residual, and of layers that have their output alone.

What goes through is dz = dy * activation'(z). Where z is within its rounding of a kink, the slope
of either side is right; all that follows from dz has room for both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fuzz import oracle
from fuzz.judge import DOUBLE, Quantity, arithmetic, limits_of, promised
from fuzz.oracle import WIDE, Array, Fold
from tolerances import eps_of

# Where a derivative jumps; that of silu does nowhere. How steep it is elsewhere, at most, and how
# many roundings of 1 it has besides those of z.
KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0)}
STEEPNESS = {"silu": 0.5, "hardswish": 1 / 3}
ROUNDINGS_OF_CURVES = 4

# z of an output in place is a quotient; z - bias is divided once more.
ROUNDINGS_OF_XHAT = 4


def slope_at(z: Array, name: str, negative_slope: Any) -> Array:
    """The derivative of an activation, as PyTorch has it."""
    if name == "leaky_relu":
        return np.where(z > 0, WIDE(1), WIDE(negative_slope))
    if name == "silu":
        sigmoid = 1 / (1 + np.exp(-z))
        return sigmoid * (1 + z * (1 - sigmoid))
    if name == "hardswish":
        return np.where(z <= -3, WIDE(0), np.where(z < 3, z / 3 + WIDE(0.5), WIDE(1)))
    open_gate = (z > 0) & (z < 6) if name == "relu6" else z > 0
    return np.where(open_gate, WIDE(1), WIDE(0))


class Through(NamedTuple):
    """dz, and how far off it may be."""

    dz: Array
    off: Array


def through(dy: Array, z: Array, off: Array, fused: dict[str, Any], precision: np.dtype) -> Through:
    """What of dy goes through an activation of z, which is as far off as that."""
    name = fused["activation"]
    negative_slope = precision.type(fused["negative_slope"])
    slope, eps = slope_at(z, name, negative_slope), eps_of(precision)
    jump = {"hardswish": 0.5, "leaky_relu": abs(1 - float(negative_slope))}.get(name, 1.0)
    doubtful = np.zeros(z.shape, bool)
    for kink in KINKS.get(name, ()):
        doubtful |= (np.abs(z - kink) <= off) & (off > 0)
    slope_off = np.where(doubtful, jump, 0.0)
    if name in STEEPNESS:
        slope_off = slope_off + np.minimum(STEEPNESS[name] * off, 1.5) + ROUNDINGS_OF_CURVES * eps
    upstream = np.asarray(dy).astype(WIDE)
    dz = upstream * slope
    rounding = eps * np.abs(dz) if name == "leaky_relu" else 0
    return Through(dz, oracle.unjudged(np.abs(upstream) * slope_off + rounding, ~np.isnan(z)))


def _center(fold: Fold, mean: Array | None, inverse: Array) -> Array:
    return np.zeros_like(inverse) if mean is None else fold.keep(mean)


def _activated_input(
    x: Array,
    fold: Fold,
    mean: Array | None,
    invstd: Array,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
) -> tuple[Array, Array]:
    """z as a gradient makes it again, and how far off it may be."""
    precision = arithmetic(x.dtype)
    inverse, factor, shift = fold.keep(invstd), fold.place(weight, 1), fold.place(bias, 0)
    center = _center(fold, mean, inverse)
    deviation = fold.fold(x) - center
    largest = np.finfo(precision).max / 4
    usable = (np.abs(fold.fold(x)) <= largest) & (np.abs(center) <= largest) & (inverse > 0)
    z, sizes = oracle.scaled(fold, deviation, inverse, factor, shift, usable, x.dtype)
    off = eps_of(precision) * np.abs(z)
    for kind, size in sizes.items():
        unit = Quantity(z, {}, x.dtype, x.dtype)
        off = off + size * promised(kind, unit)
    if precision == DOUBLE:  # the mean is rounded to float64, and nothing is wider
        off = off + np.abs(center * inverse * factor) * eps_of(DOUBLE)
    off = oracle.unjudged(off, np.isfinite(off))
    exact = deviation == 0
    if mean is not None and mean.dtype == WIDE:  # not a mean that was given
        exact = exact.all(fold.over, keepdims=True)
    exact = exact & usable & oracle.moderate(inverse, x.dtype)
    z = np.where(exact, np.broadcast_to(shift, z.shape).astype(precision).astype(WIDE), z)
    z, off = (fold.unfold(part) for part in (z, np.where(exact, 0, off)))
    if residual is None:
        return z, off
    total = z + np.asarray(residual).astype(WIDE)
    return total, off + eps_of(precision) * np.abs(total)


def _with_more(quantity: Quantity, off: Array) -> Quantity:
    """With an error that may be there besides."""
    return quantity._replace(
        sizes={**quantity.sizes, "known": quantity.sizes.get("known", 0) + off}
    )


def _of_x(off: Array, xhat: Array, fold: Fold, constant: bool) -> Array:
    """What errors of weight * dz make of those of dx, without invstd."""
    if constant:
        return off
    return off + oracle.mean_over(off, fold) + xhat * oracle.mean_over(off * xhat, fold)


def backward(
    dy: Array,
    x: Array,
    fold: Fold,
    mean: Array | None,
    invstd: Array,
    weight: Array | None,
    bias: Array | None,
    fused: dict[str, Any],
    *,
    constant: bool = False,
    dtype: np.dtype | None = None,
) -> dict[str, Quantity]:
    """The gradients of an input, of parameters, and of a residual where there was one.

    `fused` has the arguments of a gradient: with `y` that alone says what goes through. What is not
    centred has no mean.
    """
    residual, y = fused.get("residual"), fused.get("y")
    keeps, precision = residual is not None and residual is not False, arithmetic(x.dtype)
    given = x, fold, mean, invstd, weight
    if fused.get("activation") is None:
        found = oracle.backward(dy, *given, constant=constant, dtype=dtype)._asdict()
        whole = Quantity(np.asarray(dy).astype(WIDE), {}, precision, x.dtype)
        return {**found, "dresidual": whole} if keeps else found
    if y is None:
        z, off = _activated_input(*given, bias, residual if keeps else None)
    else:
        z, off = y.astype(WIDE), np.zeros(y.shape, WIDE)
    dz, off = through(dy, z, off, fused, precision)
    found = oracle.backward(dz, *given, constant=constant, dtype=dtype)
    folded, inverse, factor = fold.fold(off), fold.keep(invstd), fold.place(weight, 1)
    xhat = np.abs((fold.fold(x) - _center(fold, mean, inverse)) * inverse)
    before_dx = folded
    if keeps and x.dtype != precision:  # dx is made of what is rounded to 16 bits
        limits = limits_of(x.dtype)
        rounding = np.abs(dz) * float(limits.eps) + float(limits.smallest_subnormal)
        before_dx = folded + fold.fold(oracle.unjudged(rounding, np.abs(dz) < float(limits.max)))
    of_x = np.abs(inverse) * _of_x(before_dx * np.abs(factor), xhat, fold, constant)
    smallest = np.ones(off.shape, WIDE)
    made = {
        "dx": _with_more(found.dx, fold.unfold(of_x)),
        "dweight": _with_more(found.dweight, fold.gather(folded * xhat)),
        "dbias": _with_more(found.dbias, fold.gather(folded)),
    }
    if keeps:
        sizes = {"known": off, "smallest": smallest}
        made["dresidual"] = Quantity(dz, sizes, precision, x.dtype)
    return made


def backward_of_output(
    dy: Array,
    y: Array,
    fold: Fold,
    invstd: Quantity,
    weight: Array | None,
    bias: Array | None,
    fused: dict[str, Any],
    *,
    constant: bool,
) -> dict[str, Quantity]:
    """The gradients of a layer in place, whose z and xhat are what y says they were."""
    precision = arithmetic(y.dtype)
    z, dz, off = y.astype(WIDE), dy.astype(WIDE), np.zeros(y.shape, WIDE)
    if fused["activation"] is not None:
        dz, off = through(dy, z, off, fused, precision)
        z = np.where(z > 0, z, z / WIDE(precision.type(fused["negative_slope"])))
    factor, shift, inverse = fold.place(weight, 1), fold.place(bias, 0), fold.keep(invstd.value)
    scale = factor * inverse
    xhat = (z - shift) / factor
    of_xhat = ROUNDINGS_OF_XHAT * eps_of(precision) * (np.abs(xhat) + np.abs(shift / factor))
    sizes, absolute = np.abs(dz), np.abs(xhat)
    products, steep = dz * xhat, oracle.mean_over(np.abs(dz * xhat), fold)
    dx, terms, known = dz, sizes, _of_x(off, absolute, fold, constant)
    if not constant:
        dx = dz - oracle.mean_over(dz, fold) - xhat * oracle.mean_over(products, fold)
        terms = sizes + oracle.mean_over(sizes, fold) + absolute * steep
        known = known + of_xhat * steep + absolute * oracle.mean_over(sizes * of_xhat, fold)
    dx, terms, known = dx * scale, terms * np.abs(scale), known * np.abs(scale)
    most, largest = (
        oracle.LARGEST_FACTOR[precision],
        np.abs(dz).max(fold.over, keepdims=True, initial=0),
    )
    good = np.isfinite(z) & (absolute < most)
    for number in (inverse, factor, 1 / factor, scale, shift, largest):
        good = good & oracle.moderate(number, precision)
    of_statistics = fold.keep(invstd.sizes["statistics"]) * np.abs(factor)
    smallest = 1 + np.abs(scale) * (1 + absolute) * (1 + sizes)
    of_dx = {
        "dx": oracle.unjudged(terms, good),
        "known": known,
        "statistics": of_statistics * terms / np.abs(scale),
        "smallest": smallest,
    }
    of_dweight = {
        "sums": fold.gather(oracle.unjudged(sizes * absolute, good)),
        "known": fold.gather(off * absolute + sizes * of_xhat),
        "smallest": fold.gather(smallest),
    }
    of_dbias = {"sums": fold.gather(sizes), "known": fold.gather(off)}
    kind = precision if weight is None else weight.dtype
    return {
        "dx": Quantity(dx, of_dx, precision, y.dtype),
        "dweight": Quantity(fold.gather(products), of_dweight, precision, kind),
        "dbias": Quantity(fold.gather(dz), of_dbias, precision, kind),
    }
