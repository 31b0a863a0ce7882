"""The part of a model that leads to some of its values, run by onnxruntime."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx
import onnxruntime
from onnx.external_data_helper import uses_external_data

from bnfast._cli.failure import Failure
from bnfast._cli.onnx.graph import names_read
from bnfast._cli.onnx.model_file import ModelFile
from bnfast._typing import Array


def leading_to(file: ModelFile, values: Iterable[str]) -> Any:
    """Return the part of a model that makes the values, which are its outputs."""
    model, values = file.proto, list(dict.fromkeys(values))
    wanted, nodes = set(values), []
    for node in reversed(model.graph.node):
        if wanted.intersection(node.output):
            nodes.append(node)
            wanted.update(names_read(node))
    part = onnx.ModelProto(ir_version=model.ir_version)
    part.opset_import.extend(model.opset_import)
    part.functions.extend(model.functions)
    part.graph.name = model.graph.name
    part.graph.node.extend(reversed(nodes))
    for kind in ("initializer", "input", "value_info"):
        found = (one for one in getattr(model.graph, kind) if one.name in wanted)
        getattr(part.graph, kind).extend(found)
    sparse = (one for one in model.graph.sparse_initializer if one.values.name in wanted)
    part.graph.sparse_initializer.extend(sparse)
    for tensor in part.graph.initializer:
        if uses_external_data(tensor) and tensor.HasField("raw_data"):  # to be, once written
            tensor.ClearField("data_location")
    part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values)
    return part


class PartSession:
    """The part of a model that leads to some values, on the CPU, operator by operator.

    Nothing is folded or fused: that would round what arrives at a layer otherwise.

    Parameters
    ----------
    file : ModelFile
    values : iterable of str

    Raises
    ------
    Failure
        For a model that onnxruntime cannot run.
    """

    def __init__(self, file: ModelFile, values: Iterable[str]) -> None:
        self._path = file.path
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what it refuses, it raises as well
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(file.path.absolute().parent)
        )
        part = leading_to(file, values)
        self._values = [value.name for value in part.graph.output]
        try:
            self._session = onnxruntime.InferenceSession(
                part.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # of classes of its own
            raise self._failure("load", error) from error
        self._inputs = {one.name for one in self._session.get_inputs()}

    def _failure(self, what: str, error: Exception) -> Failure:
        reason = " ".join(str(error).split())
        return Failure(f"{self._path}: onnxruntime cannot {what} it: {reason}")

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """Return the values for a batch, of which it takes the inputs that it needs."""
        own = {name: array for name, array in feeds.items() if name in self._inputs}
        try:
            arrays = self._session.run(self._values, own)
        except Exception as error:
            raise self._failure("run", error) from error
        return dict(zip(self._values, arrays, strict=True))
