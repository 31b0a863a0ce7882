"""``python -m bnfast demo``: a small convolutional network, with and without batch norm.

The network is plain NumPy, in NHWC; its normalization is bnfast. Every normalization is made again
by the plain NumPy formulas, for the time they take and the difference they make.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from bnfast import BatchNorm
from bnfast._cli.bench.rivals import numpy_formulas

Array = NDArray[Any]

BATCH = 64
CHANNELS = (32, 64, 64)


class Layer(Protocol):
    """What the network is made of."""

    def forward(self, x: Array) -> Array: ...
    def backward(self, dy: Array) -> Array: ...
    def parameters(self) -> list[tuple[Array, Array]]: ...


class Convolution:
    """3x3, padded, as one matrix product over the patches; bias only where no normalization is."""

    def __init__(self, rng: np.random.Generator, inputs: int, outputs: int, bias: bool) -> None:
        std = math.sqrt(2 / (9 * inputs))
        self.weight = rng.normal(0, std, (9 * inputs, outputs)).astype(np.float32)
        self.bias = np.zeros(outputs, np.float32) if bias else None

    def forward(self, x: Array) -> Array:
        n, h, w, c = self.shape = x.shape
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
        self.patches = windows.transpose(0, 1, 2, 4, 5, 3).reshape(n * h * w, 9 * c)
        y = self.patches @ self.weight
        if self.bias is not None:
            y += self.bias
        return y.reshape(n, h, w, -1)

    def backward(self, dy: Array) -> Array:
        n, h, w, c = self.shape
        flat = dy.reshape(n * h * w, -1)
        self.weight_grad = self.patches.T @ flat
        self.bias_grad = flat.sum(0)
        patches = (flat @ self.weight.T).reshape(n, h, w, 3, 3, c)
        padded = np.zeros((n, h + 2, w + 2, c), np.float32)
        for i in range(3):
            for j in range(3):
                padded[:, i : i + h, j : j + w] += patches[:, :, :, i, j]
        return padded[:, 1:-1, 1:-1]

    def parameters(self) -> list[tuple[Array, Array]]:
        pairs = [(self.weight, self.weight_grad)]
        return pairs if self.bias is None else [*pairs, (self.bias, self.bias_grad)]


class Rectifier:
    """max(x, 0)."""

    def forward(self, x: Array) -> Array:
        self.positive = x > 0
        y: Array = x * self.positive
        return y

    def backward(self, dy: Array) -> Array:
        dx: Array = dy * self.positive
        return dx

    def parameters(self) -> list[tuple[Array, Array]]:
        return []


class MeanPooling:
    """The mean of 2x2 neighbours, or of the whole image."""

    def __init__(self, whole: bool = False) -> None:
        self.whole = whole

    def forward(self, x: Array) -> Array:
        n, h, w, c = self.shape = x.shape
        self.window = (h, w) if self.whole else (2, 2)
        kh, kw = self.window
        y: Array = x.reshape(n, h // kh, kh, w // kw, kw, c).mean((2, 4))
        return y

    def backward(self, dy: Array) -> Array:
        kh, kw = self.window
        return (dy / np.float32(kh * kw)).repeat(kh, 1).repeat(kw, 2)

    def parameters(self) -> list[tuple[Array, Array]]:
        return []


class Linear:
    """The classifier."""

    def __init__(self, rng: np.random.Generator, inputs: int, outputs: int) -> None:
        self.weight = rng.normal(0, math.sqrt(1 / inputs), (inputs, outputs)).astype(np.float32)
        self.bias = np.zeros(outputs, np.float32)

    def forward(self, x: Array) -> Array:
        self.x = x.reshape(len(x), -1)
        y: Array = self.x @ self.weight + self.bias
        return y

    def backward(self, dy: Array) -> Array:
        self.weight_grad, self.bias_grad = self.x.T @ dy, dy.sum(0)
        return (dy @ self.weight.T).reshape(len(dy), 1, 1, -1)

    def parameters(self) -> list[tuple[Array, Array]]:
        return [(self.weight, self.weight_grad), (self.bias, self.bias_grad)]


class Stopwatch:
    """Seconds in the normalizations of training, and the largest difference of their results."""

    def __init__(self) -> None:
        self.bnfast = self.numpy = self.difference = 0.0
        self.calls = 0


class Normalization:
    """bnfast's layer, and beside it, in training, the NumPy formulas on the same arrays."""

    def __init__(self, channels: int, stopwatch: Stopwatch) -> None:
        self.layer = BatchNorm(channels, axis=-1)
        self.running_mean, self.running_var = np.zeros((2, channels), np.float32)
        self.stopwatch = stopwatch

    def forward(self, x: Array) -> Array:
        if not self.layer.training:
            return self.layer(x)
        assert self.layer.weight is not None
        assert self.layer.bias is not None
        start = perf_counter()
        y = self.layer(x)
        middle = perf_counter()
        plain, mean, invstd = numpy_formulas.batch_norm_forward(
            x, self.layer.weight, self.layer.bias, self.layer.eps, axis=-1
        )
        count = x.size // x.shape[-1]
        unbiased = (1 / invstd**2 - self.layer.eps) * np.float32(count / (count - 1))
        numpy_formulas.update_running(self.running_mean, self.running_var, mean, unbiased, 0.1)
        self._note(middle - start, perf_counter() - middle, y, plain)
        self.before, self.after, self.saved = x, y, (mean, invstd)
        return y

    def backward(self, dy: Array) -> Array:
        assert self.layer.weight is not None
        start = perf_counter()
        dx = self.layer.backward(dy)
        middle = perf_counter()
        plain, _, _ = numpy_formulas.batch_norm_backward(
            dy, self.before, *self.saved, self.layer.weight, axis=-1
        )
        self._note(middle - start, perf_counter() - middle, dx, plain)
        return dx

    def _note(self, ours: float, theirs: float, result: Array, plain: Array) -> None:
        self.stopwatch.bnfast += ours
        self.stopwatch.numpy += theirs
        self.stopwatch.calls += 1
        size = float(np.abs(plain).max()) or 1.0
        difference = float(np.abs(result - plain).max()) / size
        self.stopwatch.difference = max(self.stopwatch.difference, difference)

    def parameters(self) -> list[tuple[Array, Array]]:
        layer = self.layer
        pairs = ((layer.weight, layer.weight_grad), (layer.bias, layer.bias_grad))
        return [(p, g) for p, g in pairs if p is not None and g is not None]


class Network:
    """Three convolutions and a linear classifier."""

    def __init__(self, seed: int, normalized: bool) -> None:
        rng = np.random.default_rng(seed)
        self.stopwatch = Stopwatch()
        self.layers: list[Layer] = []
        self.normalizations: list[Normalization] = []
        inputs = 1
        for number, outputs in enumerate(CHANNELS):
            self.layers.append(Convolution(rng, inputs, outputs, bias=not normalized))
            if normalized:
                self.normalizations.append(Normalization(outputs, self.stopwatch))
                self.layers.append(self.normalizations[-1])
            self.layers.append(Rectifier())
            self.layers.append(MeanPooling(whole=number == len(CHANNELS) - 1))
            inputs = outputs
        self.layers.append(Linear(rng, inputs, 10))

    def forward(self, x: Array) -> Array:
        """Return the logits."""
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def train_on(self, x: Array, labels: Array, learning_rate: float) -> float:
        """Take one step of SGD on the cross entropy; return it."""
        logits = self.forward(x)
        logits = logits - logits.max(1, keepdims=True)
        exponentials = np.exp(logits)
        probabilities = exponentials / exponentials.sum(1, keepdims=True)
        rows = np.arange(len(labels))
        loss = -float(np.log(np.maximum(probabilities[rows, labels], 1e-30)).mean())
        gradient = probabilities
        gradient[rows, labels] -= 1
        gradient /= np.float32(len(labels))
        for layer in reversed(self.layers):
            gradient = layer.backward(gradient)
            for parameter, its_gradient in layer.parameters():
                parameter -= np.float32(learning_rate) * its_gradient
        return loss

    def accuracy(self, x: Array, labels: Array, *, training: bool) -> float:
        """Return the share of right answers, with batch or running statistics; changes nothing."""
        states = [normalization.layer.state_dict() for normalization in self.normalizations]
        for normalization in self.normalizations:
            normalization.layer.train(training)
        right = 0
        for start in range(0, len(x), BATCH):
            logits = self.forward(x[start : start + BATCH])
            right += int((logits.argmax(1) == labels[start : start + BATCH]).sum())
        for normalization, state in zip(self.normalizations, states, strict=True):
            normalization.layer.load_state_dict(state)
            normalization.layer.train()
        return right / len(x)


def _batches(rng: np.random.Generator, count: int) -> Iterator[Array]:
    order = rng.permutation(count)
    for start in range(0, count - BATCH + 1, BATCH):
        yield order[start : start + BATCH]


def _train(
    network: Network, x: Array, labels: Array, epochs: int, rate: float, seed: int, tick: Any
) -> list[float]:
    rng = np.random.default_rng(seed)
    losses = []
    for _ in range(epochs):
        for batch in _batches(rng, len(x)):
            losses.append(network.train_on(x[batch], labels[batch], rate))
            tick()
    return losses


def _plot(path: Path, losses: dict[str, list[float]], network: Network) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, curve in losses.items():
        left.plot(curve, label=name, linewidth=1)
    left.set(xlabel="step", ylabel="cross entropy", title="Training loss", yscale="log")
    left.legend()
    first = network.normalizations[0]
    both = {"before batch norm": first.before, "after batch norm": first.after}
    limits = np.percentile(np.concatenate([a.ravel() for a in both.values()]), (0.5, 99.5))
    for name, values in both.items():
        right.hist(values.ravel(), 100, tuple(limits), density=True, alpha=0.6, label=name)
    right.set(xlabel="activation", ylabel="density", title="First convolution, last batch")
    right.legend()
    figure.savefig(path, dpi=120)


def run(epochs: int, learning_rate: float, seed: int, output: Path) -> int:
    """Train both networks, print the table, write the plot; return the exit status."""
    console = Console()
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[..., None]
    x, x_test, labels, labels_test = train_test_split(
        images, digits.target, test_size=450, stratify=digits.target, random_state=0
    )
    networks = {
        "with batch norm": Network(seed, normalized=True),
        "without": Network(seed, normalized=False),
    }
    losses = {}
    steps = len(networks) * epochs * (len(x) // BATCH)
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
            losses[name] = _train(
                network, x, labels, epochs, learning_rate, seed, lambda: bar.advance(task)
            )
        # The plot shows the last batch of training, so before the accuracies are taken.
        _plot(output, losses, networks["with batch norm"])
        stopwatch = networks["with batch norm"].stopwatch
        ours, theirs = stopwatch.bnfast, stopwatch.numpy
        calls, difference = stopwatch.calls, stopwatch.difference
        table = Table(
            title=f"{len(x)} training and {len(x_test)} test images, SGD at {learning_rate:g}"
        )
        table.add_column("network")
        for heading in ("last loss", "test accuracy (evaluation)", "test accuracy (training mode)"):
            table.add_column(heading, justify="right")
        for name, network in networks.items():
            table.add_row(
                name,
                f"{np.mean(losses[name][-10:]):.4f}",
                f"{network.accuracy(x_test, labels_test, training=False):.2%}",
                f"{network.accuracy(x_test, labels_test, training=True):.2%}"
                if network.normalizations
                else "the same",
            )
    console.print(table)
    console.print(
        f"normalization in training, {calls} calls: bnfast {ours:.3f} s, plain NumPy formulas "
        f"{theirs:.3f} s ({theirs / ours:.1f} times as long); results differ by at most "
        f"{difference:.0e} of the largest"
    )
    console.print(f"all in {perf_counter() - start:.1f} s; plot written to", end=" ")
    console.print(str(output.resolve()), soft_wrap=True, highlight=False)
    return 0
