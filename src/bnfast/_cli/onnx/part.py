"""The part of a model that leads to some of its values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx
from onnx.external_data_helper import uses_external_data

from bnfast._cli.onnx.graph import names_read
from bnfast._cli.onnx.inference import Session
from bnfast._cli.onnx.model_file import ModelFile


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


def part_session(file: ModelFile, values: Iterable[str]) -> Session:
    """Return the part of a model that makes the values, to be run as it is."""
    folder = file.path.absolute().parent
    return Session(leading_to(file, values).SerializeToString(), str(file.path), folder=folder)
