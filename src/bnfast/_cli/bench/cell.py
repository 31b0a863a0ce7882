"""The data of one cell of the table: one operation on one shape, layout and dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfast import _reference as reference
from bnfast._cli.bench.workloads import Shape, in_layout

Array = NDArray[Any]

OPERATIONS = ("inference", "training", "backward")
EPS = 1e-5

# Arrays of the size of x that an operation must move: read x, write y; read x and dy, write dx.
ARRAYS_MOVED = {"inference": 2, "training": 2, "backward": 3}

# The float64 result is made of so many channels at a time that its temporaries stay below this.
_SLICE_BYTES = 64 << 20


def aligned_empty(shape: Shape, dtype: Any) -> Array:
    """Return new memory on a cache line, where streaming stores and sharing with XLA are possible.

    NumPy's own large arrays begin 16 bytes after one, which is not every rival's best.
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    array: Array = memory[start : start + size].view(dtype).reshape(shape)
    return array


@dataclass(frozen=True)
class Batch:
    """Arrays of one shape in one layout, for all operations; everyone reads and writes the same."""

    shape: Shape  # channels second
    layout: str
    axis: int
    x: Array
    dy: Array
    out: Array
    weight: Array
    bias: Array
    mean: Array  # of x, in its dtype, as is what follows
    var: Array
    invstd: Array
    exact_mean: Array  # in float64
    exact_invstd: Array

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of everything but the exact statistics."""
        return self.x.dtype


@dataclass(frozen=True)
class Cell:
    """An operation on a batch."""

    operation: str
    batch: Batch

    @property
    def traffic(self) -> int:
        """Bytes that must be moved: each input read once, the output written once."""
        return ARRAYS_MOVED[self.operation] * self.batch.x.nbytes


def channels(array: Array, axis: int, part: slice) -> Array:
    """Return a view of some channels."""
    return array[:, part] if axis == 1 else array[..., part]


def _slices(array: Array, axis: int) -> list[slice]:
    """Return parts of the channels, few enough for temporaries in float64."""
    count = array.shape[axis]
    step = max(1, count * _SLICE_BYTES // max(1, 8 * array.size))
    return [slice(start, start + step) for start in range(0, count, step)]


def make_batch(shape: Shape, layout: str, dtype: Any, mean: float = 0.0) -> Batch:
    """Return normal values of standard deviation 1 around `mean`, and their statistics."""
    dtype = np.dtype(dtype)
    in_memory, axis = in_layout(shape, layout)
    rng = np.random.default_rng(0)
    x, dy, out = (aligned_empty(in_memory, dtype) for _ in range(3))
    rng.standard_normal(dtype=dtype.type, out=x)
    x += dtype.type(mean)
    rng.standard_normal(dtype=dtype.type, out=dy)
    weight, bias = rng.uniform(0.5, 1, (2, shape[1])).astype(dtype)
    exact_mean, exact_var = np.empty((2, shape[1]))
    for part in _slices(x, axis):
        count, exact_mean[part], m2 = reference.moments(channels(x, axis, part), axis)
        exact_var[part] = m2 / count
    exact_invstd = 1 / np.sqrt(exact_var + EPS)
    return Batch(
        *(shape, layout, axis, x, dy, out, weight, bias),
        mean=exact_mean.astype(dtype),
        var=exact_var.astype(dtype),
        invstd=exact_invstd.astype(dtype),
        exact_mean=exact_mean,
        exact_invstd=exact_invstd,
    )


def exact_result(cell: Cell) -> Array:
    """Return y or dx in float64."""
    b = cell.batch
    exact = np.empty(b.x.shape)
    for part in _slices(b.x, b.axis):
        x, weight, bias = channels(b.x, b.axis, part), b.weight[part], b.bias[part]
        if cell.operation == "inference":
            mean, var = b.mean[part], b.var[part]
            result = reference.scale_shift(x, mean, var, weight, bias, EPS, axis=b.axis)
        elif cell.operation == "training":
            result, _, _ = reference.batch_norm_forward(x, weight, bias, EPS, axis=b.axis)
        else:
            dy, mean, invstd = (
                channels(b.dy, b.axis, part),
                b.exact_mean[part],
                b.exact_invstd[part],
            )
            result, _, _ = reference.batch_norm_backward(dy, x, mean, invstd, weight, axis=b.axis)
        channels(exact, b.axis, part)[...] = result
    return exact


def largest_error(result: Array, exact: Array) -> float:
    """Return the largest absolute difference; raise where it is none."""
    if result.shape != exact.shape:
        raise ValueError(f"the result has shape {result.shape}, not {exact.shape}")
    step = max(1, _SLICE_BYTES // max(1, exact[0].nbytes))
    starts = range(0, len(exact), step)
    parts = ((result[start : start + step], exact[start : start + step]) for start in starts)
    error = float(np.max([np.abs(ours - theirs).max() for ours, theirs in parts]))
    if math.isnan(error):
        raise ValueError("the result is not a number in places")
    return error
