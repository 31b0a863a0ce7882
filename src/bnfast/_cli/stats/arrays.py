"""Arrays in files: .npy, .npz and zarr."""

from __future__ import annotations

import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy

from bnfast import summary
from bnfast._boxes import Box, boxes
from bnfast._cli.failure import Failure, cannot_be_read, missing
from bnfast._cli.stats.source import (
    UNITS,
    Advance,
    Axis,
    Open,
    Saved,
    Source,
    bytes_of_block,
    readable,
    summary_of_boxes,
)
from bnfast._typing import Array
from bnfast.statistics import Summary

_ENDING = ".npy"  # of the members of an .npz file
_UNREADABLE = (
    *(OSError, EOFError, ValueError),
    *(zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError),  # passwords, compressions
)


def _kept_axes(name: str, shape: tuple[int, ...], axis: Axis) -> tuple[int, ...]:
    """Return the axes that are kept: by default axis 1, where there is one."""
    ndim = len(shape)
    if axis is None:
        axis = (1,) if ndim > 1 else ()
    kept = {d % ndim for d in axis if -ndim <= d < ndim}
    if len(kept) != len(axis):
        given = ",".join(map(str, axis))
        raise Failure(
            f"{name}: expected --axis to name axes of shape {shape}, each once, got {given}"
        )
    return tuple(sorted(kept))


def _axes(kept: tuple[int, ...]) -> str:
    return f"axis {', '.join(map(str, kept))}" if kept else "no axis"


class _Array(Source):
    """An array, wherever it is stored."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], axis: Axis) -> None:
        self.shape, self.dtype = shape, dtype
        self.summed_as = readable(name, dtype)
        self.kept = _kept_axes(name, shape, axis)
        super().__init__(
            name,
            prod(shape) * dtype.itemsize,
            tuple(shape[d] for d in self.kept),
            f"{dtype} of shape {shape}, {_axes(self.kept)}",
            UNITS.get(self.summed_as, 1.0),
            tuple(d - len(shape) for d in self.kept),
        )

    def summarize(self, finite: bool, advance: Advance) -> Summary:
        """Read it all, block by block."""
        if 0 in self.shape:
            return summary(np.empty(self.shape, self.summed_as), self.kept or None)
        return summary_of_boxes(self._parts(advance), self.shape, self.kept, finite)

    def _parts(self, advance: Advance) -> Iterator[tuple[Box, Array]]:
        most = max(1, bytes_of_block(self.channels) // self.dtype.itemsize)
        for box, values in self._read(most):
            yield box, values.astype(self.summed_as, copy=False)
            advance(values.nbytes, self.name)

    @abstractmethod
    def _read(self, most: int) -> Iterator[tuple[Box, Array]]:
        """Read boxes of about so many elements; the next one may overwrite the last one."""


class _Header(NamedTuple):
    """What an .npy file says of its array, and where that begins."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]
    end: int


_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def _header(file: IO[bytes]) -> _Header:
    version = npy.read_magic(file)
    if version not in _HEADERS:  # version 3 is of structures
        raise ValueError(f"expected .npy of version 1 or 2, got {version[0]}.{version[1]}")
    header = _Header(*_HEADERS[version](file), file.tell())
    if any(n < 0 for n in header.shape):
        raise ValueError(f"expected sizes of at least 0, got shape {header.shape}")
    return header


class Npy(_Array):
    """The array of an .npy file, or of a member of an .npz file."""

    def __init__(self, name: str, path: Path, member: str | None, axis: Axis) -> None:
        self._path, self._member = path, member
        try:
            with self._opened() as file:
                self._header = header = _header(file)
        except Exception as error:  # NumPy's reader of headers raises anything
            if str(error).startswith("EOF"):  # as it says of a file that ends there
                raise Failure(f"{name}: truncated: the file ends before its array") from error
            raise cannot_be_read(name, error) from error
        super().__init__(name, header.shape, header.dtype, axis)
        if member is None:
            self._check_length(path.stat().st_size - header.end)

    @property
    def in_fortran_order(self) -> bool:
        """Whether the first axis is the fastest one, of several."""
        return self._header.fortran_order and len(self.shape) > 1

    def batches(self, samples: int) -> Iterator[Array]:
        """Read `samples` indices of the first axis at a time; each read may overwrite the last."""
        most = samples * max(1, prod(self.shape[1:]))
        return (values for _, values in self._read(most))

    def _check_length(self, length: int) -> None:
        if length < self.size:
            raise Failure(
                f"{self.name}: truncated: expected {self.size:,} bytes of data, got {length:,}"
            )

    @contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        if self._member is None:
            with open(self._path, "rb", buffering=0) as file:
                yield file
        else:
            with zipfile.ZipFile(self._path) as archive, archive.open(self._member) as member:
                yield member

    def _read(self, most: int) -> Iterator[tuple[Box, Array]]:
        in_file = self.shape[::-1] if self._header.fortran_order else self.shape
        memory = np.empty(min(most, prod(in_file)), self.dtype)
        try:
            with self._opened() as file:
                file.read(self._header.end)  # after a seek no checksum would be compared
                length = 0
                for box in boxes(in_file, (1,) * len(in_file), most):
                    sides = [part.stop - part.start for part in box]
                    values = memory[: prod(sides)]
                    read = _fill(file, values)
                    length += read
                    if read < values.nbytes:
                        self._check_length(length)
                    values = values.reshape(sides)
                    if self._header.fortran_order:
                        box, values = box[::-1], values.T
                    yield box, values
                file.read(1)  # the end of a member: only here is its checksum compared
        except _UNREADABLE as error:
            raise cannot_be_read(self.name, error) from error


def _fill(file: IO[bytes], values: Array) -> int:
    """Read an array's bytes, and return how many there were."""
    rest = memoryview(values.view(np.uint8).data)
    while rest and (read := file.readinto(rest)):  # type: ignore[attr-defined]
        rest = rest[read:]
    return values.nbytes - len(rest)


def open_npy(path: Path, axis: Axis) -> Iterator[Open]:
    """Yield what opens the array."""
    yield partial(Npy, str(path), path, None, axis)


def open_npz(path: Path, members: Sequence[str], axis: Axis) -> Iterator[Open]:
    """Yield what opens each member, or the saved statistics that the file has."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n.removesuffix(_ENDING) for n in archive.namelist() if n.endswith(_ENDING)]
    except _UNREADABLE as error:
        raise cannot_be_read(str(path), error) from error
    if "Moments" in names:
        raise Failure(f"{path}: expected a saved Summary, got Moments, which have no extremes")
    if "Summary" in names:
        yield partial(_open_saved, path)
        return
    for name in chosen(path, names, members):
        yield partial(Npy, f"{path}: {name}", path, name + _ENDING, axis)


def _open_saved(path: Path) -> Source:
    try:
        return Saved(str(path), Summary.load(path))
    except (OSError, ValueError) as error:
        raise cannot_be_read(str(path), error) from error


def chosen(path: Path, names: Sequence[str], members: Sequence[str]) -> Sequence[str]:
    """Return which arrays of a file are wanted: all, unless members are named."""
    if not names:
        raise Failure(f"{path}: has no array")
    missing = [name for name in members if name not in names]
    if missing:
        raise Failure(
            f"{path}: expected --member to be one of {', '.join(names)}, got {missing[0]}"
        )
    return members or names


class Zarr(_Array):
    """An array of zarr, in any store that zarr opens."""

    def __init__(self, name: str, array: Any, axis: Axis) -> None:
        self._array = array
        super().__init__(name, tuple(array.shape), np.dtype(array.dtype), axis)

    def _read(self, most: int) -> Iterator[tuple[Box, Array]]:
        # What is compressed together is read at once; only zarr 3 has shards.
        grain = getattr(self._array, "shards", None) or self._array.chunks
        for box in boxes(self.shape, grain, most):
            try:
                values = np.asarray(self._array[box])
            except Exception as error:  # of any codec, of any store
                raise cannot_be_read(self.name, error) from error
            yield box, values


def open_zarr(path: Path, members: Sequence[str], axis: Axis) -> Iterator[Open]:
    """Yield what opens the array, or each array of a group, of groups within it as well."""
    try:
        import zarr
    except ImportError as error:
        raise missing(f"zarr for {path}", "stats", error) from error
    try:
        node = zarr.open(str(path), mode="r")
        arrays = None if isinstance(node, zarr.Array) else dict(_arrays_of(node))
    except Exception as error:  # zarr 2 and 3 raise errors of their own for what they do not know
        raise cannot_be_read(str(path), error) from error
    if arrays is None:
        if members:
            raise Failure(f"{path}: expected a group of zarr for --member, got an array")
        yield partial(Zarr, str(path), node, axis)
        return
    for name in chosen(path, list(arrays), members):
        yield partial(Zarr, f"{path}: {name}", arrays[name], axis)


def _arrays_of(group: Any, within: str = "") -> Iterator[tuple[str, Any]]:
    for name, array in sorted(group.arrays(), key=lambda pair: pair[0]):
        yield within + name, array
    for name, inner in sorted(group.groups(), key=lambda pair: pair[0]):
        yield from _arrays_of(inner, f"{within}{name}/")


def is_zarr(folder: Path) -> bool:
    """Return whether zarr wrote this folder, version 2 or 3 of the format."""
    return any((folder / name).exists() for name in ("zarr.json", ".zarray", ".zgroup"))
