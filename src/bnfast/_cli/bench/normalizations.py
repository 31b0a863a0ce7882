"""What is measured, each with its operations, its shapes, its definition and bnfast's call."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Generic

import numpy as np

import bnfast
from bnfast import _dtypes
from bnfast import _reference as reference
from bnfast._cli.bench import workloads
from bnfast._cli.bench.cell import (
    EPS,
    LEAST_LENGTH,
    OFFSET,
    Activated,
    AnyData,
    Batch,
    Cell,
    Data,
    Filters,
    Matrix,
    Singular,
    Table,
    aligned_empty,
    mean_and_std,
    slices,
)
from bnfast._cli.bench.rivals import first
from bnfast._cli.bench.workloads import Shape
from bnfast._typing import Array


class Normalization(ABC, Generic[AnyData]):
    """One of the family, as the benchmark knows it."""

    operations: tuple[str, ...] = ("forward", "backward")
    shapes: str  # what is measured unless the command line says otherwise
    quick_shapes: str
    tracked_shapes: str
    parts: tuple[str, ...] = ()  # of a result, where each has an error of its own
    takes_halves = True  # data of 16 bits

    @abstractmethod
    def operations_on(self, shape: Shape) -> tuple[str, ...]:
        """Return those that can be: most statistics need more than one value."""

    @abstractmethod
    def layouts_of(self, shape: Shape, layouts: tuple[str, ...]) -> tuple[str, ...]:
        """Return the layouts in which a shape is measured, where these were asked for."""

    @abstractmethod
    def make(self, shape: Shape, layout: str, dtype: Any, mean: float, offset: int) -> AnyData:
        """Return normal values of standard deviation 1 around `mean`, and what goes with them.

        What is as large as they are begins `offset` bytes past a page, as they do.
        """

    @abstractmethod
    def exact(self, operation: str, data: AnyData) -> Array:
        """Return y or dx in float64."""

    @abstractmethod
    def ours(self, operation: str, data: AnyData, out: Array | None) -> Callable[[], Any]:
        """Return bnfast's call: it returns y or dx, or that and more."""

    def read(self, results: Any) -> Array:
        """Return what `exact` is of, from what bnfast's call returned."""
        array: Array = first(results)
        return array


def _normal_arrays(
    rng: np.random.Generator, shape: Shape, dtype: Any, mean: float, offset: int
) -> tuple[Array, Array, Array]:
    """Return x around `mean` and dy around 0, of standard deviation 1, and memory for an output."""
    x, dy, out = (aligned_empty(shape, dtype, offset) for _ in range(3))
    _draw(rng, x, mean)
    _draw(rng, dy, 0.0)
    return x, dy, out


def _draw(rng: np.random.Generator, x: Array, mean: float) -> None:
    """Fill an array with normal values, which are rounded where it has 16 bits."""
    dtype = _dtypes.computed_in(x.dtype)
    wide = x if dtype == x.dtype else np.empty(x.shape, dtype)
    rng.standard_normal(dtype=dtype.type, out=wide)
    wide += dtype.type(mean)
    if wide is not x:
        x[...] = wide


def _piece(batch: Batch, of_x: Any, of_statistics: Any, of_parameters: Any) -> Batch:
    """Return the same with parts of its arrays."""
    parts = {
        **dict.fromkeys(("x", "dy", "out"), of_x),
        **dict.fromkeys(("weight", "bias"), of_parameters),
        **dict.fromkeys(("mean", "var", "invstd"), of_statistics),
        **dict.fromkeys(("exact_mean", "exact_var", "exact_invstd"), of_statistics),
    }
    if isinstance(batch, Activated):
        parts |= dict.fromkeys(("y", "residual"), of_x)
    arrays = {name: getattr(batch, name) for name in parts}
    pieces: dict[str, Any] = {n: None if a is None else a[parts[n]] for n, a in arrays.items()}
    return replace(batch, **pieces)


class _OfBatches(Normalization[Batch]):
    """Of data, with the mean and the variance of what has them together."""

    @abstractmethod
    def shape_of_statistics(self, shape: Shape) -> Shape:
        """Return the shape of mean, var and invstd."""

    @abstractmethod
    def pieces(self, batch: Batch) -> Iterator[Batch]:
        """Cut a batch where no statistics are shared, into views that are small in float64."""

    @abstractmethod
    def moments(self, b: Batch) -> tuple[Array, Array]:
        """Return mean and var of a piece in float64."""

    @abstractmethod
    def exact_piece(self, operation: str, b: Batch) -> Array:
        """Return y or dx of a piece in float64."""

    def make(self, shape: Shape, layout: str, dtype: Any, mean: float, offset: int) -> Batch:
        """Return values, parameters and statistics."""
        in_memory, axis = workloads.in_layout(shape, layout)
        rng = np.random.default_rng(0)
        arrays = _normal_arrays(rng, in_memory, dtype, mean, offset)
        computed_in = _dtypes.computed_in(dtype)
        # Values that x could have: whoever wants parameters of the type of x gets the same ones.
        weight, bias = rng.uniform(0.5, 1, (2, in_memory[axis])).astype(dtype).astype(computed_in)
        statistics = exact_mean, exact_var, exact_invstd = np.empty(
            (3, *self.shape_of_statistics(shape))
        )
        batch = Batch(shape, layout, *arrays, axis, weight, bias, *statistics, *statistics)
        for piece in self.pieces(batch):
            piece.exact_mean[...], piece.exact_var[...] = self.moments(piece)
        np.divide(1, np.sqrt(exact_var + EPS), out=exact_invstd)
        return replace(
            batch,
            mean=exact_mean.astype(computed_in),
            var=exact_var.astype(computed_in),
            invstd=exact_invstd.astype(computed_in),
        )

    def exact(self, operation: str, data: Batch) -> Array:
        """Return y or dx, made piece by piece."""
        exact = np.empty(data.x.shape)
        for piece in self.pieces(replace(data, out=exact)):
            piece.out[...] = self.exact_piece(operation, piece)
        return exact


class _OfChannels(_OfBatches):
    """With a weight and a bias for each channel."""

    def layouts_of(self, shape: Shape, layouts: tuple[str, ...]) -> tuple[str, ...]:
        """Return all, or one of them where they are the same."""
        return workloads.layouts_of(shape, layouts)

    @abstractmethod
    def together(self, channels: int) -> int:
        """Return how many neighbouring channels share their statistics."""

    def pieces(self, batch: Batch) -> Iterator[Batch]:
        """Cut between groups of channels."""
        channels = batch.weight.size
        together = self.together(channels)
        for groups in slices(channels // together, batch.x.size):
            part = slice(groups.start * together, groups.stop * together)
            of_x = (slice(None), part) if batch.axis == 1 else (..., part)
            yield _piece(batch, of_x, (..., groups), part)


class BatchNorm(_OfChannels):
    """Of each channel over the batch, and with statistics that are given: inference."""

    operations = ("inference", "training", "backward")
    shapes, quick_shapes, tracked_shapes = "resnet50,small", "quick", "tracked"

    def operations_on(self, shape: Shape) -> tuple[str, ...]:
        """Return nothing of training where there is one value per channel."""
        alone = math.prod(shape) == shape[1]
        return self.operations[:1] if alone else self.operations

    def together(self, channels: int) -> int:
        """Return one."""
        return 1

    def shape_of_statistics(self, shape: Shape) -> Shape:
        """(C,)."""
        return shape[1:2]

    def moments(self, b: Batch) -> tuple[Array, Array]:
        """Return mean and var."""
        count, mean, m2 = reference.moments(b.x, b.axis)
        return mean, m2 / count

    def exact_piece(self, operation: str, b: Batch) -> Array:
        """Return y or dx."""
        if operation == "inference":
            statistics = b.mean, b.var
            return reference.scale_shift(b.x, *statistics, b.weight, b.bias, EPS, axis=b.axis)
        if operation == "training":
            return reference.batch_norm_forward(b.x, b.weight, b.bias, EPS, axis=b.axis)[0]
        saved = b.exact_mean, b.exact_invstd, b.weight
        return reference.batch_norm_backward(b.dy, b.x, *saved, axis=b.axis)[0]

    def ours(self, operation: str, b: Batch, out: Array | None) -> Callable[[], Any]:
        """Return bnfast's call."""
        if operation == "inference":
            arguments = b.x, b.mean, b.var, b.weight, b.bias
            return partial(bnfast.batch_norm, *arguments, eps=EPS, axis=b.axis, out=out)
        if operation == "training":
            forward = partial(bnfast.batch_norm_forward, b.x, b.weight, b.bias, EPS)
            return partial(forward, axis=b.axis, out=out)
        saved = b.dy, b.x, b.exact_mean, b.exact_invstd, b.weight
        return partial(bnfast.batch_norm_backward, *saved, axis=b.axis, out=out)


class ActivatedBatchNorm(BatchNorm):
    """Batch norm and ReLU, and between them the sum with a residual."""

    shapes = "resnet50"
    takes_halves = False

    def __init__(self, *, adds: bool) -> None:
        self.adds = adds

    def make(self, shape: Shape, layout: str, dtype: Any, mean: float, offset: int) -> Activated:
        """Return a batch; dy is 0 where rounding decides on which side of 0 an output lies."""
        batch = super().make(shape, layout, dtype, mean, offset)
        y = aligned_empty(batch.x.shape, dtype, offset)
        residual = None
        if self.adds:
            residual = aligned_empty(batch.x.shape, dtype, offset)
            _draw(np.random.default_rng(1), residual, 0.0)
        made = Activated(**vars(batch), residual=residual, y=y)
        for cut in self.pieces(made):
            piece: Any = cut
            z = self._before_activation("training", piece)
            piece.y[...] = np.maximum(z, 0)
            piece.dy[np.abs(z) < 1e-4] = 0
        return made

    def _before_activation(self, operation: str, b: Any) -> Array:
        z = super().exact_piece(operation, b)
        return reference.activate(z, residual=b.residual)

    def exact_piece(self, operation: str, b: Any) -> Array:
        """Return y or dx."""
        if operation != "backward":
            return reference.activate(self._before_activation(operation, b), "relu")
        return super().exact_piece(operation, replace(b, dy=np.where(b.y > 0, b.dy, 0)))

    def ours(self, operation: str, b: Any, out: Array | None) -> Callable[[], Any]:
        """Return bnfast's call: the gradient is given y where there is a residual."""
        call: Any = super().ours(operation, b, out)
        if operation != "backward":
            return partial(call, activation="relu", residual=b.residual)
        if b.residual is None:
            return partial(call, activation="relu", bias=b.bias)
        return partial(call, activation="relu", y=b.y, residual=True)


class GroupNorm(_OfChannels):
    """Of 32 groups of channels of each sample, or of the most below 32 that divide them."""

    shapes, quick_shapes, tracked_shapes = "groups", "quick-groups", "tracked-groups"
    most = 32

    def operations_on(self, shape: Shape) -> tuple[str, ...]:
        """Return none where all there is is one value per group of one sample."""
        alone = math.prod(shape) == math.prod(self.shape_of_statistics(shape)[1:])
        return () if alone else self.operations

    def together(self, channels: int) -> int:
        """Return how many channels a group has."""
        return channels // max(g for g in range(1, self.most + 1) if channels % g == 0)

    def shape_of_statistics(self, shape: Shape) -> Shape:
        """(N, groups)."""
        return shape[0], shape[1] // self.together(shape[1])

    def moments(self, b: Batch) -> tuple[Array, Array]:
        """Return mean and var."""
        _, mean, invstd = reference.group_norm_forward(b.x, b.num_groups, eps=EPS, axis=b.axis)
        return mean, invstd**-2 - EPS

    def exact_piece(self, operation: str, b: Batch) -> Array:
        """Return y or dx."""
        if operation == "forward":
            arguments = b.x, b.num_groups, b.weight, b.bias, EPS
            return reference.group_norm_forward(*arguments, axis=b.axis)[0]
        saved = b.exact_mean, b.exact_invstd, b.weight
        return reference.group_norm_backward(b.dy, b.x, *saved, axis=b.axis)[0]

    def ours(self, operation: str, b: Batch, out: Array | None) -> Callable[[], Any]:
        """Return bnfast's call."""
        if operation == "forward":
            arguments = b.x, b.num_groups, b.weight, b.bias, EPS
            return partial(bnfast.group_norm_forward, *arguments, axis=b.axis, out=out)
        saved = b.dy, b.x, b.exact_mean, b.exact_invstd, b.weight
        return partial(bnfast.group_norm_backward, *saved, axis=b.axis, out=out)


class InstanceNorm(GroupNorm):
    """Of each channel of each sample: groups of one."""

    shapes = "groups,small"

    def operations_on(self, shape: Shape) -> tuple[str, ...]:
        """Return none where planes are single values."""
        return () if math.prod(shape[2:]) == 1 else self.operations

    def together(self, channels: int) -> int:
        """Return one."""
        return 1

    def ours(self, operation: str, b: Batch, out: Array | None) -> Callable[[], Any]:
        """Return bnfast's call."""
        if operation == "forward":
            forward = partial(bnfast.instance_norm_forward, b.x, b.weight, b.bias, EPS)
            return partial(forward, axis=b.axis, out=out)
        saved = b.dy, b.x, b.exact_mean, b.exact_invstd, b.weight
        return partial(bnfast.instance_norm_backward, *saved, axis=b.axis, out=out)


class LayerNorm(_OfBatches):
    """Of each row, around its mean; with a weight and a bias for each of its elements."""

    shapes, quick_shapes, tracked_shapes = "rows", "quick-rows", "tracked-rows"
    centred = True

    def operations_on(self, shape: Shape) -> tuple[str, ...]:
        """Return both: a row may be a single value."""
        return self.operations

    def layouts_of(self, shape: Shape, layouts: tuple[str, ...]) -> tuple[str, ...]:
        """Return the one that rows have."""
        return (workloads.ROWS,)

    def shape_of_statistics(self, shape: Shape) -> Shape:
        """(rows,), in as many dimensions as they have."""
        return shape[:-1]

    def pieces(self, batch: Batch) -> Iterator[Batch]:
        """Cut between rows, in two dimensions."""
        rows, length = math.prod(batch.shape[:-1]), batch.shape[-1]
        as_matrix: dict[str, Any] = {
            name: getattr(batch, name).reshape(rows, length) for name in ("x", "dy", "out")
        }
        for name in ("mean", "var", "invstd", "exact_mean", "exact_var", "exact_invstd"):
            as_matrix[name] = getattr(batch, name).reshape(rows)
        matrix = replace(batch, **as_matrix)
        return (_piece(matrix, part, part, ...) for part in slices(rows, batch.x.size))

    def moments(self, b: Batch) -> tuple[Array, Array]:
        """Return mean, or 0, and var."""
        arguments = b.x, (1,), None, None, EPS
        _, mean, invstd = reference.layer_norm_forward(*arguments, centred=self.centred)
        return mean, invstd**-2 - EPS

    def exact_piece(self, operation: str, b: Batch) -> Array:
        """Return y or dx."""
        if operation == "forward":
            arguments = b.x, (1,), b.weight, b.bias if self.centred else None, EPS
            return reference.layer_norm_forward(*arguments, centred=self.centred)[0]
        saved = b.exact_mean, b.exact_invstd, b.weight
        return reference.layer_norm_backward(b.dy, b.x, (1,), *saved, centred=self.centred)[0]

    def ours(self, operation: str, b: Batch, out: Array | None) -> Callable[[], Any]:
        """Return bnfast's call."""
        length = b.shape[-1]
        if operation == "forward":
            arguments = b.x, length, b.weight, b.bias, EPS
            return partial(bnfast.layer_norm_forward, *arguments, out=out)
        saved = b.dy, b.x, length, b.exact_mean, b.exact_invstd, b.weight
        return partial(bnfast.layer_norm_backward, *saved, out=out)


class RMSNorm(LayerNorm):
    """Of each row, around 0, without a bias."""

    centred = False

    def ours(self, operation: str, b: Batch, out: Array | None) -> Callable[[], Any]:
        """Return bnfast's call."""
        length = b.shape[-1]
        if operation == "forward":
            return partial(bnfast.rms_norm_forward, b.x, length, b.weight, EPS, out=out)
        saved = b.dy, b.x, length, b.exact_invstd, b.weight
        return partial(bnfast.rms_norm_backward, *saved, out=out)


class _OfWeights(Normalization[AnyData]):
    """Of weights rather than data: filters along the first axis, one after the other."""

    shapes, quick_shapes, tracked_shapes = "weights", "quick-weights", "tracked-weights"
    takes_halves = False

    def operations_on(self, shape: Shape) -> tuple[str, ...]:
        """Return both: a filter may be a single value."""
        return self.operations

    def layouts_of(self, shape: Shape, layouts: tuple[str, ...]) -> tuple[str, ...]:
        """Return the one that filters have."""
        return (workloads.FILTERS,)


class WeightNorm(_OfWeights[Filters]):
    """Of each filter, which gets a length of its own."""

    def make(self, shape: Shape, layout: str, dtype: Any, mean: float, offset: int) -> Filters:
        """Return directions and lengths, of filters whose elements are as large as those of x."""
        rng = np.random.default_rng(0)
        arrays = _normal_arrays(rng, shape, dtype, mean, offset)
        g = (rng.uniform(0.5, 1, shape[0]) * math.sqrt(math.prod(shape[1:]))).astype(dtype)
        _, norm = reference.weight_norm_forward(arrays[0], g)
        return Filters(shape, layout, *arrays, g, norm.astype(dtype), norm)

    def exact(self, operation: str, data: Filters) -> Array:
        """Return w or dv."""
        if operation == "forward":
            return reference.weight_norm_forward(data.x, data.g)[0]
        return reference.weight_norm_backward(data.dy, data.x, data.g, data.exact_norm)[0]

    def ours(self, operation: str, data: Filters, out: Array | None) -> Callable[[], Any]:
        """Return bnfast's call."""
        if operation == "forward":
            return partial(bnfast.weight_norm_forward, data.x, data.g, out=out)
        saved = data.dy, data.x, data.g, data.exact_norm
        return partial(bnfast.weight_norm_backward, *saved, out=out)


class SpectralNorm(_OfWeights[Matrix]):
    """Of all weights together, by their largest singular value; after one power iteration."""

    def make(self, shape: Shape, layout: str, dtype: Any, mean: float, offset: int) -> Matrix:
        """Return weights, vectors to begin with, and what is found of them."""
        rng = np.random.default_rng(0)
        arrays = _normal_arrays(rng, shape, dtype, mean, offset)
        sizes = shape[0], math.prod(shape[1:])
        u, v = ((z / np.linalg.norm(z)).astype(dtype) for z in map(rng.standard_normal, sizes))
        _, *exact = reference.spectral_norm_forward(arrays[0], u, v, 1, LEAST_LENGTH)
        found = Singular(*(np.asarray(value, dtype) for value in exact))
        return Matrix(shape, layout, *arrays, u, v, found, Singular(*exact))

    def exact(self, operation: str, data: Matrix) -> Array:
        """Return y or dw."""
        if operation == "forward":
            begun = data.x, data.u, data.v
            return reference.spectral_norm_forward(*begun, 1, LEAST_LENGTH)[0]
        return reference.spectral_norm_backward(data.dy, data.x, *data.exact)

    def ours(self, operation: str, data: Matrix, out: Array | None) -> Callable[[], Any]:
        """Return bnfast's call."""
        if operation == "forward":
            begun = data.x, data.u, data.v
            return partial(bnfast.spectral_norm_forward, *begun, 1, LEAST_LENGTH, out=out)
        sigma, u, v = data.exact
        saved = data.dy, data.x, float(sigma), u, v
        return partial(bnfast.spectral_norm_backward, *saved, out=out)


class TableMoments(Normalization[Table]):
    """Not a normalization, but what all are made of: the statistics of the columns of a table."""

    operations = ("moments",)
    shapes, quick_shapes, tracked_shapes = "tables", "quick-tables", "tracked-tables"
    parts = ("mean", "std")

    def operations_on(self, shape: Shape) -> tuple[str, ...]:
        """Return none where there is one row."""
        return () if math.prod(shape[:-1]) == 1 else self.operations

    def layouts_of(self, shape: Shape, layouts: tuple[str, ...]) -> tuple[str, ...]:
        """Return the one that tables have."""
        return (workloads.TABLE,)

    def make(self, shape: Shape, layout: str, dtype: Any, mean: float, offset: int) -> Table:
        """Return values."""
        x = aligned_empty(shape, dtype, offset)
        _draw(np.random.default_rng(0), x, mean)
        return Table(shape, layout, x)

    def exact(self, operation: str, data: Table) -> Array:
        """Return mean and standard deviation, (2, C), made piece by piece.

        In long double, for the statistics of float64 data may be as exact as float64 sums are.
        """
        rows = data.rows
        pieces = [
            rows[part].astype(_dtypes.computed_in(data.dtype), copy=False)
            for part in slices(len(rows), 2 * rows.size)
        ]
        totals = [piece.sum(0, np.longdouble) for piece in pieces]
        mean = np.sum(totals, 0) / len(rows)
        squares = [np.square(piece - mean).sum(0) for piece in pieces]
        return mean_and_std(mean, np.sum(squares, 0) / len(rows))

    def ours(self, operation: str, data: Table, out: Array | None) -> Callable[[], Any]:
        """Return bnfast's call."""
        return partial(bnfast.moments, data.x, -1)

    def read(self, results: Any) -> Array:
        """Return mean and standard deviation."""
        return mean_and_std(results.mean, np.asarray(results.m2, np.longdouble) / results.count)


NORMALIZATIONS: dict[str, Normalization[Any]] = {
    "batch": BatchNorm(),
    "batch-relu": ActivatedBatchNorm(adds=False),
    "batch-add-relu": ActivatedBatchNorm(adds=True),
    "layer": LayerNorm(),
    "rms": RMSNorm(),
    "group": GroupNorm(),
    "instance": InstanceNorm(),
    "weight": WeightNorm(),
    "spectral": SpectralNorm(),
    "moments": TableMoments(),
}


def called(names: Iterable[str]) -> str:
    """Return what a sentence calls these: ``layer, rms norm``, ``weight norm and moments``."""
    names = list(names)
    norms = ", ".join(name for name in names if name != "moments")
    return " and ".join([f"{norms} norm"] * bool(norms) + ["moments"] * ("moments" in names))


def make_data(
    normalization: str,
    shape: Shape,
    layout: str,
    dtype: Any,
    mean: float = 0.0,
    offset: int = OFFSET,
) -> Any:
    """Return the data that a normalization is measured on: a `Batch`, or what is of its kind."""
    return NORMALIZATIONS[normalization].make(shape, layout, np.dtype(dtype), mean, offset)


def exact_result(cell: Cell[Data]) -> Array:
    """Return y or dx in float64, or statistics."""
    return NORMALIZATIONS[cell.normalization].exact(cell.operation, cell.data)
