"""``python -m bnfast inspect``: the normalization layers of a model, and their statistics."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from bnfast._cli.onnx import report
from bnfast._cli.onnx.folds import Verdict, fold_all
from bnfast._cli.onnx.health import unusual
from bnfast._cli.onnx.layers import BATCH_NORM, Normalization, as_vector, normalizations
from bnfast._cli.onnx.model_file import ModelFile
from bnfast._typing import Array


@dataclass(frozen=True)
class Layer:
    """What is known of a layer without running the model."""

    normalization: Normalization
    scale: Array | None  # None where it has none, or where that is no constant
    mean: Array | None = None  # of batch norm alone, as all that follows
    variance: Array | None = None
    unusual: dict[str, list[int]] | None = None
    verdict: Verdict | None = None

    @property
    def channels(self) -> int | None:
        """How many values a parameter has."""
        known = self.variance if self.scale is None else self.scale
        return None if known is None else known.size

    @property
    def fold(self) -> str:
        """Into which neighbour it can be folded, or why into none."""
        if self.verdict is None:
            return ""
        return self.verdict.text.replace("stays: ", "no: ").removeprefix("folded ")


def layers_of(path: Path) -> list[Layer]:
    """Return what is known of all normalization layers of a model."""
    file, folded = ModelFile(path), ModelFile(path)
    verdicts = iter(fold_all(folded))
    return [
        _layer(one, file, next(verdicts) if one.operator == BATCH_NORM else None)
        for one in normalizations(file)
    ]


def _layer(one: Normalization, file: ModelFile, verdict: Verdict | None) -> Layer:
    values = [None if tensor is None else file.array(tensor) for tensor in one.parameters]
    vectors = [None if value is None else as_vector(value) for value in values]
    scale = vectors[0] if vectors else None
    if verdict is None:
        return Layer(one, scale)
    _, _, mean, variance = vectors
    found = None
    if mean is not None and variance is not None and values[3] is not None:
        found = unusual(mean, variance, scale, one.epsilon, values[3].dtype)
    return Layer(one, scale, mean, variance, found, verdict)


def run(options: Namespace) -> int:
    """Print what a model has, and draw it; return the exit status."""
    show = report.showing(options.json, report.layers_as_json, report.layers_as_table)
    draw = report.drawing(options.plot)
    layers = layers_of(options.model)
    text = show(options.model, layers)
    draw(layers)
    print(text)
    return 0
