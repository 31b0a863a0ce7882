"""``python -m bnfast recalibrate``: the statistics of batch norm layers, made anew of real data.

A layer's statistics are those of the values that arrive at it, and what arrives depends on the
statistics of the layers before it. So layers are done in the order of their depth: those that no
other batch norm comes before, then those behind them, and so on, each time with a pass over the
data through the part of the model that leads there. Afterwards each layer has exactly the
statistics of what arrives at it when the new model runs on these data, whatever the batches.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bnfast._cli.failure import Failure
from bnfast._cli.onnx import report
from bnfast._cli.onnx.data import DataSet, Input
from bnfast._cli.onnx.graph import Graph, called, names_read
from bnfast._cli.onnx.layers import BATCH_NORM, Normalization, as_vector, normalizations
from bnfast._cli.onnx.model_file import ModelFile
from bnfast._cli.onnx.part import leading_to, part_session
from bnfast._cli.onnx.recalibrated import RecalibratedLayer
from bnfast._cli.stats.report import progress_bar
from bnfast._typing import Array

_STATISTICS = {3: "mean", 4: "var"}  # inputs of a node


@dataclass(frozen=True)
class Recalibration:
    """What was done, and why not more."""

    layers: list[RecalibratedLayer]
    left: list[str]
    samples: int
    passes: int


class _Stays(Exception):
    """Why the statistics of a layer stay as they are."""


def _layer(one: Normalization, file: ModelFile) -> RecalibratedLayer:
    if one.where:
        raise _Stays(f"it is in {one.where}")
    if one.training:
        raise _Stays("it normalizes with the statistics of the batch")
    mean, variance = (_statistic(one, file, position) for position in _STATISTICS)
    scale = None if one.parameters[0] is None else as_vector(file.array(one.parameters[0]))
    return RecalibratedLayer(one, scale, (mean, variance))


def _statistic(one: Normalization, file: ModelFile, position: int) -> Array:
    tensor = one.parameters[position - 1]
    if tensor is None:
        raise _Stays(one.sources[position - 1])
    return file.array(tensor)


def _plan(file: ModelFile, graph: Graph) -> tuple[list[list[RecalibratedLayer]], list[str]]:
    """Return the layers of every depth, and which layers are left as they are, and why."""
    layers: dict[str, RecalibratedLayer] = {}  # by the first output
    left = []
    for one in normalizations(file):
        if one.operator == BATCH_NORM:
            try:
                layers[one.node.output[0]] = _layer(one, file)
            except _Stays as reason:
                left.append(f"{called(one.node)}: {reason}")
    if not layers:
        why = (
            "; ".join(left)
            or "there is none (exporters fold it into convolutions, unless told not to)"
        )
        raise Failure(f"{file.path}: expected batch norm with statistics to make anew: {why}")
    depths: dict[str, int] = {}  # of values: how many layers come before them at most
    levels: list[list[RecalibratedLayer]] = []
    for node in graph.nodes:
        depth = max((depths.get(name, 0) for name in names_read(node)), default=0)
        layer = layers.get(node.output[0]) if node.output else None
        if layer is not None:
            own = depths.get(layer.taken, 0)
            levels += [[] for _ in range(own + 1 - len(levels))]
            levels[own].append(layer)
            depth = max(depth, own + 1)
        depths.update(dict.fromkeys(node.output, depth))
    return levels, left


def _inputs(file: ModelFile, levels: Iterable[Sequence[RecalibratedLayer]]) -> list[Input]:
    """Return what the data must have: of the inputs those that lead to a layer."""
    part = leading_to(file, [layer.taken for level in levels for layer in level])
    constant = {tensor.name for tensor in part.graph.initializer}
    inputs = [Input.of(one) for one in part.graph.input if one.name not in constant]
    if not inputs:
        raise Failure(f"{file.path}: expected an input that leads to batch norm, got none")
    return inputs


def recalibrate(file: ModelFile, paths: Sequence[Path], batch: int, output: Path) -> Recalibration:
    """Give the layers of a model the statistics of data, in memory."""
    graph = Graph(file)
    levels, left = _plan(file, graph)
    data = DataSet(paths, _inputs(file, levels), batch)
    for each in data.files:
        if output.exists() and output.samefile(each):
            raise Failure(f"{output}: belongs to --data, which is not overwritten")
    with progress_bar(data.size * len(levels)) as advance:
        for number, level in enumerate(levels, 1):
            session = part_session(file, [layer.taken for layer in level])
            for feeds, size in data.batches():
                arrays = session.run({name: feeds[name] for name in session.inputs})
                for layer in level:
                    layer.add(arrays[layer.taken])
                advance(size, f"pass {number} of {len(levels)}")
            for layer in level:
                layer.finish()
                node = layer.normalization.node
                for position, new in zip(_STATISTICS, layer.after, strict=True):
                    name = f"{node.name or node.output[0]}_{_STATISTICS[position]}"
                    graph.set_constant(node, position, new, name)
    layers = [layer for level in levels for layer in level]
    return Recalibration(layers, left, data.samples, len(levels))


def run(options: Namespace) -> int:
    """Recalibrate a model, write it and print what changed; return the exit status."""
    show = report.showing(options.json, report.changes_as_json, report.changes_as_table)
    file = ModelFile(options.model)
    file.check_output(options.output, options.force)
    done = recalibrate(file, options.data, options.batch, options.output)
    text = show(options.model, done)
    with file.written(options.output, options.force):
        pass
    for reason in done.left:
        print(f"left as it is: {reason}", file=sys.stderr)
    print(text)
    if not options.json:
        print(f"The model is in {options.output}.")
    return 0
