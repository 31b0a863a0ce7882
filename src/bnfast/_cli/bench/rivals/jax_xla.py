"""JAX: the formulas as Flax has them, compiled by XLA for the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnfast._cli.bench.cell import EPS, LEAST_LENGTH, Batch, Cell, Filters, Matrix, Table
from bnfast._cli.bench.rivals import Contender, NotOffered, Rival, first, read_moments

Formula = tuple[Callable[..., Any], tuple[Any, ...]]


def _moments(x: Any, axes: tuple[int, ...]) -> tuple[Any, Any]:
    """Return mean and variance, which broadcast against x.

    Fast variance, E[x**2] - E[x]**2 in one pass: Flax's default, and faster here than two.
    """
    mean = x.mean(axes, keepdims=True)
    return mean, jnp.maximum(0, jnp.square(x).mean(axes, keepdims=True) - jnp.square(mean))


def _scale_shift(x: Any, mean: Any, var: Any, weight: Any, bias: Any) -> Any:
    return (x - mean) * (weight * jax.lax.rsqrt(var + EPS)) + bias


def _batch_norm(cell: Cell[Batch]) -> Formula:
    b = cell.data
    axes = tuple(d for d in range(b.x.ndim) if d != b.axis % b.x.ndim)
    shape = [1] * b.x.ndim
    shape[b.axis] = -1

    def inference(x: Any, mean: Any, var: Any, weight: Any, bias: Any) -> Any:
        return _scale_shift(x, *(values.reshape(shape) for values in (mean, var, weight, bias)))

    def training(x: Any, weight: Any, bias: Any) -> Any:
        mean, var = _moments(x, axes)
        y = _scale_shift(x, mean, var, weight.reshape(shape), bias.reshape(shape))
        return y, mean.ravel(), var.ravel()

    def backward(dy: Any, x: Any, mean: Any, invstd: Any, weight: Any) -> Any:
        count = x.size // mean.size
        centred = x - mean.reshape(shape)
        dbias = dy.sum(axes)
        dweight = (dy * centred).sum(axes) * invstd
        dx = dy - (dbias / count).reshape(shape)
        dx -= centred * (invstd * dweight / count).reshape(shape)
        return dx * (weight * invstd).reshape(shape), dweight, dbias

    operations: dict[str, Formula] = {
        "inference": (inference, (b.x, b.mean, b.var, b.weight, b.bias)),
        "training": (training, (b.x, b.weight, b.bias)),
        "backward": (backward, (b.dy, b.x, b.mean, b.invstd, b.weight)),
    }
    return operations[cell.operation]


def _layer_norm(cell: Cell[Batch]) -> Formula:
    b = cell.data
    rows = tuple(range(b.x.ndim - 1))

    def forward(x: Any, weight: Any, bias: Any) -> Any:
        mean, var = _moments(x, (-1,))
        return _scale_shift(x, mean, var, weight, bias), mean, var

    def backward(dy: Any, x: Any, mean: Any, invstd: Any, weight: Any) -> Any:
        xhat = (x - mean[..., None]) * invstd[..., None]
        g = dy * weight
        dx = g - g.mean(-1, keepdims=True) - xhat * (g * xhat).mean(-1, keepdims=True)
        return dx * invstd[..., None], (dy * xhat).sum(rows), dy.sum(rows)

    if cell.operation == "forward":
        return forward, (b.x, b.weight, b.bias)
    return backward, (b.dy, b.x, b.mean, b.invstd, b.weight)


def _rms_norm(cell: Cell[Batch]) -> Formula:
    b = cell.data
    rows = tuple(range(b.x.ndim - 1))

    def forward(x: Any, weight: Any) -> Any:
        invrms = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPS)
        return x * (invrms * weight), invrms

    def backward(dy: Any, x: Any, invrms: Any, weight: Any) -> Any:
        xhat = x * invrms[..., None]
        g = dy * weight
        dx = g - xhat * (g * xhat).mean(-1, keepdims=True)
        return dx * invrms[..., None], (dy * xhat).sum(rows)

    if cell.operation == "forward":
        return forward, (b.x, b.weight)
    return backward, (b.dy, b.x, b.invstd, b.weight)


def _group_norm(cell: Cell[Batch]) -> Formula:
    b = cell.data
    groups = b.in_groups

    def mean_of_groups(values: Any) -> Any:
        if b.axis == 1:
            return values.mean((groups.plane, *groups.channels), keepdims=True)
        # In NHWC of planes first, which is up to twice as fast as all at once.
        return values.mean(groups.plane, keepdims=True).mean(groups.channels, keepdims=True)

    def forward(x: Any, weight: Any, bias: Any) -> Any:
        grouped = x.reshape(groups.shape)
        mean = mean_of_groups(grouped)
        var = jnp.maximum(0, mean_of_groups(jnp.square(grouped)) - jnp.square(mean))
        weight, bias = weight.reshape(groups.parameters), bias.reshape(groups.parameters)
        return _scale_shift(grouped, mean, var, weight, bias).reshape(x.shape), mean, var

    def backward(dy: Any, x: Any, mean: Any, invstd: Any, weight: Any) -> Any:
        count = x.size // mean.size
        invstd = invstd.reshape(groups.statistics)
        gamma, upstream = weight.reshape(groups.parameters), dy.reshape(groups.shape)
        centred = x.reshape(groups.shape) - mean.reshape(groups.statistics)
        # Two sums over each plane, from which all others are made.
        of_dy = upstream.sum(groups.plane, keepdims=True)
        of_product = (upstream * centred).sum(groups.plane, keepdims=True) * invstd
        shift = (gamma * of_dy).sum(groups.channels, keepdims=True) / count
        slope = (gamma * of_product).sum(groups.channels, keepdims=True) / count
        dx = upstream * (gamma * invstd) - centred * (slope * invstd**2) - shift * invstd
        return dx.reshape(x.shape), of_product.sum(0).ravel(), of_dy.sum(0).ravel()

    if cell.operation == "forward":
        return forward, (b.x, b.weight, b.bias)
    return backward, (b.dy, b.x, b.mean, b.invstd, b.weight)


def _weight_norm(cell: Cell[Filters]) -> Formula:
    d = cell.data
    axes, along = tuple(range(1, d.x.ndim)), (-1, *[1] * (d.x.ndim - 1))

    def forward(v: Any, g: Any) -> Any:
        norm = jnp.sqrt(jnp.square(v).sum(axes))
        return v * (g / norm).reshape(along), norm

    def backward(dw: Any, v: Any, g: Any, norm: Any) -> Any:
        products = (dw * v).sum(axes)
        dv = dw - v * (products / jnp.square(norm)).reshape(along)
        return dv * (g / norm).reshape(along), products / norm

    if cell.operation == "forward":
        return forward, (d.x, d.g)
    return backward, (d.dy, d.x, d.g, d.norm)


def _spectral_norm(cell: Cell[Matrix]) -> Formula:
    d = cell.data

    def normalized(z: Any) -> Any:
        return z / jnp.maximum(jnp.linalg.norm(z), LEAST_LENGTH)

    def forward(w: Any, v: Any) -> Any:
        matrix = w.reshape(len(w), -1)
        u = normalized(matrix @ v)
        v = normalized(matrix.T @ u)
        sigma = u @ (matrix @ v)
        return w / sigma, sigma, u, v

    def backward(dy: Any, w: Any, sigma: Any, u: Any, v: Any) -> Any:
        along = (dy * w).sum() / sigma
        return (dy - along * jnp.outer(u, v).reshape(dy.shape)) / sigma

    if cell.operation == "forward":
        return forward, (d.x, d.v)
    return backward, (d.dy, d.x, *d.found)


def _table_moments(cell: Cell[Table]) -> Formula:
    """As they are written: in two passes, which XLA is not asked to make one."""
    return lambda x: (x.mean(0), x.var(0)), (cell.data.rows,)


FORMULAS: dict[str, Callable[[Cell[Any]], Formula]] = {
    "batch": _batch_norm,
    "layer": _layer_norm,
    "rms": _rms_norm,
    "group": _group_norm,
    "instance": _group_norm,
    "weight": _weight_norm,
    "spectral": _spectral_norm,
    "moments": _table_moments,
}


def _in_float32(function: Callable[..., Any], dtype: Any) -> Callable[..., Any]:
    """Return the formula of data of 16 bits: y, dx and the rest computed in float32."""

    def computed(*arguments: Any) -> Any:
        results = function(*(values.astype(jnp.float32) for values in arguments))
        if isinstance(results, tuple):
            return results[0].astype(dtype), *results[1:]
        return results.astype(dtype)

    return computed


class JaxXla(Rival):
    """The formulas above, compiled."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        # XLA has no setting for it, but reads this when its CPU client is made, at the first array.
        os.environ["NPROC"] = str(threads)
        jax.config.update("jax_platforms", "cpu")
        # A call is computed where it is made, rather than handed to another thread and waited for.
        jax.config.update("jax_cpu_enable_async_dispatch", False)

    @property
    def version(self) -> str:
        """What is measured."""
        return str(jax.__version__)

    def prepare(self, cell: Cell[Any], fresh: bool) -> Contender:
        """Return a compiled call.

        JAX never writes to given memory, but reuses that of an argument which is given away: each
        call gives away the output of the one before.
        """
        jax.config.update("jax_enable_x64", cell.data.dtype == np.float64)
        if cell.normalization not in FORMULAS:
            raise NotOffered("no formula of it is written")
        function, arguments = FORMULAS[cell.normalization](cell)
        statistics = cell.data.output() is None
        if cell.data.computed_in != cell.data.dtype:
            function = _in_float32(function, jnp.float32 if statistics else cell.data.dtype)
        arrays = jax.device_put(arguments)
        # It shares NumPy's memory where that begins at a cache line, and copies it otherwise.
        copies = arrays[0].unsafe_buffer_pointer() != arguments[0].ctypes.data

        if fresh or statistics:
            compiled = jax.jit(function)
            return Contender(
                lambda: jax.block_until_ready(compiled(*arrays)),
                read_moments if statistics else _read,
                copies=copies,
            )

        reusing = jax.jit(lambda given, *rest: function(*rest), donate_argnums=0, keep_unused=True)
        last = jnp.zeros_like(arrays[0])

        def call() -> Any:
            nonlocal last
            results = jax.block_until_ready(reusing(last, *arrays))
            last = first(results)
            return last

        return Contender(call, _read, copies=copies, own_output=True)


def _read(results: Any) -> Any:
    return np.asarray(first(results))
