"""PyTorch, eager: contiguous tensors for NCHW, channels_last ones for NHWC."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bnfast import _dtypes
from bnfast._cli.bench.cell import (
    EPS,
    LEAST_LENGTH,
    Activated,
    Batch,
    Cell,
    Data,
    Filters,
    Matrix,
    Table,
)
from bnfast._cli.bench.rivals import Contender, Rival, first, read_moments

ALL = [True, True, True]  # gradients of x, weight and bias

aten = torch.ops.aten


def shared(array: NDArray[Any]) -> Any:
    """Return a tensor that shares the memory of an array."""
    if _dtypes.is_bfloat16(array.dtype):  # which PyTorch takes from nobody
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _array(tensor: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the array of this dtype that shares the memory of a tensor."""
    words = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    array: NDArray[Any] = words.numpy()
    return array.view(dtype)


class PyTorch(Rival):
    """Its native functions, which is what its layers end in, without the layers' own time."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)  # no graph is recorded

    @property
    def version(self) -> str:
        """What is measured."""
        return str(torch.__version__)

    def prepare(self, cell: Cell[Any], fresh: bool) -> Contender:
        """Return a call on tensors that share the memory of the cell's arrays."""
        return CALLS[cell.normalization](cell, fresh)


def _tensor(b: Data, array: NDArray[Any]) -> Any:
    """Return x, y, dy or dx as PyTorch has it: channels second, whatever the strides."""
    return shared(array) if b.layout != "nhwc" else shared(array).movedim(-1, 1)


def _reader(b: Data) -> Callable[[Any], NDArray[Any]]:
    """Return what makes an array like ``b.x`` of y or dx."""

    def read(results: Any) -> NDArray[Any]:
        y = first(results).view(b.shape)
        return _array(y if b.layout != "nhwc" else y.movedim(1, -1), b.dtype)

    return read


def _batch_norm(cell: Cell[Batch], fresh: bool) -> Contender:
    b = cell.data
    read = _reader(b)
    x, weight, bias = _tensor(b, b.x), shared(b.weight), shared(b.bias)
    if cell.operation == "backward":
        dy, mean, invstd = _tensor(b, b.dy), shared(b.mean), shared(b.invstd)
        arguments = dy, x, weight, None, None, mean, invstd, True, EPS, ALL
        backward = aten.native_batch_norm_backward.default
        # Its .out overload makes a new tensor as well, and copies that: slower, so not used.
        return Contender(lambda: backward(*arguments), read, fresh=not fresh)
    training = cell.operation == "training"
    running = (None, None) if training else (shared(b.mean), shared(b.var))
    forward = (x, weight, bias, *running, training, 0.1, EPS)
    if fresh:
        native = aten.native_batch_norm.default
        return Contender(lambda: native(*forward), read)
    saved = np.empty((2, b.mean.size if training else 0), b.computed_in)
    outputs = {
        "out": _tensor(b, b.out),
        "save_mean": shared(saved[0]),
        "save_invstd": shared(saved[1]),
    }
    native_out = aten.native_batch_norm.out
    return Contender(lambda: native_out(*forward, **outputs), read)


def _activated_batch_norm(cell: Cell[Activated], fresh: bool) -> Contender:
    """Batch norm, the sum and ReLU in place, as networks have them; backward, from y."""
    b = cell.data
    normalized = _batch_norm(cell, fresh)
    if cell.operation == "backward":
        dy, y, x = (_tensor(b, array) for array in (b.dy, b.y, b.x))
        saved = shared(b.weight), None, None, shared(b.mean), shared(b.invstd), True, EPS, ALL
        through, backward = aten.threshold_backward.default, aten.native_batch_norm_backward.default

        def gradient() -> Any:
            dz = through(dy, y, 0)
            return *backward(dz, x, *saved), dz

        return Contender(gradient, _reader(b), fresh=not fresh)
    residual = None if b.residual is None else _tensor(b, b.residual)

    def call() -> Any:
        y = first(normalized.call())
        return (y if residual is None else y.add_(residual)).relu_()

    return Contender(call, _reader(b))


# Of the others no function writes to given memory: every .out overload makes a new tensor as well,
# and copies that: slower, so not used.


def _layer_norm(cell: Cell[Batch], fresh: bool) -> Contender:
    b = cell.data
    x, row, weight, bias = shared(b.x), b.x.shape[-1:], shared(b.weight), shared(b.bias)
    if cell.operation == "forward":
        forward = aten.native_layer_norm.default
        return Contender(lambda: forward(x, row, weight, bias, EPS), _reader(b), fresh=not fresh)
    saved = [shared(statistic[..., None]) for statistic in (b.mean, b.invstd)]
    arguments = shared(b.dy), x, row, *saved, weight, bias, ALL
    backward = aten.native_layer_norm_backward.default
    return Contender(lambda: backward(*arguments), _reader(b), fresh=not fresh)


def _rms_norm(cell: Cell[Batch], fresh: bool) -> Contender:
    """For CPUs it is made of others, and has no gradient but autograd's."""
    b = cell.data
    x, row = shared(b.x), b.x.shape[-1:]
    weight = shared(b.weight).to(x.dtype)  # another type is slower
    if cell.operation == "forward":
        forward = aten.rms_norm.default
        return Contender(lambda: forward(x, row, weight, EPS), _reader(b), fresh=not fresh)
    dy, inputs = shared(b.dy), (x.requires_grad_(), weight.requires_grad_())
    with torch.enable_grad():
        y = aten.rms_norm.default(x, row, weight, EPS)
    gradient = torch.autograd.grad
    return Contender(
        lambda: gradient(y, inputs, dy, retain_graph=True),
        _reader(b),
        fresh=not fresh,
        note="autograd",
    )


def _group_norm(cell: Cell[Batch], fresh: bool) -> Contender:
    b = cell.data
    n, channels, *plane = b.shape
    sizes = n, channels, math.prod(plane), b.num_groups

    def tensor(array: NDArray[Any]) -> Any:
        """Return a plane as one long row of it: its channels_last has four dimensions."""
        if b.layout == "nhwc":
            return shared(array.reshape(n, 1, -1, channels)).movedim(-1, 1)
        return shared(array.reshape(n, channels, 1, -1))

    x, weight, bias = tensor(b.x), shared(b.weight), shared(b.bias)
    if cell.operation == "forward":
        forward = aten.native_group_norm.default
        arguments = x, weight, bias, *sizes, EPS
        return Contender(lambda: forward(*arguments), _reader(b), fresh=not fresh)
    saved = shared(b.mean), shared(b.invstd), weight
    gradient = tensor(b.dy), x, *saved, *sizes, ALL
    backward = aten.native_group_norm_backward.default
    return Contender(lambda: backward(*gradient), _reader(b), fresh=not fresh)


def _instance_norm(cell: Cell[Batch], fresh: bool) -> Contender:
    """As its layer has it, a batch norm of N * C channels, or as a group norm: what is faster."""
    return min(_as_batch_norm(cell, fresh), _group_norm(cell, fresh), key=_seconds)


def _seconds(contender: Contender) -> float:
    """Return what the better of two calls takes, after one that does not count."""
    times = []
    for _ in range(3):
        start = perf_counter()
        contender.call()
        times.append(perf_counter() - start)
    return min(times[1:])


def _as_batch_norm(cell: Cell[Batch], fresh: bool) -> Contender:
    """In NCHW, to which its layer copies other layouts, and in which it returns them."""
    b = cell.data
    n, channels, *plane = b.shape
    size = 1, n * channels, *plane

    def apart(array: NDArray[Any]) -> Any:
        return _tensor(b, array).contiguous().view(size)

    weight, bias = shared(b.weight).repeat(n), shared(b.bias).repeat(n)
    saved = [shared(statistic.ravel()) for statistic in (b.mean, b.invstd)]
    note = "as batch norm"
    if cell.operation == "backward":
        backward = aten.native_batch_norm_backward.default

        def gradient() -> Any:
            dy, x = apart(b.dy), apart(b.x)
            dx, *apiece = backward(dy, x, weight, None, None, *saved, True, EPS, ALL)
            return dx, *(values.view(n, channels).sum(0) for values in apiece)

        return Contender(gradient, _reader(b), fresh=not fresh, note=note)
    rest = weight, bias, None, None, True, 0.1, EPS
    if fresh or b.layout == "nhwc":
        forward = aten.native_batch_norm.default
        return Contender(lambda: forward(apart(b.x), *rest), _reader(b), fresh=not fresh, note=note)
    statistics = torch.empty_like(saved[0]), torch.empty_like(saved[1])
    outputs = dict(
        zip(("out", "save_mean", "save_invstd"), (apart(b.out), *statistics), strict=True)
    )
    forward_out = aten.native_batch_norm.out
    return Contender(lambda: forward_out(apart(b.x), *rest, **outputs), _reader(b), note=note)


def _weight_norm(cell: Cell[Filters], fresh: bool) -> Contender:
    d = cell.data
    along = (-1, *[1] * (d.x.ndim - 1))
    v, g = shared(d.x), shared(d.g).view(along)
    if cell.operation == "forward":
        forward = aten._weight_norm_interface.default
        return Contender(lambda: forward(v, g, 0), _reader(d), fresh=not fresh)
    arguments = shared(d.dy), v, g, shared(d.norm).view(along), 0
    backward = aten._weight_norm_interface_backward.default
    return Contender(lambda: backward(*arguments), _reader(d), fresh=not fresh)


def _spectral_norm(cell: Cell[Matrix], fresh: bool) -> Contender:
    """As its parametrization has it; the gradient is autograd's, for that has no other."""
    d = cell.data
    w, out = shared(d.x), shared(d.out)
    matrix = w.flatten(1)
    if cell.operation == "forward":
        begun = shared(d.v)
        u, v = torch.empty_like(shared(d.u)), torch.empty_like(begun)
        normalize, mv, vdot = torch.nn.functional.normalize, torch.mv, torch.vdot

        def forward() -> Any:
            normalize(mv(matrix, begun), dim=0, eps=LEAST_LENGTH, out=u)
            normalize(mv(matrix.mH, u), dim=0, eps=LEAST_LENGTH, out=v)
            sigma = vdot(u, mv(matrix, v))
            return w / sigma if fresh else torch.div(w, sigma, out=out)

        return Contender(forward, _reader(d))
    dy, u, v = shared(d.dy), shared(d.found.u), shared(d.found.v)
    w.requires_grad_()
    with torch.enable_grad():
        y = w / torch.vdot(u, torch.mv(w.flatten(1), v))
    gradient = torch.autograd.grad
    return Contender(
        lambda: gradient(y, w, dy, retain_graph=True),
        _reader(d),
        fresh=not fresh,
        note="autograd",
    )


def _moments(cell: Cell[Table], fresh: bool) -> Contender:
    x, var_mean = shared(cell.data.rows), aten.var_mean.correction

    def call() -> Any:
        var, mean = var_mean(x, [0], correction=0)
        return mean, var

    def read(results: Any) -> NDArray[Any]:
        return read_moments([values.double() for values in results])  # NumPy has no bfloat16

    return Contender(call, read)


CALLS: dict[str, Callable[[Cell[Any], bool], Contender]] = {
    "batch": _batch_norm,
    "batch-relu": _activated_batch_norm,
    "batch-add-relu": _activated_batch_norm,
    "layer": _layer_norm,
    "rms": _rms_norm,
    "group": _group_norm,
    "instance": _instance_norm,
    "weight": _weight_norm,
    "spectral": _spectral_norm,
    "moments": _moments,
}
