"""``python -m bnfast demo``: a small convolutional network, with and without batch norm.

Every normalization is made again by the plain NumPy formulas, for the time they take and the
difference they make.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bnfast import BatchNorm, _dtypes
from bnfast._cli import digits
from bnfast._cli.bench.rivals import numpy_formulas
from bnfast._cli.digits import Network, Normalization, float32
from bnfast._cli.outputs import check_output, free_name
from bnfast._typing import Array

BATCH = 64


class Stopwatch:
    """Seconds in the normalizations of training, and the largest difference of their results."""

    def __init__(self) -> None:
        self.bnfast = self.numpy = self.difference = 0.0
        self.calls = 0


class ComparedNormalization(Normalization):
    """Batch norm, and beside it, in training, the NumPy formulas on the same arrays.

    With an activation in the same pass, where there is one.
    """

    layer: BatchNorm

    def __init__(self, channels: int, stopwatch: Stopwatch, **fused: Any) -> None:
        super().__init__(BatchNorm(channels, axis=-1, **fused))
        slopes = {None: None, "relu": 0.0, "leaky_relu": self.layer.negative_slope}
        self.slope = slopes[self.layer.activation]
        self.running_mean, self.running_var = np.zeros((2, channels), np.float32)
        self.stopwatch = stopwatch

    def forward(self, x: Array) -> Array:
        if not self.layer.training:
            return self.layer(x)
        assert self.layer.weight is not None
        assert self.layer.bias is not None
        before = x.copy() if self.layer.inplace else x
        start = perf_counter()
        y = self.layer(x)
        middle = perf_counter()
        plain, mean, invstd = numpy_formulas.batch_norm_forward(
            float32(before), self.layer.weight, self.layer.bias, self.layer.eps, axis=-1
        )
        if self.slope is not None:
            np.multiply(plain, np.float32(self.slope), out=plain, where=plain < 0)
            self.negative = ~(y > 0)  # a value beside 0 may be on either side, as it is rounded
        plain = plain.astype(x.dtype, copy=False)
        count = x.size // x.shape[-1]
        unbiased = (1 / invstd**2 - self.layer.eps) * np.float32(count / (count - 1))
        numpy_formulas.update_running(self.running_mean, self.running_var, mean, unbiased, 0.1)
        self._note(middle - start, perf_counter() - middle, y, plain)
        self.before, self.after, self.saved = before, y, (mean, invstd)
        return y

    def backward(self, dy: Array) -> Array:
        assert self.layer.weight is not None
        start = perf_counter()
        dx = self.layer.backward(dy)
        middle = perf_counter()
        upstream = float32(dy)
        if self.slope is not None:
            upstream = np.where(self.negative, np.float32(self.slope) * upstream, upstream)
        plain, _, _ = numpy_formulas.batch_norm_backward(
            upstream, float32(self.before), *self.saved, self.layer.weight, axis=-1
        )
        plain = plain.astype(dy.dtype, copy=False)
        self._note(middle - start, perf_counter() - middle, dx, plain)
        return dx

    def _note(self, ours: float, theirs: float, result: Array, plain: Array) -> None:
        self.stopwatch.bnfast += ours
        self.stopwatch.numpy += theirs
        self.stopwatch.calls += 1
        result, plain = float32(result), float32(plain)
        size = float(np.abs(plain).max()) or 1.0
        difference = float(np.abs(result - plain).max()) / size
        self.stopwatch.difference = max(self.stopwatch.difference, difference)


def _plot(path: Path, losses: dict[str, list[float]], first: ComparedNormalization) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, curve in losses.items():
        left.plot(curve, label=name, linewidth=1)
    left.set(xlabel="step", ylabel="cross entropy", title="Training loss", yscale="log")
    left.legend()
    both = {
        "before batch norm": float32(first.before),
        "after batch norm": float32(first.after),
    }
    limits = np.percentile(np.concatenate([a.ravel() for a in both.values()]), (0.5, 99.5))
    for name, values in both.items():
        right.hist(values.ravel(), 100, tuple(limits), density=True, alpha=0.6, label=name)
    right.set(xlabel="activation", ylabel="density", title="First convolution, last batch")
    right.legend()
    figure.savefig(path, dpi=120)


# How a normalization gets its activation, by the argument of the command, and what the table says.
FUSED: Mapping[str | None, Mapping[str, Any]] = {
    None: {},
    "fused": {"activation": "relu"},
    "inplace": {"activation": "leaky_relu", "inplace": True},
}
CALLED: Mapping[str | None, str] = {
    None: "with batch norm",
    "fused": "with batch norm + ReLU in one pass",
    "inplace": "with batch norm + leaky ReLU in place",
}


def run(options: Namespace) -> int:
    """Train both networks, print the table, write the plot; return the exit status."""
    epochs, learning_rate, seed = options.epochs, options.learning_rate, options.seed
    dtype, fused = options.dtype, options.fused
    # Plots of earlier runs stay, to be compared with.
    output = options.output or free_name("bnfast_demo.png")
    check_output(output, options.force)
    console = Console()
    data = digits.load()
    stopwatch = Stopwatch()
    compared: list[ComparedNormalization] = []

    def normalize(channels: int) -> Normalization:
        compared.append(ComparedNormalization(channels, stopwatch, **FUSED[fused]))
        return compared[-1]

    activations = _dtypes.named(dtype)
    networks = {
        CALLED[fused]: Network(seed, normalize, fused=fused is not None, dtype=activations),
        "without": Network(seed, dtype=activations),
    }
    losses: dict[str, list[float]] = {}
    steps = len(networks) * epochs * (len(data.images) // BATCH)
    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
    )
    start = perf_counter()
    # Without batch norm such a learning rate may end in overflow: that is what is to be seen.
    with (
        Progress(*columns, TimeRemainingColumn(), console=console) as bar,
        np.errstate(all="ignore"),
    ):
        task = bar.add_task("", total=steps)
        for name, network in networks.items():
            losses[name] = []
            for loss in network.train(data, epochs, BATCH, learning_rate, seed):
                losses[name].append(loss)
                bar.advance(task)
        # The plot shows the last batch of training, so before the accuracies are taken.
        _plot(output, losses, compared[0])
        ours, theirs = stopwatch.bnfast, stopwatch.numpy
        calls, difference = stopwatch.calls, stopwatch.difference
        table = Table(
            title=f"{len(data.images)} training and {len(data.test_images)} test images, "
            f"SGD at {learning_rate:g}, activations of {dtype}"
        )
        table.add_column("network")
        for heading in ("last loss", "test accuracy (evaluation)", "test accuracy (training mode)"):
            table.add_column(heading, justify="right")
        for name, network in networks.items():
            table.add_row(
                name,
                f"{np.mean(losses[name][-10:]):.4f}",
                f"{network.accuracy(data, training=False):.2%}",
                f"{network.accuracy(data, training=True):.2%}"
                if network.normalizations
                else "the same",
            )
    console.print(table)
    console.print(
        f"normalization in training, {calls} calls: bnfast {ours:.3f} s, plain NumPy formulas "
        f"{theirs:.3f} s ({theirs / ours:.1f} of bnfast's time); results differ by at most "
        f"{difference:.0e} of the largest"
    )
    console.print(f"all in {perf_counter() - start:.1f} s; plot written to", end=" ")
    console.print(str(output.resolve()), soft_wrap=True, highlight=False)
    return 0
