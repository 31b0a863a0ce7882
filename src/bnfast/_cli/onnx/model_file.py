"""A model in a file: read, checked, and written again, with tensors that lie in other files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto, checker, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from bnfast._cli.failure import Failure, cannot_be_read, reason_of
from bnfast._cli.outputs import check_output
from bnfast._typing import Array

# From this one on BatchNormalization evaluates, unless it has more outputs or training_mode=1.
_OLDEST_OPSET = 7

_ALIGNMENT = 4096  # of tensors in external data, so that they can be mapped into memory


class ModelFile:
    """A model as it was read, to be changed and written elsewhere.

    Tensors in external data are not read until `array` or `written` needs them.

    Parameters
    ----------
    path : Path
        A file of one ONNX model.

    Attributes
    ----------
    path : Path
    proto : onnx.ModelProto
        The model, which may be changed.
    opset : int
        The version of ONNX's own operators.

    Raises
    ------
    Failure
        For a file that cannot be read, is no model, or not a valid one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.proto = ModelProto()
        try:
            self.proto.ParseFromString(path.read_bytes())
        except OSError as error:
            raise cannot_be_read(str(path), error) from error
        except DecodeError:
            self.proto.Clear()
        if self.proto.ir_version == 0:
            raise Failure(f"{path}: expected an ONNX model, got another file, or a part of one")
        self.opset = self._checked_opset()
        try:
            checker.check_model(str(path))
        except checker.ValidationError as error:
            raise Failure(f"{path}: not a valid ONNX model: {reason_of(error)}") from error

    def _checked_opset(self) -> int:
        versions = [o.version for o in self.proto.opset_import if o.domain in ("", "ai.onnx")]
        newest = onnx.defs.onnx_opset_version()
        if not versions or not _OLDEST_OPSET <= versions[0] <= newest:
            got = versions[0] if versions else "none"
            raise Failure(
                f"{self.path}: expected opset {_OLDEST_OPSET} to {newest}, which onnx "
                f"{onnx.__version__} knows, got {got}; onnx.version_converter changes it"
            )
        return int(versions[0])

    def array(self, tensor: Any) -> Array:
        """Return the values of a tensor of this model."""
        if uses_external_data(tensor):
            tensor = _copy(tensor)
            tensor.raw_data = self._content(tensor)
            tensor.data_location = TensorProto.DEFAULT
        try:
            values: Array = numpy_helper.to_array(tensor)
        except ValueError as error:  # too few bytes for its shape
            raise cannot_be_read(f"{self.path}: {tensor.name!r}", error) from error
        return values

    def _content(self, tensor: Any) -> bytes:
        """Return the bytes of a tensor that is, or is to be, in external data."""
        if tensor.HasField("raw_data"):
            return bytes(tensor.raw_data)
        loaded = _copy(tensor)
        try:
            load_external_data_for_tensor(loaded, str(self.path.absolute().parent))
        except (OSError, ValueError, checker.ValidationError) as error:
            raise cannot_be_read(f"{self.path}: external data of {tensor.name!r}", error) from error
        content = bytes(loaded.raw_data)
        length = next((int(e.value) for e in tensor.external_data if e.key == "length"), 0)
        if len(content) < length:  # which some versions of onnx read without a word
            raise Failure(
                f"{self.path}: external data of {tensor.name!r}: truncated: expected "
                f"{length:,} bytes, got {len(content):,}"
            )
        return content

    def check_output(self, output: Path, force: bool) -> None:
        """Refuse to write over what this model was read from, over what is no file, or is one."""
        data = self._data_files()
        own = {self.path, *data}
        for path in (output, _data_file(output)) if data else (output,):
            if not path.exists():
                continue
            if not path.is_file():
                raise Failure(f"{path}: expected a file to write to, got something else")
            if any(file.exists() and path.samefile(file) for file in own):
                raise Failure(f"{path}: belongs to {self.path}, which is not overwritten")
            check_output(path, force)

    def _data_files(self) -> set[Path]:
        """Return the files with the external data of this model."""
        folder = self.path.absolute().parent
        return {
            folder / entry.value
            for tensor in _tensors_of(self.proto)
            for entry in tensor.external_data
            if entry.key == "location"
        }

    @contextmanager
    def written(self, output: Path, force: bool) -> Iterator[Path]:
        """Write the model as it is now; it is in place after the ``with`` block ended well.

        External data stay external, all in one file: ``output`` with ``.data`` appended.

        Parameters
        ----------
        output : Path
            Where it is in the end.
        force : bool
            Replace a file that is there, rather than refuse.

        Yields
        ------
        Path
            Where it is inside the block, to be tried out.

        Raises
        ------
        Failure
            Where it cannot be written; what was at `output` is then still there.
        """
        self.check_output(output, force)
        try:
            folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.absolute().parent))
        except OSError as error:
            raise _cannot_be_written(output, error) from error
        try:
            part = folder / output.name
            try:
                self._write(part)
            except (OSError, ValueError) as error:  # ValueError: more than protobuf can hold
                raise _cannot_be_written(output, error) from error
            yield part
            try:
                if _data_file(part).exists():
                    _data_file(part).replace(_data_file(output))
                part.replace(output)
            except OSError as error:
                raise _cannot_be_written(output, error) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _write(self, path: Path) -> None:
        proto = self.proto
        if any(map(uses_external_data, _tensors_of(proto))):
            proto = _copy(proto)  # small, without its data
            self._write_data(proto, _data_file(path))
        _write_file(path, [proto.SerializeToString()])

    def _write_data(self, proto: Any, path: Path) -> None:
        def contents() -> Iterator[bytes]:
            end = 0
            for tensor in filter(uses_external_data, _tensors_of(proto)):
                content = self._content(tensor)
                yield bytes(-end % _ALIGNMENT)
                end += -end % _ALIGNMENT
                tensor.ClearField("raw_data")
                del tensor.external_data[:]
                for key, value in (
                    ("location", path.name),
                    ("offset", end),
                    ("length", len(content)),
                ):
                    tensor.external_data.add(key=key, value=str(value))
                yield content
                end += len(content)

        _write_file(path, contents())


def _copy(proto: Any) -> Any:
    copy = type(proto)()
    copy.CopyFrom(proto)
    return copy


def _data_file(path: Path) -> Path:
    return path.with_name(path.name + ".data")


def _cannot_be_written(path: Path, error: Exception) -> Failure:
    return Failure(f"{path}: cannot be written: {reason_of(error)}")


def _write_file(path: Path, contents: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        file.writelines(contents)
        file.flush()
        os.fsync(file.fileno())  # a full disk may show only now


def _tensors_of(model: Any) -> Iterator[Any]:
    """Yield every tensor, those in graphs within nodes, and in functions, too."""
    yield from _tensors_of_graph(model.graph)
    for training in model.training_info:
        yield from _tensors_of_graph(training.initialization)
        yield from _tensors_of_graph(training.algorithm)
    for function in model.functions:
        yield from _tensors_of_nodes(function.node)


def _tensors_of_graph(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _tensors_of_nodes(graph.node)


def _tensors_of_nodes(nodes: Iterable[Any]) -> Iterator[Any]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for graph in graphs_of_attribute(attribute):
                yield from _tensors_of_graph(graph)


def graphs_of_attribute(attribute: Any) -> Iterator[Any]:
    """Yield the graphs that an attribute of a node consists of: the branches of If, say."""
    if attribute.HasField("g"):
        yield attribute.g
    yield from attribute.graphs
