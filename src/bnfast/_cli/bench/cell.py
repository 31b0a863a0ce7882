"""The data of one cell of the table: one operation of one normalization on arrays of one shape."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from bnfast import _dtypes
from bnfast._cli.bench.workloads import Shape
from bnfast._typing import Array

# Training, and forward where there is nothing else: y and the statistics that its gradient needs.
# Moments: statistics alone.
OPERATIONS = ("inference", "training", "forward", "backward", "moments")
EPS = 1e-5
LEAST_LENGTH = 1e-12  # by which spectral norm divides a vector

# Arrays of the size of x that an operation must move: read x, write y; read x and dy, write dx.
ARRAYS_MOVED = {"inference": 2, "training": 2, "forward": 2, "backward": 3, "moments": 1}

# All arrays of a run begin so many bytes past a page, and so past a cache line: memory that is not
# cut alike is not equally fast. NumPy's large arrays begin 16 bytes past one.
PAGE = 4096
OFFSET = 16

# The float64 result is made in pieces, and compared in pieces, of at most so many bytes.
_SLICE_BYTES = 64 << 20


def aligned_empty(shape: Shape, dtype: Any, offset: int = 0) -> Array:
    """Return new memory that begins so many bytes past a page."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + offset + PAGE, np.uint8)
    start = -memory.ctypes.data % PAGE + offset
    array: Array = memory[start : start + size].view(dtype).reshape(shape)
    return array


class Groups(NamedTuple):
    """Views in which the statistics of groups of channels are those of some axes."""

    shape: Shape  # of x, y, dy and dx
    parameters: Shape  # of weight and bias
    statistics: Shape  # of mean, var and invstd
    plane: int  # the axis of the elements of a plane
    channels: tuple[int, ...]  # and that of the channels of a group, where there are several


@dataclass(frozen=True)
class Data:
    """Arrays of one shape in one layout, for all operations; everyone reads and writes the same."""

    shape: Shape  # as it is written on the command line
    layout: str
    x: Array

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of all that is as large as x."""
        return self.x.dtype

    @property
    def computed_in(self) -> np.dtype[Any]:
        """The dtype of parameters and statistics: that of x, float32 where x has 16 bits."""
        return _dtypes.computed_in(self.dtype)

    def empty(self, shape: Shape) -> Array:
        """Return new memory that begins as far past a page as x does."""
        return aligned_empty(shape, self.dtype, self.x.ctypes.data % PAGE)

    def output(self) -> Array | None:
        """Return the memory for an output as large as x, where there is one."""
        return None


AnyData = TypeVar("AnyData", bound=Data)
TheirData = TypeVar("TheirData", bound=Data, covariant=True)


@dataclass(frozen=True)
class Table(Data):
    """Rows of values, all but the last axis of x, of which each column has statistics."""

    @property
    def rows(self) -> Array:
        """The table in two dimensions."""
        return self.x.reshape(-1, self.x.shape[-1])


@dataclass(frozen=True)
class Operands(Data):
    """What is normalized, x, and what goes with it."""

    dy: Array  # the gradient of what normalizing gives
    out: Array

    def output(self) -> Array:
        """Return the memory for y or dx."""
        return self.out


@dataclass(frozen=True)
class Batch(Operands):
    """Data whose channels, samples or rows have statistics; channels second, but for rows."""

    axis: int  # of the parameters: of channels, or of the elements of a row
    weight: Array
    bias: Array
    mean: Array  # of x
    var: Array
    invstd: Array
    exact_mean: Array  # in float64
    exact_var: Array
    exact_invstd: Array

    @property
    def num_groups(self) -> int:
        """Of channels, where each sample has statistics of its own, (N, groups)."""
        groups: int = self.mean.shape[1]
        return groups

    @property
    def in_groups(self) -> Groups:
        """How to view the arrays, where each sample has statistics of its own."""
        n, groups = self.mean.shape
        together = self.weight.size // groups
        group, one = ((groups,), ()) if together == 1 else ((groups, together), (1,))
        if self.axis == 1:
            shape, parameters, statistics = (n, *group, -1), (1, *group, 1), (n, groups, *one, 1)
            return Groups(shape, parameters, statistics, len(group) + 1, (2,) * len(one))
        shape, parameters, statistics = (n, -1, *group), (1, 1, *group), (n, 1, groups, *one)
        return Groups(shape, parameters, statistics, 1, (3,) * len(one))


@dataclass(frozen=True)
class Activated(Batch):
    """A batch whose normalization goes through ReLU, after a residual where there is one."""

    residual: Array | None
    y: Array  # what comes out in training


@dataclass(frozen=True)
class Filters(Operands):
    """Weights, of which each filter along the first axis is given a length."""

    g: Array  # the lengths to be given
    norm: Array  # those there are, in the dtype of x
    exact_norm: Array


class Singular(NamedTuple):
    """What is known of the largest singular value of a matrix, and of its vectors."""

    sigma: Array
    u: Array
    v: Array


@dataclass(frozen=True)
class Matrix(Operands):
    """Weights, seen as a matrix with a row for each index of the first axis."""

    u: Array  # what the power iteration begins with
    v: Array
    found: Singular  # by one iteration, in the dtype of x
    exact: Singular


@dataclass(frozen=True)
class Cell(Generic[TheirData]):
    """An operation of a normalization on data of its kind."""

    normalization: str
    operation: str
    data: TheirData

    @property
    def traffic(self) -> int:
        """Bytes that must be moved: each input read once, the output written once.

        Of a residual one array more; in its gradient two, y and that gradient.
        """
        more = 0
        if isinstance(self.data, Activated) and self.data.residual is not None:
            more = 2 if self.operation == "backward" else 1
        return (ARRAYS_MOVED[self.operation] + more) * self.data.x.nbytes


def mean_and_std(mean: Any, var: Any) -> Array:
    """Return (2, C) in long double, so that no error is added."""
    return np.stack([np.asarray(mean, np.longdouble), np.sqrt(np.asarray(var, np.longdouble))])


def slices(count: int, size: int) -> Iterator[slice]:
    """Cut so many equal parts of an array of `size` into slices that are small in float64."""
    step = max(1, count * _SLICE_BYTES // max(1, 8 * size))
    return (slice(start, start + step) for start in range(0, count, step))


def largest_error(result: Array, exact: Array) -> float:
    """Return the largest absolute difference; raise where it is none."""
    if result.shape != exact.shape:
        raise ValueError(f"the result has shape {result.shape}, not {exact.shape}")
    parts = ((result[part], exact[part]) for part in slices(len(exact), exact.size))
    error = float(np.max([np.abs(ours - theirs).max() for ours, theirs in parts]))
    if math.isnan(error):
        raise ValueError("the result is not a number in places")
    return error
