"""The primitives of whitening on arrays: normalize, evaluate and gradient, by matrix products.

As in `_primitives`, each validates first, and writes nothing before everything has been checked. A
batch is seen as columns: one for each sample, of all its channels, group by group. They are copied
to float64 piece by piece, so that no temporary is as large as the batch, and multiplied by NumPy's
BLAS, with threads of its own; it decides the last bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from bnfast import _primitives, _validation
from bnfast._typing import Array

WHITENING = "whitening"
COVARIANCE = "covariance"
AVERAGED = (WHITENING, COVARIANCE)  # what the running matrix may be

# The columns of a piece, in float64: enough of them for the BLAS, and all in the caches. In large
# groups, though, so many for each row that adding up the matrices costs little beside the products.
PIECE_BYTES = 2 << 20
COLUMNS_OF_A_ROW = 4

# But a batch that is large beside its matrices is never a piece as a whole.
FEWEST_PIECES = 16

# Where fewer samples than these lie together for a channel, and at least so many channels, columns
# rather than rows of a piece are neighbours: copying short runs takes longer than the products.
FEWEST_NEIGHBOURS = 8
FEWEST_CHANNELS = 16


class Statistics(Protocol):
    """What a batch is whitened with, of float64."""

    @property
    def mean(self) -> Array:
        """(C,)."""

    @property
    def matrix(self) -> Array:
        """(G, C / G, C / G)."""


class Constant(NamedTuple):
    """Statistics that do not come from the batch."""

    mean: Array
    matrix: Array


AnyStatistics = TypeVar("AnyStatistics", bound=Statistics)


class Operand(NamedTuple):
    """What a batch is multiplied by: the matrix of each group, after the centre was taken away."""

    array: Array
    matrix: Array
    centre: Array | None


def normalize(
    x: object,
    axis: object,
    num_groups: object,
    whiten: Callable[[Array, Array], AnyStatistics],
    weight: object,
    bias: object,
    running_mean: object = None,
    running_matrix: object = None,
    momentum: object = 0.0,
    averaged: object = WHITENING,
    out: object = None,
) -> tuple[Array, AnyStatistics]:
    """Return y, and what `whiten` made of the mean and the covariance of each group.

    The running statistics, both given or neither, are updated with `momentum` as the weight of the
    batch.
    """
    array, axis, channels = _validation.batch("x", x, axis)
    _validation.full_precision("x", array)
    _validation.room_for_axes("x", array, 2)
    shape = _shape_of_matrices(num_groups, channels)
    new = _validation.real("momentum", momentum)
    of_covariance = _validation.choice("averaged", averaged, AVERAGED) == COVARIANCE
    scale = _validation.channel_parameter("weight", weight, channels)
    shift = _validation.channel_parameter("bias", bias, channels)
    tracked = _validation.running_statistics(
        *(running_mean, running_matrix, array, channels),
        names=("running_mean", "running_matrix"),
        shape=shape,
    )
    reads = {"x": array, "weight": weight, "bias": bias}
    reads |= {"running_mean": running_mean, "running_matrix": running_matrix}
    y = _output(out, array, reads)
    if array.size == 0:
        return y, whiten(np.zeros(channels), np.zeros(shape))
    with np.errstate(all="ignore"):
        centre, rest, covariance = _mean_and_covariance(array, axis, shape)
        saved = whiten(centre + rest.reshape(-1), covariance)
        _apply(array, axis, centre, rest, saved.matrix, scale, shift, y)
    if tracked is not None:
        matrix = covariance if of_covariance else saved.matrix
        names = "running_mean", "running_matrix"
        _primitives.update_running(tracked, new, saved.mean, matrix, names=names)
    return y, saved


def evaluate(
    x: object,
    axis: object,
    num_groups: object,
    whiten: Callable[[Array, Array], Statistics],
    weight: object,
    bias: object,
    running_mean: object,
    running_matrix: object,
    averaged: object = WHITENING,
    out: object = None,
) -> tuple[Array, Statistics]:
    """Return y from running statistics, and the mean and the matrix that made it (float64)."""
    array, axis, channels = _validation.batch("x", x, axis)
    _validation.full_precision("x", array)
    _validation.room_for_axes("x", array, 2)
    shape = _shape_of_matrices(num_groups, channels)
    of_covariance = _validation.choice("averaged", averaged, AVERAGED) == COVARIANCE
    centre = _validation.required_channel_parameter("running_mean", running_mean, channels)
    running = _validation.shaped("running_matrix", running_matrix, shape)
    scale = _validation.channel_parameter("weight", weight, channels)
    shift = _validation.channel_parameter("bias", bias, channels)
    reads = {"x": array, "weight": weight, "bias": bias}
    reads |= {"running_mean": running_mean, "running_matrix": running_matrix}
    y = _output(out, array, reads)
    mean, matrix = centre.astype(np.float64), running.astype(np.float64)
    saved = whiten(mean, matrix) if of_covariance else Constant(mean, matrix)
    if array.size > 0:
        with np.errstate(all="ignore"):
            _apply(array, axis, mean, np.zeros(shape[:2]), saved.matrix, scale, shift, y)
    return y, saved


def gradient(
    dy: object,
    x: object,
    axis: object,
    mean: object,
    matrix: object,
    of_covariance: Callable[[Array], Array] | None,
    weight: object,
    out: object = None,
) -> tuple[Array, Array, Array]:
    """Return dx, dweight and dbias, the latter of the dtype of `weight`, or of x without one.

    `of_covariance` returns the gradient of the covariance for one of the matrix; it is None where
    mean and matrix are constants.
    """
    array, axis, channels = _validation.batch("x", x, axis)
    _validation.full_precision("x", array)
    _validation.room_for_axes("x", array, 2)
    upstream = _validation.upstream_gradient(dy, array)
    centre = _validation.saved_statistic("mean", mean, (channels,))
    whitening = _validation.matrices_of_groups("matrix", matrix, channels)
    scale = _validation.channel_parameter("weight", weight, channels)
    reads = {"dy": upstream, "x": array, "weight": weight, "mean": mean, "matrix": matrix}
    dx = _output(out, array, reads)
    if array.size == 0:
        nothing = _validation.rounded_gradient("weight", weight, np.zeros(channels), array)
        return dx, nothing, nothing.copy()
    with np.errstate(all="ignore"):
        centre, whitening = centre.astype(np.float64), whitening.astype(np.float64)
        products, sums = _products(array, axis, centre, whitening.shape, upstream)
        gamma = _of_groups(scale, whitening.shape, 1.0)
        backwards = whitening.swapaxes(1, 2) * gamma[:, None, :]
        operands = [Operand(upstream, backwards, None)]
        shift = np.zeros(gamma.shape)
        if of_covariance is not None:
            count = array.size // channels
            pull = of_covariance(gamma[..., None] * products) / count
            operands.append(Operand(array, pull + pull.swapaxes(1, 2), centre))
            shift = -(backwards @ (sums / count)[..., None])[..., 0]
        of_weight = (products * whitening).sum(2)
        _multiply(operands, axis, shift, dx)
    each = of_weight.reshape(-1), sums.reshape(-1)
    dweight, dbias = (_validation.rounded_gradient("weight", weight, s, array) for s in each)
    return dx, dweight, dbias


def _output(out: object, x: Array, arguments: Mapping[str, object]) -> Array:
    if out is None:
        return _primitives.empty_output(x)
    return _validation.output(out, x, arguments)


def _shape_of_matrices(num_groups: object, channels: int) -> tuple[int, int, int]:
    """(G, C / G, C / G)."""
    _validation.channels_of_group(num_groups, channels)
    groups = _validation.integer("num_groups", num_groups)
    return groups, channels // groups, channels // groups


def _of_groups(values: Array | None, shape: tuple[int, ...], default: float) -> Array:
    """Return values of channels as (G, C / G) of float64."""
    if values is None:
        return np.full(shape[:2], default)
    return values.astype(np.float64).reshape(shape[:2])


def mean_and_covariance(x: Array, axis: int, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Return the mean (C,) of a batch, and the covariance of each group, of this shape."""
    with np.errstate(all="ignore"):
        centre, rest, covariance = _mean_and_covariance(x, axis, shape)
        return centre + rest.reshape(-1), covariance


def _mean_and_covariance(x: Array, axis: int, shape: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """Return the mean as two summands, (C,) and (G, C / G), and the covariance of each group."""
    # Around the mean of the first piece, one pass gives both: what that is off costs the covariance
    # no more digits than the number of pieces has.
    first, _ = next(iter(_Pieces(((x, None),), axis, shape[0])))
    centre = first.mean(2).reshape(-1)
    products, sums = _products(x, axis, centre, shape)
    count = x.size // len(centre)
    rest = sums / count
    covariance = products / count - rest[:, :, None] * rest[:, None, :]
    return centre, rest, covariance


def _apply(
    x: Array,
    axis: int,
    centre: Array,
    rest: Array,
    matrix: Array,
    weight: Array | None,
    bias: Array | None,
    out: Array,
) -> None:
    """Write weight * (matrix (x - centre - rest)) + bias.

    The mean comes in two summands: in one it would cost float64 data ``|mean|/std`` ulps.
    """
    scaled = _of_groups(weight, matrix.shape, 1.0)[..., None] * matrix
    shift = _of_groups(bias, matrix.shape, 0.0) - (scaled @ rest[..., None])[..., 0]
    _multiply([Operand(x, scaled, centre)], axis, shift, out)


def _products(
    x: Array, axis: int, centre: Array, shape: tuple[int, ...], dy: Array | None = None
) -> tuple[Array, Array]:
    """Return ``left (x - centre).T`` and the sum of left, of each group, over all columns.

    left is `dy` or, without it, x - centre.
    """
    products, sums = np.zeros(shape), np.zeros(shape[:2])
    channels_per_group = shape[1]
    operands = ((x, centre),) if dy is None else ((x, centre), (dy, None))
    for columns, _ in _Pieces(operands, axis, shape[0]):
        right = columns[:, :channels_per_group]
        left = right if dy is None else columns[:, channels_per_group:]
        products += left @ right.swapaxes(1, 2)
        sums += left @ np.ones(columns.shape[2])
    return products, sums


def _multiply(operands: list[Operand], axis: int, shift: Array, out: Array) -> None:
    """Write the sum of ``matrix (array - centre)`` over the operands, plus shift (G, C / G)."""
    matrix = np.concatenate([operand.matrix for operand in operands], axis=2)
    pieces = _Pieces([(o.array, o.centre) for o in operands], axis, len(matrix))
    products = _Memory(matrix.shape[:2], pieces.max_columns, pieces.columns_are_neighbours)
    target = pieces.view(out)
    for columns, index in pieces:
        piece = target[index]
        product, block = products.columns(piece.shape[2:])
        np.matmul(matrix, columns, out=product)
        product += shift[..., None]
        np.copyto(piece, block, casting="same_kind")


class _Memory:
    """Memory that is used again for every piece: at most `max_columns` float64 columns."""

    def __init__(
        self, rows: tuple[int, ...], max_columns: int, columns_are_neighbours: bool
    ) -> None:
        self._rows = rows
        self._memory = np.empty(math.prod(rows) * max_columns)
        self._columns_are_neighbours = columns_are_neighbours

    def columns(self, sizes: tuple[int, ...]) -> tuple[Array, Array]:
        """Return it as (*rows, samples), and as (*rows, *sizes of the axes of samples)."""
        used = self._memory[: math.prod(self._rows) * math.prod(sizes)]
        if self._columns_are_neighbours:
            block = used.reshape(*sizes, *self._rows)
            last = range(len(sizes), block.ndim)
            block = block.transpose(*last, *range(len(sizes)))
        else:
            block = used.reshape(*self._rows, *sizes)
        return block.reshape(*self._rows, -1), block


class _Pieces:
    """Pieces of arrays of one shape as columns: (G, operands * C / G, samples) of float64.

    Iterating yields the columns, in memory that the next piece uses again, and the index of the
    piece in a `view` of an array.
    """

    def __init__(
        self, operands: Sequence[tuple[Array, Array | None]], axis: int, groups: int
    ) -> None:
        first, _ = operands[0]
        self._axis, self._groups = axis, groups
        step = abs(first.strides[axis])
        steps = {d: abs(first.strides[d]) for d in range(first.ndim) if d != axis}
        self._samples = sorted(steps, key=lambda d: -steps[d])  # as they lie in memory
        self._sizes = tuple([first.shape[d] for d in self._samples])
        neighbours = math.prod([first.shape[d] for d in steps if steps[d] < step])
        channels = first.shape[axis]
        self.columns_are_neighbours = neighbours < FEWEST_NEIGHBOURS and channels >= FEWEST_CHANNELS
        channels_per_group = channels // groups
        bytes_of_a_column = 8 * channels * len(operands)
        samples = math.prod(self._sizes)
        wanted = min(COLUMNS_OF_A_ROW * channels_per_group, samples // FEWEST_PIECES)
        self.max_columns = min(max(PIECE_BYTES // bytes_of_a_column, wanted, 1), samples)
        self._views = [self.view(array) for array, _ in operands]
        self._centres = [
            None if c is None else c.reshape(groups, channels_per_group) for _, c in operands
        ]

    def view(self, array: Array) -> Array:
        """Return an array of the same shape as (G, C / G, *axes of samples)."""
        turned = array.transpose(self._axis, *self._samples)
        return turned.reshape(self._groups, -1, *self._sizes)

    def _indices(self) -> Iterator[tuple[Any, ...]]:
        """Cut one axis of samples; those before it are walked index by index, the others whole."""
        cut, inner = len(self._sizes) - 1, 1
        while cut > 0 and inner * self._sizes[cut] <= self.max_columns:
            inner *= self._sizes[cut]
            cut -= 1
        pieces = -(-self._sizes[cut] // (self.max_columns // inner))
        length = -(-self._sizes[cut] // pieces)
        for before in np.ndindex(self._sizes[:cut]):
            for start in range(0, self._sizes[cut], length):
                yield (slice(None), slice(None), *before, slice(start, start + length))

    def __iter__(self) -> Iterator[tuple[Array, tuple[Any, ...]]]:
        channels_per_group = self._views[0].shape[1]
        rows = (self._groups, len(self._views), channels_per_group)
        memory = _Memory(rows, self.max_columns, self.columns_are_neighbours)
        for index in self._indices():
            pieces = [view[index] for view in self._views]
            _, block = memory.columns(pieces[0].shape[2:])
            for n, (piece, centre) in enumerate(zip(pieces, self._centres, strict=True)):
                part = block[:, n]
                np.copyto(part, piece)
                if centre is not None:
                    part -= np.expand_dims(centre, tuple(range(2, part.ndim)))
            yield block.reshape(self._groups, len(pieces) * channels_per_group, -1), index
