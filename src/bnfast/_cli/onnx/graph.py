"""The main graph of a model: who makes and who reads each value, its constants, and its changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper, shape_inference
from onnx.external_data_helper import uses_external_data

from bnfast._cli.onnx.model_file import ModelFile, graphs_of_attribute
from bnfast._typing import Array

_ONNX_DOMAINS = ("", "ai.onnx")

# Of a Constant, the attributes that are numbers instead of a tensor.
_DTYPES_OF_NUMBERS = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


class NotConstant(Exception):
    """Why a value is not known before the model runs."""


class Graph:
    """Nodes and values of the main graph of a model, which the methods look up and change.

    Parameters
    ----------
    file : ModelFile
        Whose model is changed.

    Attributes
    ----------
    nodes : list of onnx.NodeProto
        As the model has them.
    """

    def __init__(self, file: ModelFile) -> None:
        self._file = file
        self._proto = file.proto.graph
        self.nodes: list[Any] = list(self._proto.node)
        self._initializers = {tensor.name: tensor for tensor in self._proto.initializer}
        self._inputs = {value.name for value in self._proto.input}
        self._outputs = {value.name for value in self._proto.output}
        self._producers = {name: node for node in self.nodes for name in node.output}
        self._readers: dict[str, list[Any]] = defaultdict(list)
        for node in self.nodes:
            for name in names_read(node):
                self._readers[name].append(node)
        self._names = {*self._initializers, *self._inputs, *self._producers, *self._readers}
        self._ranks: dict[str, int] | None = None

    def producer(self, name: str) -> Any | None:
        """Return the node whose output a value is; None for inputs and initializers."""
        return self._producers.get(name)

    def readers(self, name: str) -> list[Any]:
        """Return the nodes that read a value, or that have graphs within that do."""
        return list(self._readers[name])

    def is_output(self, name: str) -> bool:
        """Return whether a value is an output of the model."""
        return name in self._outputs

    def constant(self, name: str) -> Array:
        """Return a value that is stored in the model, or raise NotConstant."""
        origin = self._origin(name)
        if origin in self._inputs and not self._is_fixed(origin):
            raise NotConstant("an input of the model")
        tensor = self._tensor(origin)
        if tensor is None:
            is_made = origin in self._producers
            raise NotConstant("computed in the graph" if is_made else "stored as a sparse tensor")
        return self._file.array(tensor)

    def _origin(self, name: str) -> str:
        """Return the value that a value is through Identity."""
        producer = self._producers.get(name)
        while producer is not None and is_operator(producer, "Identity"):
            name = producer.input[0]
            producer = self._producers.get(name)
        return name

    def _tensor(self, origin: str) -> Any | None:
        """Return the tensor of an initializer, of an input that has one, or of a Constant."""
        producer = self._producers.get(origin)
        return self._initializers.get(origin) if producer is None else tensor_of(producer)

    def _is_fixed(self, name: str) -> bool:
        """Return whether an input is one in name only, as all initializers were before IR 4."""
        return name in self._initializers and self._file.proto.ir_version < 4

    def rank(self, name: str) -> int | None:
        """Return the number of axes of a value, where that is known."""
        if self._ranks is None:
            model = shape_inference.infer_shapes(self._file.proto)
            values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
            self._ranks = {
                value.name: len(value.type.tensor_type.shape.dim)
                for value in values
                if value.type.tensor_type.HasField("shape")
            }
        return self._ranks.get(name)

    def set_constant(self, node: Any, position: int, values: Array, name: str) -> None:
        """Let an input of a node be other values.

        They take the place of an initializer that nothing else reads, and are external data where
        that was.

        Parameters
        ----------
        node : onnx.NodeProto
        position : int
            Of the input, or one beyond the last.
        values : array
        name : str
            What a new initializer is called, with a number where the name is taken.
        """
        tensor = numpy_helper.from_array(values)
        old = node.input[position] if position < len(node.input) else ""
        stored = self._tensor(self._origin(old)) if old else None
        if stored is not None and uses_external_data(stored):
            tensor.data_location = TensorProto.EXTERNAL
        before = self._initializers.get(old)
        is_own = len(self._readers[old]) == 1 and not self.is_output(old)
        if before is not None and is_own and before.dims == tensor.dims:
            tensor.name = old
            before.CopyFrom(tensor)
            return
        tensor.name = self._unused(name)
        self._proto.initializer.append(tensor)
        self._initializers[tensor.name] = self._proto.initializer[-1]
        if self._file.proto.ir_version < 4:
            kind = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            self._proto.input.append(kind)
            self._inputs.add(tensor.name)
        self.set_input(node, position, tensor.name)

    def _unused(self, name: str) -> str:
        names = (f"{name}_{number}" if number else name for number in count())
        found = next(found for found in names if found not in self._names)
        self._names.add(found)
        return found

    def set_input(self, node: Any, position: int, name: str) -> None:
        """Let a node read another value, as the input at a position, or one beyond the last."""
        self._readers[name].append(node)
        if position == len(node.input):
            node.input.append(name)
            return
        before = node.input[position]
        node.input[position] = name
        if before:
            self._forget_reader(before, node)

    def skip(self, node: Any) -> None:
        """Remove a node, of one output, whose only reader reads the node's first input instead."""
        (reader,) = self._readers[node.output[0]]
        position = list(reader.input).index(node.output[0])
        self.set_input(reader, position, node.input[0])
        self.remove(node)

    def absorb(self, node: Any, next_node: Any) -> None:
        """Remove the only reader of a node's output; the node makes its first output instead."""
        name = next_node.output[0]
        self.remove(next_node)
        self._drop_value(node.output[0])
        node.output[0] = name
        self._producers[name] = node

    def remove(self, node: Any) -> None:
        """Remove a node, and the constants that nothing else reads."""
        number = next(n for n, other in enumerate(self.nodes) if other is node)
        del self.nodes[number], self._proto.node[number]
        for name in node.output:
            self._drop_value(name)
        for name in names_read(node):
            self._forget_reader(name, node)

    def _forget_reader(self, name: str, node: Any) -> None:
        readers = self._readers[name]
        del readers[next(n for n, reader in enumerate(readers) if reader is node)]
        if readers or self.is_output(name):
            return
        producer = self._producers.get(name)
        if producer is not None and is_operator(producer, "Constant", "Identity"):
            self.remove(producer)
        if name in self._inputs and not self._is_fixed(name):
            return  # which a caller may go on to give
        if self._initializers.pop(name, None) is not None:
            _remove_named(self._proto.initializer, name)
            _remove_named(self._proto.input, name)

    def _drop_value(self, name: str) -> None:
        self._producers.pop(name, None)
        _remove_named(self._proto.value_info, name)


def is_operator(node: Any, *types: str) -> bool:
    """Return whether a node is one of these operators of ONNX's own."""
    return node.op_type in types and node.domain in _ONNX_DOMAINS


def tensor_of(node: Any) -> Any | None:
    """Return the tensor that a Constant makes; None for text, for sparse ones and other nodes."""
    if not is_operator(node, "Constant"):
        return None
    (given,) = node.attribute
    dtype = _DTYPES_OF_NUMBERS.get(given.name)
    if dtype is not None:
        return numpy_helper.from_array(np.array(helper.get_attribute_value(given), dtype))
    return given.t if given.name == "value" else None


def attribute(node: Any, name: str, default: Any) -> Any:
    """Return the value of an attribute of a node."""
    for found in node.attribute:
        if found.name == name:
            return helper.get_attribute_value(found)
    return default


def called(node: Any) -> str:
    """Return what a node is called in messages and tables."""
    return f"{node.op_type} {node.name or 'of ' + ', '.join(node.output)}"


def graphs_within(node: Any) -> Iterator[Any]:
    """Yield the graphs of a node, such as the branches of If, but not those within these."""
    for found in node.attribute:
        yield from graphs_of_attribute(found)


def names_read(node: Any) -> Iterator[str]:
    """Yield the values that a node and the graphs within read, each as often as it is read."""
    yield from filter(None, node.input)
    for graph in graphs_within(node):
        for inner in graph.node:
            yield from names_read(inner)


def _remove_named(values: Any, name: str) -> None:
    for number in reversed(range(len(values))):
        if values[number].name == name:
            del values[number]
