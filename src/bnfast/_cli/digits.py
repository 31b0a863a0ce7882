"""A small convolutional network for scikit-learn's handwritten digits, in plain NumPy and NHWC.

Its normalization is bnfast, or none. ``python -m bnfast demo`` and ``docs/make_choosing.py`` train
it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from bnfast._cli.kept_memory import kept_bytes
from bnfast._typing import Array
from bnfast.layers._layer import Layer

CHANNELS = (32, 64, 64)
EVALUATED_TOGETHER = 64


class Digits(NamedTuple):
    """Images of 8x8 pixels, NHWC, and what they show."""

    images: Array
    labels: Array
    test_images: Array
    test_labels: Array


def load() -> Digits:
    """Return 1347 digits to train with, and 450 to test with."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[..., None]
    x, x_test, labels, labels_test = train_test_split(
        images, digits.target, test_size=450, stratify=digits.target, random_state=0
    )
    return Digits(x, labels, x_test, labels_test)


def float32(array: Array) -> Array:
    """Return activations of 16 bits as float32, in which parameters are and products are made."""
    return array.astype(np.float32, copy=False)


class Stage(Protocol):
    """What the network is made of; stages take activations of any float type."""

    def forward(self, x: Array) -> Array: ...
    def backward(self, dy: Array) -> Array: ...
    def parameters(self) -> list[tuple[Array, Array]]: ...


class Convolution:
    """3x3, padded, as one matrix product over the patches; weights He's times a scale at first."""

    def __init__(
        self, rng: np.random.Generator, inputs: int, outputs: int, bias: bool, scale: float = 1.0
    ) -> None:
        std = scale * math.sqrt(2 / (9 * inputs))
        self.weight = rng.normal(0, std, (9 * inputs, outputs)).astype(np.float32)
        self.bias = np.zeros(outputs, np.float32) if bias else None

    def forward(self, x: Array) -> Array:
        n, h, w, c = self.shape = x.shape
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
        self.patches = windows.transpose(0, 1, 2, 4, 5, 3).reshape(n * h * w, 9 * c)
        y = float32(self.patches) @ self.weight
        if self.bias is not None:
            y += self.bias
        return y.reshape(n, h, w, -1)

    def backward(self, dy: Array) -> Array:
        n, h, w, c = self.shape
        flat = float32(dy.reshape(n * h * w, -1))
        self.weight_grad = float32(self.patches.T) @ flat
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
        y: Array = x.reshape(n, h // kh, kh, w // kw, kw, c).mean((2, 4), np.float32)
        return y

    def backward(self, dy: Array) -> Array:
        kh, kw = self.window
        return (float32(dy) / np.float32(kh * kw)).repeat(kh, 1).repeat(kw, 2)

    def parameters(self) -> list[tuple[Array, Array]]:
        return []


class Linear:
    """The classifier."""

    def __init__(
        self, rng: np.random.Generator, inputs: int, outputs: int, scale: float = 1.0
    ) -> None:
        std = scale * math.sqrt(1 / inputs)
        self.weight = rng.normal(0, std, (inputs, outputs)).astype(np.float32)
        self.bias = np.zeros(outputs, np.float32)

    def forward(self, x: Array) -> Array:
        self.x = float32(x.reshape(len(x), -1))
        y: Array = self.x @ self.weight + self.bias
        return y

    def backward(self, dy: Array) -> Array:
        dy = float32(dy)
        self.weight_grad, self.bias_grad = self.x.T @ dy, dy.sum(0)
        return (dy @ self.weight.T).reshape(len(dy), 1, 1, -1)

    def parameters(self) -> list[tuple[Array, Array]]:
        return [(self.weight, self.weight_grad), (self.bias, self.bias_grad)]


class Normalization:
    """A layer of bnfast, as the network calls it."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def forward(self, x: Array) -> Array:
        return self.layer(x)

    def backward(self, dy: Array) -> Array:
        return self.layer.backward(dy)

    def parameters(self) -> list[tuple[Array, Array]]:
        layer = self.layer
        pairs = ((layer.weight, layer.weight_grad), (layer.bias, layer.bias_grad))
        return [(p, g) for p, g in pairs if p is not None and g is not None]


class Network:
    """Three convolutions and a linear classifier.

    `normalize` makes the normalization of so many channels, which comes before the activation or
    after it, or has one of its own, `fused`. What goes from stage to stage, in both directions, is
    of `dtype`; parameters, their gradients and the logits are float32.
    """

    def __init__(
        self,
        seed: int,
        normalize: Callable[[int], Normalization] | None = None,
        *,
        after_activation: bool = False,
        fused: bool = False,
        weight_scale: float = 1.0,
        dtype: np.dtype[Any] | type = np.float32,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.dtype = np.dtype(dtype)
        self.stages: list[Stage] = []
        self.normalizations: list[Normalization] = []
        self.activated: list[Stage] = []  # normalizations and activations
        inputs = 1
        # What a normalization subtracts next, needs no bias.
        bias = normalize is None or after_activation
        for number, outputs in enumerate(CHANNELS):
            self.stages.append(Convolution(rng, inputs, outputs, bias, weight_scale))
            activation: list[Stage] = [] if fused else [Rectifier()]
            if normalize is not None:
                normalization = normalize(outputs)
                self.normalizations.append(normalization)
                activation.insert(1 if after_activation else 0, normalization)
            self.stages += activation
            self.activated += activation
            self.stages.append(MeanPooling(whole=number == len(CHANNELS) - 1))
            inputs = outputs
        self.stages.append(Linear(rng, inputs, 10, weight_scale))

    def forward(self, x: Array) -> Array:
        """Return the logits."""
        for stage in self.stages:
            x = stage.forward(x.astype(self.dtype, copy=False))
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
        for stage in reversed(self.stages):
            gradient = stage.backward(gradient.astype(self.dtype, copy=False))
            for parameter, its_gradient in stage.parameters():
                parameter -= np.float32(learning_rate) * its_gradient
        return loss

    def train(
        self, digits: Digits, epochs: int, batch_size: int, learning_rate: float, seed: int
    ) -> Iterator[float]:
        """Train on all whole batches of each epoch, and give the loss of every step."""
        rng = np.random.default_rng(seed)
        for _ in range(epochs):
            for batch in _batches(rng, len(digits.images), batch_size):
                yield self.train_on(digits.images[batch], digits.labels[batch], learning_rate)

    def kept_bytes(self, x: Array) -> int:
        """Return what normalizations and activations keep of a batch for the backward pass.

        In bytes; it changes nothing but what they keep.
        """
        owners = [s.layer if isinstance(s, Normalization) else s for s in self.activated]
        before = kept_bytes(*owners)
        with self._left_as_it_is():
            self.forward(x)
            return kept_bytes(*owners) - before

    @contextmanager
    def _left_as_it_is(self) -> Iterator[None]:
        """Give the normalizations back their states, and training mode."""
        states = [normalization.layer.state_dict() for normalization in self.normalizations]
        yield
        for normalization, state in zip(self.normalizations, states, strict=True):
            normalization.layer.load_state_dict(state)
            normalization.layer.train()

    def accuracy(self, digits: Digits, *, training: bool = False) -> float:
        """Return the share of right answers, with batch or running statistics; changes nothing."""
        x, labels = digits.test_images, digits.test_labels
        right = 0
        with self._left_as_it_is():
            for normalization in self.normalizations:
                normalization.layer.train(training)
            for start in range(0, len(x), EVALUATED_TOGETHER):
                some = slice(start, start + EVALUATED_TOGETHER)
                right += int((self.forward(x[some]).argmax(1) == labels[some]).sum())
        return right / len(x)


def _batches(rng: np.random.Generator, count: int, size: int) -> Iterator[Array]:
    """Give the indices of whole batches, in random order."""
    order = rng.permutation(count)
    for start in range(0, count - size + 1, size):
        yield order[start : start + size]
