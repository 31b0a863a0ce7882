"""Which batch norms of a model can be folded, and why the others stay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from bnfast import folding
from bnfast._cli.onnx.graph import (
    Graph,
    NotConstant,
    attribute,
    called,
    graphs_within,
    is_operator,
)
from bnfast._cli.onnx.model_file import ModelFile
from bnfast._conventions import ONNX
from bnfast._typing import Array

_BATCH_NORM = "BatchNormalization"
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_LAYERS = (*_CONVOLUTIONS, "Gemm", "MatMul")

# In standard deviations from zero. What follows a batch norm multiplies x instead of x - mean, and
# with float32 sums over 4 to 512 channels with means this far, outputs were up to twice as far off.
_FARTHEST_MEAN = 2.0


class Verdict(NamedTuple):
    """What became of a batch norm; the number of channels is None where that is not stored."""

    name: str
    channels: int | None
    folded: bool
    text: str


class _Stays(Exception):
    """Why a batch norm cannot be folded."""


class _Norm(NamedTuple):
    """What `bnfast.folding` wants to know of a batch norm."""

    running_mean: Array
    running_var: Array
    bn_weight: Array
    bn_bias: Array
    eps: float


class _Layer(NamedTuple):
    """What `bnfast.folding` wants to know of a linear layer or convolution."""

    weight: Array
    bias: Array | None
    layout: str
    groups: int
    padded: bool


def fold_all(file: ModelFile) -> list[Verdict]:
    """Fold every batch norm of the model that can be folded, and say of each what became of it."""
    graph = Graph(file)
    verdicts = []
    for node in graph.nodes[:]:
        if is_operator(node, _BATCH_NORM):
            verdicts.append(_fold(graph, node))
        within = (inner for part in graphs_within(node) for inner in part.node)
        verdicts += _not_looked_at(within, called(node))
    for function in file.proto.functions:
        verdicts += _not_looked_at(function.node, f"function {function.name}")
    return verdicts


def _not_looked_at(nodes: Iterable[Any], where: str) -> Iterator[Verdict]:
    for node in nodes:
        if is_operator(node, _BATCH_NORM):
            yield Verdict(called(node), None, False, f"stays: within {where}")
        for part in graphs_within(node):
            yield from _not_looked_at(part.node, where)


def _fold(graph: Graph, node: Any) -> Verdict:
    name, channels = called(node), None
    try:
        norm = _norm(graph, node)
        channels = norm.running_mean.size
    except _Stays as reason:
        return Verdict(name, channels, False, f"stays: {reason}")
    reasons = []
    for fold in (_fold_into_previous, _fold_into_next):
        try:
            return Verdict(name, channels, True, f"folded into {fold(graph, node, norm)}")
        except _Stays as reason:
            reasons.append(str(reason))
    return Verdict(name, channels, False, f"stays: {'; '.join(dict.fromkeys(reasons))}")


def _constant(graph: Graph, node: Any, position: int, role: str) -> Array:
    name = node.input[position]
    try:
        return graph.constant(name)
    except NotConstant as reason:
        raise _Stays(f"{role} ({name}) is {reason}") from None


def _norm(graph: Graph, node: Any) -> _Norm:
    # Before opset 14, which has an attribute for that, training has the statistics as outputs.
    if attribute(node, "training_mode", 0) or len(list(filter(None, node.output))) > 1:
        raise _Stays("it is in training mode")
    if not attribute(node, "spatial", 1):
        raise _Stays("each element has statistics of its own (spatial=0)")
    roles = (ONNX.weight, ONNX.bias, ONNX.mean, ONNX.var)
    weight, bias, mean, var = (
        _constant(graph, node, position, f"its {role}") for position, role in enumerate(roles, 1)
    )
    return _Norm(mean, var, weight, bias, attribute(node, "epsilon", float(np.float32(ONNX.eps))))


def _layer(graph: Graph, node: Any) -> _Layer:
    name = called(node)
    weight = _constant(graph, node, 1, f"the weight of {name}")
    bias = None
    if len(node.input) > 2 and node.input[2]:
        bias = _constant(graph, node, 2, f"the bias of {name}")
    if is_operator(node, *_CONVOLUTIONS):
        transposed = is_operator(node, "ConvTranspose")
        layout = "IO..." if transposed else "OI..."
        padded = transposed or _pads(node, weight)
        return _Layer(weight, bias, layout, attribute(node, "group", 1), padded)
    if weight.ndim != 2:
        raise _Stays(f"the weight of {name} is not a matrix")
    if attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0:
        raise _Stays(f"{name} has a factor (alpha, beta)")
    layout = "OI" if attribute(node, "transB", 0) else "IO"
    outputs = weight.shape[layout.index("O")]
    if bias is not None:
        try:
            bias = np.broadcast_to(bias, (1, outputs))[0]
        except ValueError:
            raise _Stays(f"the bias of {name} differs between samples") from None
    return _Layer(weight, bias, layout, 1, False)


def _pads(node: Any, weight: Array) -> bool:
    """Return whether a convolution reads zeros beside its input."""
    if attribute(node, "auto_pad", b"NOTSET").startswith(b"SAME"):
        return max(weight.shape[2:], default=1) > 1
    return any(attribute(node, "pads", ()))


def _only_reader(graph: Graph, name: str, what: str) -> Any:
    """Return the only node that reads a value, which nothing else may see."""
    if graph.is_output(name):
        raise _Stays(f"{what} is an output of the model")
    readers = graph.readers(name)
    if len(readers) != 1:
        raise _Stays(f"{what} is read more than once" if readers else f"nothing reads {what}")
    return readers[0]


def _check_axes(graph: Graph, node: Any, value: str, where: str) -> None:
    """Refuse a matrix product unless its last axis is the second one, as that of batch norm is."""
    if is_operator(node, "MatMul") and graph.rank(value) != 2:
        raise _Stays(f"{called(node)} {where} it is not known to be of two matrices")


def _fold_into_previous(graph: Graph, norm_node: Any, norm: _Norm) -> str:
    node = graph.producer(norm_node.input[0])
    if node is None:
        raise _Stays("nothing before it")
    name = called(node)
    if not is_operator(node, *_LAYERS):
        raise _Stays(f"{name} before it")
    _only_reader(graph, node.output[0], f"the output of {name}")
    _check_axes(graph, node, node.output[0], "before")
    layer = _layer(graph, node)
    try:
        weight, bias = folding.fold_into_previous(
            layer.weight, layer.bias, *norm, layout=layer.layout, groups=layer.groups
        )
    except (TypeError, ValueError) as error:
        raise _Stays(str(error)) from error
    _set(graph, node, weight, bias)
    graph.absorb(node, norm_node)
    return f"{name} before it"


def _fold_into_next(graph: Graph, norm_node: Any, norm: _Norm) -> str:
    value = norm_node.output[0]
    node = _only_reader(graph, value, "its output")
    name = called(node)
    if not is_operator(node, *_LAYERS) or node.input[0] != value:
        raise _Stays(f"{name} after it")
    _check_axes(graph, node, value, "after")
    if attribute(node, "transA", 0):
        raise _Stays(f"{name} after it transposes it")
    layer = _layer(graph, node)
    try:
        if layer.padded and np.any(folding.scale_shift(*norm)[1]):
            raise _Stays(f"{name} after it pads with zeros")
        weight, bias = folding.fold_into_next(
            *(layer.weight, layer.bias, *norm),
            layout=layer.layout,
            groups=layer.groups,
            padded=layer.padded,
        )
    except (TypeError, ValueError) as error:
        raise _Stays(str(error)) from error
    farthest = _farthest_mean(norm)
    if farthest > _FARTHEST_MEAN:
        raise _Stays(
            f"in {name} after it digits would be lost, with a mean {farthest:.3g} standard "
            f"deviations from zero"
        )
    _set(graph, node, weight, bias)
    graph.skip(norm_node)
    return f"{name} after it"


def _farthest_mean(norm: _Norm) -> float:
    std = np.sqrt(norm.running_var.astype(np.float64) + norm.eps)
    return float(np.max(np.abs(norm.running_mean.astype(np.float64)) / std, initial=0.0))


def _set(graph: Graph, node: Any, weight: Array, bias: Array) -> None:
    name = node.name or node.output[0]
    graph.set_constant(node, 1, weight, f"{name}_weight")
    graph.set_constant(node, 2, bias, f"{name}_bias")
    if is_operator(node, "MatMul"):
        node.op_type = "Gemm"
