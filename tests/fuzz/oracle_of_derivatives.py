"""Derivatives besides the backward pass, written down once more: along a direction, and of it.

With the symbols of ``oracle.backward``, and J(u) what makes dx of weight * dy there, the gradients
of a loss by dy, x and weight follow from those by dx, dweight and dbias (ddx, ddweight, ddbias)::

    ddy     = weight * J(ddx) + ddweight * xhat + ddbias
    dx      = J(dy * ddweight - invstd * (g * mean(ddx * xhat) + ddx * mean(g * xhat)))
              - invstd * xhat * mean(g * J(ddx))            where g = weight * dy
    dweight = sum(dy * J(ddx))

Where the statistics are constants, J(u) = invstd * u, and dx = J(dy * ddweight).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fuzz import oracle
from fuzz.judge import Quantity
from fuzz.oracle import Array, Fold, mean_over, moderate, unjudged

# Roundings to the dtype of the data, one after the other, each with the promise of a gradient.
OF_DX = 4


class Derivatives(NamedTuple):
    """What a double backward pass returns."""

    ddy: Quantity
    dx: Quantity
    dweight: Quantity


def along(gradient: Quantity, fold: Fold, weight: Array | None) -> Quantity:
    """The derivative along a direction, of what backward makes of the direction without weight."""
    if weight is None:
        return gradient
    placed = fold.place(weight.astype(gradient.precision), 1)
    factor = fold.unfold(np.broadcast_to(placed, fold.folded_shape()))
    value = gradient.value * factor
    good = moderate(factor, gradient.precision)
    sizes = {kind: unjudged(size * np.abs(factor), good) for kind, size in gradient.sizes.items()}
    sizes |= {"rounding": np.abs(value), "smallest": 1 + sizes["smallest"]}
    return gradient._replace(value=value, sizes=sizes)


class _Terms(NamedTuple):
    """The three formulas, of numbers or of sizes."""

    ddy: Array
    dx: Array
    dweight: Array  # not yet summed


def _formulas(
    fold: Fold,
    upstream: tuple[Array, Array, Array],
    dy: Array,
    xhat: Array,
    invstd: Array,
    weight: Array,
    centred: bool,
    constant: bool,
    sign: int,
) -> _Terms:
    """The formulas, or with sign 1, and of absolute values, the sizes of their terms."""
    ddx, ddweight, ddbias = upstream

    def jacobian(u: Array) -> Array:
        found = u
        if not constant:
            found = found + sign * xhat * mean_over(u * xhat, fold)
            found = found + sign * mean_over(u, fold) if centred else found
        return invstd * found

    g, of_ddx = weight * dy, jacobian(ddx)
    inner, after = dy * ddweight, np.zeros_like(invstd)
    if not constant:
        products = mean_over(ddx * xhat, fold), mean_over(g * xhat, fold)
        inner = inner + sign * invstd * (g * products[0] + ddx * products[1])
        after = invstd * xhat * mean_over(g * of_ddx, fold)
    of_xhat = xhat if sign < 0 else np.maximum(xhat, 1)
    ddy = weight * of_ddx + ddweight * of_xhat + ddbias
    return _Terms(ddy, jacobian(inner) + sign * after, dy * of_ddx)


def double_backward(
    ddx: Array | None,
    ddweight: Array | None,
    ddbias: Array | None,
    dy: Array,
    x: Array,
    fold: Fold,
    mean: Array | None,
    invstd: Array,
    weight: Array | None,
    *,
    constant: bool = False,
    dtype: np.dtype | None = None,
) -> Derivatives:
    """The gradients by dy, x and weight."""
    precision = x.dtype
    result = dtype or (precision if weight is None else weight.dtype)
    wide, of_dy, inverse = fold.fold(x), fold.fold(dy), fold.keep(invstd)
    of_ddx = np.zeros_like(wide) if ddx is None else fold.fold(ddx)
    center = np.zeros_like(inverse) if mean is None else fold.keep(mean)
    placed = [fold.place(p, default) for p, default in ((weight, 1), (ddweight, 0), (ddbias, 0))]
    factor = placed[0]

    def terms(xhat: Array) -> _Terms:
        upstream = (of_ddx, *placed[1:])
        return _formulas(
            fold, upstream, of_dy, xhat, inverse, factor, mean is not None, constant, -1
        )

    given = terms((wide - center) * inverse)
    found, unknown = given, _Terms(*(np.zeros_like(part) for part in given))
    xhat = (wide - center) * inverse
    if mean is not None and not constant:
        # The mean as it was rounded for the call, or found again.
        xhat = oracle.statistics(x, fold).deviation * inverse
        found = terms(xhat)
        unknown = _Terms(
            *(
                np.abs(a - b).max(fold.over, keepdims=True, initial=0) + 0 * a
                for a, b in zip(found, given, strict=True)
            )
        )
    size = _formulas(
        fold,
        (np.abs(of_ddx), *map(np.abs, placed[1:])),
        *(np.abs(of_dy), np.abs(xhat), np.abs(inverse), np.abs(factor)),
        *(mean is not None, constant, 1),
    )
    most = oracle.LARGEST_FACTOR[precision]
    good = np.isfinite(wide) & np.isfinite(of_dy) & np.isfinite(of_ddx) & (np.abs(xhat) < most)
    good = good & (np.abs(center) < np.finfo(precision).max / 4) & (inverse > 0)
    largest = [
        np.abs(part).max(fold.over, keepdims=True, initial=0) for part in (of_dy, of_ddx, *size)
    ]
    for number in (inverse, inverse**2, *placed, inverse * factor, *largest):
        good = good & moderate(number, precision)
    good = good.all(fold.over, keepdims=True) if fold.over else good
    lost = (1 + np.abs(inverse)) ** 2 * (1 + largest[0]) * (1 + largest[1])
    lost = lost * (1 + np.abs(xhat).max(fold.over, keepdims=True, initial=0)) ** 3
    for parameter in placed[:2]:
        lost = lost * (1 + np.abs(parameter))
    lost = lost + 0 * size.ddy

    def like_x(value: Array, size: Array, off: Array) -> Quantity:
        sizes = {"dx": unjudged(size, good), "known": off, "smallest": lost}
        unfolded = {kind: fold.unfold(of_kind) for kind, of_kind in sizes.items()}
        return Quantity(fold.unfold(value), unfolded, precision, precision)

    return Derivatives(
        like_x(found.ddy, size.ddy, unknown.ddy),
        like_x(found.dx, OF_DX * size.dx, unknown.dx),
        Quantity(
            fold.gather(found.dweight),
            {
                "dx": fold.gather(unjudged(size.dweight, good)),
                "known": fold.gather(unknown.dweight),
                "smallest": fold.gather(lost),
            },
            precision,
            result,
        ),
    )
