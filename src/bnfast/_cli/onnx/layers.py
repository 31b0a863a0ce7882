"""The normalization layers of a model, wherever they are, and the constants that they have."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnfast._cli.onnx.graph import attribute, called, is_operator, tensor_of
from bnfast._cli.onnx.model_file import ModelFile, graphs_of_attribute
from bnfast._conventions import ONNX
from bnfast._typing import Array
from bnfast.integrations.onnx import NORM_OPS, is_training

BATCH_NORM = "BatchNormalization"
_OPERATORS = tuple(operator.__name__ for operator in NORM_OPS)


@dataclass(frozen=True)
class Normalization:
    """A normalization node.

    Attributes
    ----------
    node : onnx.NodeProto
    where : str
        The function, or the body of another node, that it is in; nothing in the main graph.
    opset : int
        Of its operator.
    parameters : list of onnx.TensorProto or None
        Its inputs but the first one; None for what is not stored in the model. Of inputs of the
        model, the values that they have where a caller gives none.
    sources : list of str
        Where those come from that are not stored; nothing for the others.
    """

    node: Any
    where: str
    opset: int
    parameters: list[Any | None]
    sources: list[str]

    @property
    def operator(self) -> str:
        """Its operator."""
        return str(self.node.op_type)

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.node.name or f"of {self.node.output[0]}"

    @property
    def computed(self) -> str:
        """Which parameter is not stored, and where it comes from; nothing if all are."""
        return next(filter(None, self.sources), "")

    @property
    def epsilon(self) -> float:
        """What it adds to the variance."""
        return float(attribute(self.node, "epsilon", float(np.float32(ONNX.eps))))

    @property
    def training(self) -> bool:
        """Whether it normalizes a batch with the statistics of the batch."""
        flags = (attribute(self.node, name, 0) for name in ("training_mode", "is_test"))
        return is_training(self.opset, self.node.output, *flags)


class _Known:
    """What is known of values that nodes made so far, or that were there before them."""

    def __init__(self, outer: _Known | None = None) -> None:
        self.constants: MutableMapping[str, Any] = ChainMap({}, outer.constants) if outer else {}
        self.origins: MutableMapping[str, str] = ChainMap({}, outer.origins) if outer else {}

    def add_graph(self, graph: Any) -> None:
        """Add what a graph has stored."""
        self.constants.update((tensor.name, tensor) for tensor in graph.initializer)
        names = (sparse.values.name for sparse in graph.sparse_initializer)
        self.origins.update(dict.fromkeys(names, "stored as a sparse tensor"))

    def add(self, node: Any) -> None:
        """Add what a node makes: constants are those of Constant, also through Identity."""
        self.origins.update(dict.fromkeys(node.output, f"computed by {node.op_type}"))
        tensor = tensor_of(node)
        if is_operator(node, "Identity"):
            tensor = self.constants.get(node.input[0])
        if tensor is not None:
            self.constants[node.output[0]] = tensor

    def source(self, name: str) -> str:
        """Say where a value comes from; nothing for one that is stored, or left out."""
        if not name or name in self.constants:
            return ""
        return f"{name} is {self.origins.get(name, 'an input')}"


def normalizations(file: ModelFile) -> Iterator[Normalization]:
    """Yield all normalization layers: those of the graph, each followed by what is within it."""
    yield from _of_graph(file.proto.graph, "", file.opset, _Known())
    for function in file.proto.functions:
        where = f"function {function.name}"
        imports = {one.domain: one.version for one in function.opset_import}
        yield from _of_nodes(function.node, where, imports.get("", file.opset), _Known())


def _of_graph(graph: Any, where: str, opset: int, known: _Known) -> Iterator[Normalization]:
    known.add_graph(graph)
    yield from _of_nodes(graph.node, where, opset, known)


def _of_nodes(
    nodes: Iterable[Any], where: str, opset: int, known: _Known
) -> Iterator[Normalization]:
    for node in nodes:
        if is_operator(node, *_OPERATORS):
            parameters = [known.constants.get(name) for name in node.input[1:]]
            sources = [known.source(name) for name in node.input[1:]]
            yield Normalization(node, where, opset, parameters, sources)
        for found in node.attribute:
            for graph in graphs_of_attribute(found):
                within = f"{found.name} of {called(node)}"
                yield from _of_graph(graph, within, opset, _Known(known))
        known.add(node)


def as_vector(values: Array) -> Array:
    """Return the values of all channels, in float64."""
    vector: Array = values.astype(np.float64).ravel()
    return vector
