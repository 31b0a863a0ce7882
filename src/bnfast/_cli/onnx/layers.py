"""The normalization layers of a model, wherever they are, and the constants that they have."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnfast._cli.onnx.graph import attribute, called, is_operator
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
        Its inputs but the first one; None for what is no constant.
    computed : str
        Which of them is no constant, and where it comes from; nothing if all are.
    """

    node: Any
    where: str
    opset: int
    parameters: list[Any | None]
    computed: str

    @property
    def operator(self) -> str:
        """Its operator."""
        return str(self.node.op_type)

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.node.name or f"of {self.node.output[0]}"

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
        self.makers: MutableMapping[str, str] = ChainMap({}, outer.makers) if outer else {}

    def add(self, node: Any) -> None:
        """Add what a node makes: constants are those of Constant, also through Identity."""
        self.makers.update(dict.fromkeys(node.output, node.op_type))
        if is_operator(node, "Constant") and node.attribute[0].name == "value":
            self.constants[node.output[0]] = node.attribute[0].t
        elif is_operator(node, "Identity") and node.input[0] in self.constants:
            self.constants[node.output[0]] = self.constants[node.input[0]]

    def source(self, name: str) -> str:
        """Say where a value that is no constant comes from."""
        maker = self.makers.get(name)
        return f"{name} is an input" if maker is None else f"{name} is computed by {maker}"


def normalizations(file: ModelFile) -> Iterator[Normalization]:
    """Yield all normalization layers: those of the graph, each followed by what is within it."""
    yield from _of_graph(file.proto.graph, "", file.opset, _Known())
    for function in file.proto.functions:
        where = f"function {function.name}"
        imports = {one.domain: one.version for one in function.opset_import}
        yield from _of_nodes(function.node, where, imports.get("", file.opset), _Known())


def _of_graph(graph: Any, where: str, opset: int, known: _Known) -> Iterator[Normalization]:
    known.constants.update((tensor.name, tensor) for tensor in graph.initializer)
    yield from _of_nodes(graph.node, where, opset, known)


def _of_nodes(
    nodes: Iterable[Any], where: str, opset: int, known: _Known
) -> Iterator[Normalization]:
    for node in nodes:
        if is_operator(node, *_OPERATORS):
            names = list(filter(None, node.input[1:]))
            unknown = (known.source(name) for name in names if name not in known.constants)
            parameters = [known.constants.get(name) for name in node.input[1:]]
            yield Normalization(node, where, opset, parameters, next(unknown, ""))
        for found in node.attribute:
            for graph in graphs_of_attribute(found):
                within = f"{found.name} of {called(node)}"
                yield from _of_graph(graph, within, opset, _Known(known))
        known.add(node)


def as_vector(values: Array) -> Array:
    """Return the values of all channels, in float64."""
    vector: Array = values.astype(np.float64).ravel()
    return vector
