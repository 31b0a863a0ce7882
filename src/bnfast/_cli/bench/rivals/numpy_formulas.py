"""Batch normalization as it is written in NumPy: what the demo and the benchmarks compare with.

In the data's own precision, with two passes for the variance, and no more temporaries than needed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfast._cli.bench.cell import EPS, Cell
from bnfast._cli.bench.rivals import Contender, Rival

Array = NDArray[Any]


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


class NumPyFormulas(Rival):
    """The formulas above, which are serial."""

    @property
    def version(self) -> str:
        """What is measured."""
        return np.__version__

    def prepare(self, cell: Cell, fresh: bool) -> Contender:
        """Return the formula of the cell."""
        b = cell.batch
        out = None if fresh else b.out
        if cell.operation == "inference":
            arguments = b.x, b.mean, b.var, b.weight, b.bias, EPS
            return Contender(partial(batch_norm_inference, *arguments, axis=b.axis, out=out))
        if cell.operation == "training":
            forward = partial(batch_norm_forward, b.x, b.weight, b.bias, EPS, axis=b.axis, out=out)
            return Contender(forward, _first)
        saved = b.dy, b.x, b.mean, b.invstd, b.weight
        return Contender(partial(batch_norm_backward, *saved, axis=b.axis, out=out), _first)


def _first(results: tuple[Array, Array, Array]) -> Array:
    return results[0]
