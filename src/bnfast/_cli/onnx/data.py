"""The data that a model is run with: arrays in files, read batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from onnx import helper

from bnfast._cli.failure import Failure, cannot_be_read
from bnfast._cli.stats.arrays import Npy, open_npy, open_npz
from bnfast._typing import Array

_ENDINGS = (".npy", ".npz")

AnArray = TypeVar("AnArray")


class Input(NamedTuple):
    """What a model takes: the first axis is that of the samples; None is a size that it leaves."""

    name: str
    dtype: np.dtype[Any]
    sizes: tuple[int | None, ...] | None  # None where it leaves their number, too

    @classmethod
    def of(cls, value: Any) -> Input:
        """Return what a value of a graph says, or refuse what is no array of samples."""
        tensor = value.type.tensor_type
        if not value.type.HasField("tensor_type"):
            raise Failure(f"input {value.name}: expected a tensor, got another type")
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        sizes = None
        if tensor.HasField("shape"):
            # Exporters write sizes that they leave as names, as nothing, or as -1.
            sizes = tuple(d.dim_value if d.dim_value > 0 else None for d in tensor.shape.dim)
            if not sizes:
                raise Failure(f"input {value.name}: expected an axis of samples, got a scalar")
        return cls(value.name, dtype, sizes)

    def __str__(self) -> str:
        if self.sizes is None:
            return f"{self.dtype} of any shape"
        sizes = ", ".join("any" if size is None else str(size) for size in self.sizes)
        return f"{self.dtype} of shape ({sizes})"

    def takes(self, array: Npy) -> bool:
        """Whether the array is one of samples of this input: floats are rounded, no other type."""
        if array.dtype != self.dtype and not (array.dtype.kind == "f" == self.dtype.kind):
            return False
        if self.sizes is None:
            return bool(array.shape)
        return len(array.shape) == len(self.sizes) and all(
            wanted in (None, size)
            for wanted, size in zip(self.sizes[1:], array.shape[1:], strict=True)
        )


def by_input(
    file: Path, arrays: Mapping[str | None, AnArray], wanted: Sequence[str]
) -> dict[str, AnArray]:
    """Return the arrays of a file by the names of the inputs that they are for, and others.

    Parameters
    ----------
    file : Path
        For the message.
    arrays : mapping of str or None to array
        By the names that an .npz file gives them; None is the name of the array of an .npy file.
    wanted : sequence of str
        The inputs. A single array of any name is for a single input.

    Raises
    ------
    Failure
        Where there is no array of the name of an input.
    """
    if len(arrays) == len(wanted) == 1:
        return dict(zip(wanted, arrays.values(), strict=True))
    named = {name: array for name, array in arrays.items() if name is not None}
    if any(name not in named for name in wanted):
        got = ", ".join(named) or "none"
        if None in arrays:
            got = "one without a name, as an .npy file has it; an .npz file has several, with names"
        raise Failure(f"{file}: expected arrays {', '.join(wanted)}, got {got}")
    return named


class _Part(NamedTuple):
    """The arrays of a file, by input, and how many samples they have."""

    arrays: dict[str, Npy]
    samples: int


class DataSet:
    """Samples of all inputs, in files that are read batch by batch.

    Parameters
    ----------
    paths : sequence of Path
        .npy, .npz, and folders of such.
    inputs : sequence of Input
        What the samples are for. An array of an .npz file has the name of its input; where there is
        a single one of both, any name.
    batch : int
        How many samples to read at once, unless the inputs say so.
    """

    def __init__(self, paths: Sequence[Path], inputs: Sequence[Input], batch: int) -> None:
        self._inputs = {one.name: one for one in inputs}
        fixed = {one.sizes[0] for one in inputs if one.sizes and one.sizes[0] is not None}
        if len(fixed) > 1:
            sizes = " and ".join(map(str, sorted(fixed)))
            raise Failure(f"inputs: expected the same number of samples in all, got {sizes}")
        self.batch = fixed.pop() if fixed else batch
        self.files = [file for path in paths for file in _files_of(path)]
        self._parts = [self._open(file) for file in self.files]
        for part, file in zip(self._parts, self.files, strict=True):
            if part.samples % self.batch and any(one.sizes and one.sizes[0] for one in inputs):
                raise Failure(
                    f"{file}: expected a multiple of {self.batch} samples, which the model takes "
                    f"at once, got {part.samples}"
                )
        self.samples = sum(part.samples for part in self._parts)
        self.size = sum(array.size for part in self._parts for array in part.arrays.values())
        if not self.samples:
            raise Failure(f"{paths[0]}: expected samples, got none")

    def _open(self, file: Path) -> _Part:
        found = open_npy(file, None) if file.suffix == ".npy" else open_npz(file, (), None)
        sources: dict[str | None, Npy] = {}
        for source in (opened() for opened in found):
            if not isinstance(source, Npy):
                raise Failure(f"{source.name}: expected arrays, got statistics")
            is_named = source.name != str(file)
            sources[source.name.removeprefix(f"{file}: ") if is_named else None] = source
        arrays = by_input(file, sources, tuple(self._inputs))
        for name, one in self._inputs.items():
            _check(arrays[name], one)
        parts = {name: arrays[name] for name in self._inputs}
        counts = {array.shape[0] for array in parts.values()}
        if len(counts) > 1:
            raise Failure(f"{file}: expected as many samples of each input, got {sorted(counts)}")
        return _Part(parts, counts.pop())

    def batches(self) -> Iterator[tuple[dict[str, Array], int]]:
        """Yield the arrays of a batch, which the next one may overwrite, and their bytes."""
        for part in self._parts:
            if not part.samples:
                continue
            readers = [array.batches(self.batch) for array in part.arrays.values()]
            for values in zip(*readers, strict=True):
                size = sum(array.nbytes for array in values)
                named = zip(part.arrays, values, strict=True)
                yield (
                    {
                        name: np.ascontiguousarray(array, self._inputs[name].dtype)
                        for name, array in named
                    },
                    size,
                )


def _check(array: Npy, one: Input) -> None:
    if not one.takes(array) or 0 in array.shape[1:]:
        raise Failure(f"{array.name}: expected {one}, got {array.dtype} of shape {array.shape}")
    if array.in_fortran_order:
        raise Failure(
            f"{array.name}: expected an array in C order, whose samples lie together, got one in "
            "Fortran order: numpy.save(file, numpy.ascontiguousarray(x)) writes it so"
        )


def _files_of(path: Path) -> list[Path]:
    """Return the files that a path stands for."""
    try:
        if not path.is_dir():
            path.stat()
            if path.suffix not in _ENDINGS:
                raise Failure(f"{path}: expected .npy, .npz or a folder of such")
            return [path]
        found = sorted(file for file in path.iterdir() if file.suffix in _ENDINGS)
    except OSError as error:
        raise cannot_be_read(str(path), error) from error
    if not found:
        raise Failure(
            f"{path}: expected a folder of .npy or .npz files, got one without: images must be "
            "made arrays first, as the model takes them"
        )
    return found
