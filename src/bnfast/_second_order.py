"""The gradients of a backward pass: its formulas, for the functions.

With xhat = (x - mean) * invstd and means over the values that share statistics, a backward pass
is::

    J(g)    = invstd * (g - mean(g) - xhat * mean(g * xhat))
    dx      = J(dy * weight)
    dweight = sum(dy * xhat), dbias = sum(dy)

J is linear in g and symmetric: sum(u * J(g)) = sum(J(u) * g). Of a loss whose gradients by dx,
dweight and dbias are ddx, ddweight and ddbias, the gradients by dy, x and weight are, with
g = dy * weight::

    ddy     = weight * J(ddx) + ddweight * xhat + ddbias
    dx      = J(dy * ddweight - invstd * (g * mean(ddx * xhat) + ddx * mean(g * xhat)))
              - invstd * xhat * mean(g * J(ddx))
    dweight = sum(dy * J(ddx))

because d(invstd) = -invstd**2 * mean(xhat * d(x)) and d(xhat) = J(d(x)). Around 0, as in RMS norm,
J has no mean(g).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from bnfast import _primitives
from bnfast._boxes import boxes
from bnfast._typing import Array

# Elements of a block, whose float64 temporaries stay in a second level of cache.
_BLOCK = 1 << 15


class Upstream(NamedTuple):
    """The gradients of a loss by dx, dweight and dbias, the last two float64."""

    ddx: Array
    ddweight: Array
    ddbias: Array


@np.errstate(all="ignore")
def of_channels(
    upstream: Upstream,
    dy: Array,
    x: Array,
    axis: int,
    mean: Array,
    invstd: Array,
    weight: Array,
    training: bool,
) -> tuple[Array, Array, Array]:
    """Return ddy, dx and dweight (float64) where the values of a channel share their statistics.

    Where these did not come from x, J is a multiplication by invstd, and dx = J(dy * ddweight).
    """
    ddx, ddweight, ddbias = upstream
    zeros, ones = np.zeros(x.shape[axis]), np.ones(x.shape[axis])
    if x.size == 0:
        return _primitives.empty_output(x), _primitives.empty_output(x), zeros
    count: int = x.size // x.shape[axis]

    def means(u: Array) -> Array:
        """Return the means of u and of u * xhat."""
        return np.array(_primitives.gradient_sums(u, x, axis, mean, invstd)) / count

    def gradient(u: Array, scale: Array, of_u: Array, out: Array | None = None) -> Array:
        """Return scale * J(u), where of_u are those means."""
        return _primitives.input_gradient(u, x, axis, mean, invstd, scale, of_u[0], of_u[1], 1, out)

    def covariance(centre: Array) -> Array:
        return _primitives.gradient_sums(ddx, dy, axis, centre, ones)[1] / count

    none = np.array([zeros, zeros])
    if training:
        of_ddx, of_dy = means(ddx), means(dy)
        product = covariance(of_dy[0]) - of_ddx[1] * of_dy[1]
        by_dy = ddweight - invstd * weight * of_ddx[1]
        by_ddx = -invstd * weight * of_dy[1]
        inner = gradient(dy, by_dy / invstd, none)
        inner = _primitives.input_gradient(
            inner, ddx, axis, zeros, ones, None, zeros, -by_ddx, 1, inner
        )
        of_inner = by_dy * of_dy + by_ddx * of_ddx
        of_inner[1] += invstd * weight * product  # what stands after J
        dx = gradient(inner, ones, of_inner, inner)
    else:
        of_ddx, product = none, covariance(zeros)
        dx = gradient(dy, ddweight, none)
    ddy = gradient(ddx, weight, of_ddx)
    if ddweight.any() or ddbias.any():
        ddy = gradient(ddy, 1 / invstd, np.array([-ddbias, -ddweight]), ddy)
    return ddy, dx, invstd * product * count


class Groups(NamedTuple):
    """How values that share statistics lie in an array.

    `arrange` returns a view of it whose last `together` axes are a group; statistics and parameters
    are broadcast against that.
    """

    arrange: Callable[[Array], Array]
    together: int
    centred: bool


class _Rows:
    """The groups of a block as rows of float64, for the core: what it sums of them, and J."""

    def __init__(self, xhat: Array, together: int, invstd: Array, centred: bool) -> None:
        groups = xhat.shape[: xhat.ndim - together]
        self._statistic = (*groups, *(1,) * together)
        self._rows = math.prod(groups)
        self._xhat = xhat.reshape(self._rows, -1)
        self._invstd = invstd.reshape(self._rows)
        self._zeros, self._ones = np.zeros(self._rows), np.ones(self._rows)
        self._centred = centred

    def _sums(self, u: Array, x: Array) -> tuple[Array, Array]:
        return _primitives.gradient_sums(
            u.reshape(self._rows, -1), x.reshape(self._rows, -1), 0, self._zeros, self._ones
        )

    def _mean(self, sums: Array) -> Array:
        return (sums / self._xhat.shape[1]).reshape(self._statistic)

    def mean_of_product(self, u: Array, v: Array) -> Array:
        return self._mean(self._sums(u, v)[1])

    def gradient(self, u: Array, after: Array | float = 0.0) -> tuple[Array, Array]:
        """Return J(u) - invstd * xhat * after, and mean(u * xhat)."""
        sum_u, sum_products = self._sums(u, self._xhat)
        along = self._mean(sum_products)
        found = _primitives.input_gradient(
            u.reshape(self._rows, -1),
            self._xhat,
            0,
            self._zeros,
            self._ones,
            self._invstd,
            sum_u / self._xhat.shape[1] if self._centred else self._zeros,
            (along + after).reshape(self._rows),
            1,
        )
        return found.reshape(u.shape), along


@np.errstate(all="ignore")
def of_groups(
    upstream: Upstream,
    dy: Array,
    x: Array,
    groups: Groups,
    mean: Array,
    invstd: Array,
    weight: Array,
) -> tuple[Array, Array, Array]:
    """Return ddy, dx and dweight (float64). All arithmetic is float64, in blocks of groups.

    Its memory is a few copies of a block, or of one group where that is larger.
    """
    results = _primitives.empty_output(x), _primitives.empty_output(x)
    ddx, dy, x, to_ddy, to_dx = map(groups.arrange, (upstream.ddx, dy, x, *results))
    summed = tuple(d for d, size in enumerate(weight.shape) if size == 1)
    dweight = np.zeros(weight.shape)

    first = x.ndim - groups.together
    whole_groups = (1,) * first + x.shape[first:]
    for part in boxes(x.shape, whole_groups, _BLOCK) if x.size else ():
        v, g, xhat = (np.array(array[part], np.float64, order="C") for array in (ddx, dy, x))
        w, to_weight, to_bias, centre, inverse = (
            array[_own(part, array)]
            for array in (weight, upstream.ddweight, upstream.ddbias, mean, invstd)
        )
        if groups.centred:
            xhat -= centre
            xhat -= xhat.mean(axis=_last(groups.together), keepdims=True)  # what rounding left
        xhat *= inverse
        rows = _Rows(xhat, groups.together, inverse, groups.centred)
        of_ddx, along_ddx = rows.gradient(v)
        to_ddy[part] = w * of_ddx + to_weight * xhat + to_bias
        dweight[_own(part, dweight)] += (g * of_ddx).sum(axis=summed, keepdims=True)
        u = g * to_weight
        g *= w
        u -= inverse * (g * along_ddx + v * rows.mean_of_product(g, xhat))
        to_dx[part], _ = rows.gradient(u, rows.mean_of_product(g, of_ddx))
    return *results, dweight


def _last(axes: int) -> tuple[int, ...]:
    return tuple(range(-axes, 0))


def _own(part: tuple[slice, ...], array: Array) -> tuple[slice, ...]:
    """Return the part of an array that is broadcast along some axes."""
    return tuple(s if n > 1 else slice(None) for s, n in zip(part, array.shape, strict=True))
