"""Normalizations as they are written in NumPy: what the demo and the benchmarks compare with.

In the data's own precision, float32 for data of 16 bits, with two passes for the variance, and no
more temporaries than needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from bnfast._cli.bench.cell import (
    EPS,
    LEAST_LENGTH,
    Batch,
    Cell,
    Filters,
    Groups,
    Matrix,
    Table,
)
from bnfast._cli.bench.rivals import Contender, NotOffered, Rival, first, read_moments
from bnfast._typing import Array

# Which spares it one of three sums.
_VAR_TAKES_MEAN = np.lib.NumpyVersion(np.__version__) >= "2.0.0"


def _axes_and_shape(x: Array, axis: int) -> tuple[tuple[int, ...], list[int]]:
    axes = tuple(d for d in range(x.ndim) if d != axis % x.ndim)
    shape = [1] * x.ndim
    shape[axis] = -1
    return axes, shape


def batch_norm_forward(
    x: Array,
    weight: Array,
    bias: Array,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Return y, mean and invstd."""
    axes, shape = _axes_and_shape(x, axis)
    mean = x.mean(axes, keepdims=True)
    y = np.subtract(x, mean, out=out)
    invstd = 1 / np.sqrt(np.square(y).mean(axes, keepdims=True) + eps)
    y *= weight.reshape(shape) * invstd
    y += bias.reshape(shape)
    return y, mean.ravel(), invstd.ravel()


def batch_norm_inference(
    x: Array,
    mean: Array,
    var: Array,
    weight: Array,
    bias: Array,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    out: Array | None = None,
) -> Array:
    """Return y."""
    _, shape = _axes_and_shape(x, axis)
    scale = weight / np.sqrt(var + eps)
    y: Array = np.multiply(x, scale.reshape(shape), out=out)
    y += (bias - mean * scale).reshape(shape)
    return y


def batch_norm_backward(
    dy: Array,
    x: Array,
    mean: Array,
    invstd: Array,
    weight: Array,
    *,
    axis: int = 1,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Return dx, dweight and dbias."""
    axes, shape = _axes_and_shape(x, axis)
    count = x.dtype.type(x.size // x.shape[axis])
    xhat = (x - mean.reshape(shape)) * invstd.reshape(shape)
    dbias = dy.sum(axes)
    dweight = (dy * xhat).sum(axes)
    xhat *= (dweight / count).reshape(shape)
    dx = np.subtract(dy, (dbias / count).reshape(shape), out=out)
    dx -= xhat
    dx *= (weight * invstd).reshape(shape)
    return dx, dweight, dbias


def update_running(
    running_mean: Array, running_var: Array, mean: Array, var: Array, momentum: float
) -> None:
    """Blend the batch's statistics in."""
    running_mean *= 1 - momentum
    running_mean += momentum * mean
    running_var *= 1 - momentum
    running_var += momentum * var


def layer_norm_forward(
    x: Array, weight: Array, bias: Array, eps: float = 1e-5, *, out: Array | None = None
) -> tuple[Array, Array, Array]:
    """Return y, mean and invstd of the rows along the last axis."""
    mean = x.mean(-1, keepdims=True)
    y = np.subtract(x, mean, out=out)
    invstd = 1 / np.sqrt(np.square(y).mean(-1, keepdims=True) + eps)
    y *= invstd
    y *= weight
    y += bias
    return y, mean[..., 0], invstd[..., 0]


def layer_norm_backward(
    dy: Array,
    x: Array,
    mean: Array,
    invstd: Array,
    weight: Array,
    *,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Return dx, dweight and dbias."""
    rows = tuple(range(x.ndim - 1))
    xhat = x - mean[..., None]
    xhat *= invstd[..., None]
    dbias = dy.sum(rows)
    product = np.multiply(dy, xhat)
    dweight = product.sum(rows)
    product *= weight
    xhat *= product.mean(-1, keepdims=True)
    dx = np.multiply(dy, weight, out=out)
    dx -= dx.mean(-1, keepdims=True)
    dx -= xhat
    dx *= invstd[..., None]
    return dx, dweight, dbias


def rms_norm_forward(
    x: Array, weight: Array, eps: float = 1e-5, *, out: Array | None = None
) -> tuple[Array, Array]:
    """Return y and invrms of the rows along the last axis."""
    squares = np.square(x, out=out)
    invrms = 1 / np.sqrt(squares.mean(-1, keepdims=True) + eps)
    y = np.multiply(x, invrms, out=squares)
    y *= weight
    return y, invrms[..., 0]


def rms_norm_backward(
    dy: Array, x: Array, invrms: Array, weight: Array, *, out: Array | None = None
) -> tuple[Array, Array]:
    """Return dx and dweight."""
    xhat = x * invrms[..., None]
    product = np.multiply(dy, xhat)
    dweight = product.sum(tuple(range(x.ndim - 1)))
    product *= weight
    xhat *= product.mean(-1, keepdims=True)
    dx = np.multiply(dy, weight, out=out)
    dx -= xhat
    dx *= invrms[..., None]
    return dx, dweight


def _mean_of_groups(x: Array, groups: Groups) -> Array:
    """Return that of planes first, which is up to five times as fast as all at once."""
    mean: Array = x.mean(groups.plane, keepdims=True).mean(groups.channels, keepdims=True)
    return mean


def group_norm_forward(
    x: Array,
    weight: Array,
    bias: Array,
    groups: Groups,
    eps: float = 1e-5,
    *,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Return y, and mean and invstd of each group of each sample."""
    grouped = x.reshape(groups.shape)
    mean = _mean_of_groups(grouped, groups)
    y = np.subtract(grouped, mean, out=None if out is None else out.reshape(groups.shape))
    invstd = 1 / np.sqrt(_mean_of_groups(np.square(y), groups) + eps)
    y *= weight.reshape(groups.parameters) * invstd
    y += bias.reshape(groups.parameters)
    return y.reshape(x.shape), mean, invstd


def group_norm_backward(
    dy: Array,
    x: Array,
    mean: Array,
    invstd: Array,
    weight: Array,
    groups: Groups,
    *,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Return dx, dweight and dbias: all from two sums over each plane."""
    invstd, gamma = invstd.reshape(groups.statistics), weight.reshape(groups.parameters)
    upstream = dy.reshape(groups.shape)
    xhat = x.reshape(groups.shape) - mean.reshape(groups.statistics)
    xhat *= invstd
    product = np.multiply(upstream, xhat, out=None if out is None else out.reshape(groups.shape))
    of_dy = upstream.sum(groups.plane, keepdims=True)
    of_product = product.sum(groups.plane, keepdims=True)
    count = x.dtype.type(x.size // mean.size)
    xhat *= (gamma * of_product).sum(groups.channels, keepdims=True) * invstd / count
    dx = np.multiply(upstream, gamma * invstd, out=product)
    dx -= (gamma * of_dy).sum(groups.channels, keepdims=True) * invstd / count
    dx -= xhat
    return dx.reshape(x.shape), of_product.sum(0).ravel(), of_dy.sum(0).ravel()


def weight_norm_forward(v: Array, g: Array, *, out: Array | None = None) -> tuple[Array, Array]:
    """Return w, and the norms of the filters along the first axis."""
    filters = v.reshape(len(v), -1)
    norm = np.sqrt(np.einsum("ij,ij->i", filters, filters))
    given = None if out is None else out.reshape(filters.shape)
    w: Array = np.multiply(filters, (g / norm)[:, None], out=given)
    return w.reshape(v.shape), norm


def weight_norm_backward(
    dw: Array, v: Array, g: Array, norm: Array, *, out: Array | None = None
) -> tuple[Array, Array]:
    """Return dv and dg."""
    filters, upstream = v.reshape(len(v), -1), dw.reshape(len(v), -1)
    products = np.einsum("ij,ij->i", upstream, filters)
    given = None if out is None else out.reshape(filters.shape)
    dv: Array = np.multiply(filters, (products / norm**2)[:, None], out=given)
    np.subtract(upstream, dv, out=dv)
    dv *= (g / norm)[:, None]
    return dv.reshape(v.shape), products / norm


def spectral_norm_forward(
    w: Array, v: Array, *, out: Array | None = None
) -> tuple[Array, Any, Array, Array]:
    """Return y, sigma, u and v, after one power iteration."""
    matrix = w.reshape(len(w), -1)
    u = matrix @ v
    u /= max(np.linalg.norm(u), LEAST_LENGTH)
    v = matrix.T @ u
    v /= max(np.linalg.norm(v), LEAST_LENGTH)
    sigma = u @ (matrix @ v)
    return np.divide(w, sigma, out=out), sigma, u, v


def spectral_norm_backward(
    dy: Array, w: Array, sigma: Array, u: Array, v: Array, *, out: Array | None = None
) -> Array:
    """Return dw."""
    along = np.vdot(dy, w) / sigma
    given = None if out is None else out.reshape(len(u), -1)
    dw: Array = np.outer(along * u, v, out=given)
    np.subtract(dy.reshape(dw.shape), dw, out=dw)
    dw /= sigma
    return dw.reshape(w.shape)


def moments(x: Array, dtype: Any = None) -> tuple[Array, Array]:
    """Return mean and variance of the columns, summed in `dtype`, that of x unless said."""
    mean = x.mean(0, dtype=dtype, keepdims=True)
    known = {"mean": mean} if _VAR_TAKES_MEAN else {}
    return mean[0], x.var(0, dtype=dtype, **known)


def _batch_norm(cell: Cell[Batch]) -> Callable[..., Any]:
    b = cell.data
    if cell.operation == "inference":
        arguments = b.x, b.mean, b.var, b.weight, b.bias, EPS
        return partial(batch_norm_inference, *arguments, axis=b.axis)
    if cell.operation == "training":
        return partial(batch_norm_forward, b.x, b.weight, b.bias, EPS, axis=b.axis)
    return partial(batch_norm_backward, b.dy, b.x, b.mean, b.invstd, b.weight, axis=b.axis)


def _layer_norm(cell: Cell[Batch]) -> Callable[..., Any]:
    b = cell.data
    if cell.operation == "forward":
        return partial(layer_norm_forward, b.x, b.weight, b.bias, EPS)
    return partial(layer_norm_backward, b.dy, b.x, b.mean, b.invstd, b.weight)


def _rms_norm(cell: Cell[Batch]) -> Callable[..., Any]:
    b = cell.data
    if cell.operation == "forward":
        return partial(rms_norm_forward, b.x, b.weight, EPS)
    return partial(rms_norm_backward, b.dy, b.x, b.invstd, b.weight)


def _group_norm(cell: Cell[Batch]) -> Callable[..., Any]:
    b = cell.data
    if cell.operation == "forward":
        return partial(group_norm_forward, b.x, b.weight, b.bias, b.in_groups, EPS)
    saved = b.mean, b.invstd, b.weight
    return partial(group_norm_backward, b.dy, b.x, *saved, b.in_groups)


def _weight_norm(cell: Cell[Filters]) -> Callable[..., Any]:
    d = cell.data
    if cell.operation == "forward":
        return partial(weight_norm_forward, d.x, d.g)
    return partial(weight_norm_backward, d.dy, d.x, d.g, d.norm)


def _spectral_norm(cell: Cell[Matrix]) -> Callable[..., Any]:
    d = cell.data
    if cell.operation == "forward":
        return partial(spectral_norm_forward, d.x, d.v)
    return partial(spectral_norm_backward, d.dy, d.x, *d.found)


def _moments(cell: Cell[Table]) -> Callable[..., Any]:
    return partial(moments, cell.data.rows)


FORMULAS: dict[str, Callable[[Cell[Any]], Callable[..., Any]]] = {
    "batch": _batch_norm,
    "layer": _layer_norm,
    "rms": _rms_norm,
    "group": _group_norm,
    "instance": _group_norm,
    "weight": _weight_norm,
    "spectral": _spectral_norm,
    "moments": _moments,
}


def _through_float32(cell: Cell[Any], out: Array | None = None) -> Any:
    """Return what the formula makes of float32 copies of data of 16 bits, rounded to their type."""
    data = cell.data
    used = ("x", "dy") if cell.operation == "backward" else ("x",)
    wide = {name: getattr(data, name).astype(data.computed_in) for name in used}
    results = FORMULAS[cell.normalization](replace(cell, data=replace(data, **wide)))()
    if data.output() is None:
        return results
    y = first(results)
    if out is None:
        return y.astype(data.dtype)
    out[...] = y
    return out


class NumPyFormulas(Rival):
    """The formulas above, which are serial but for matrix products."""

    @property
    def version(self) -> str:
        """What is measured."""
        return np.__version__

    def prepare(self, cell: Cell[Any], fresh: bool) -> Contender:
        """Return the formula of the cell."""
        if cell.normalization not in FORMULAS:
            raise NotOffered("no formula of it is written")
        data, out = cell.data, cell.data.output()
        in_full = data.computed_in == data.dtype
        formula = FORMULAS[cell.normalization](cell) if in_full else partial(_through_float32, cell)
        if out is None:
            return Contender(formula, read_moments)
        return Contender(partial(formula, out=None if fresh else out), first)


class NumPyInFloat64(NumPyFormulas):
    """Moments summed in float64, of float32 data: the exact way."""

    def prepare(self, cell: Cell[Any], fresh: bool) -> Contender:
        """Return the formula of the cell."""
        if cell.normalization != "moments":
            raise NotOffered("moments alone are summed so")
        if cell.data.dtype == np.float64:
            raise NotOffered("float64 data are summed so without being asked")
        return Contender(partial(moments, cell.data.rows, np.float64), read_moments)
