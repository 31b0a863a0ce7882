"""The statistics of all batches that a layer sees, pooled exactly, as the layer keeps them."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from bnfast import _validation, _whitening
from bnfast._typing import Array
from bnfast._whitening import COVARIANCE
from bnfast.adaptation._borrowed import moments_as_seen
from bnfast.functional import moments
from bnfast.layers import (
    BatchRenorm,
    CrossIterationBatchNorm,
    InstanceNorm,
    MovingAverageBatchNorm,
)
from bnfast.layers._tracking import Averaging, ChannelLayer, TrackingLayer
from bnfast.layers.whitening import WhiteningLayer
from bnfast.statistics import Moments


class Pool(Protocol):
    """What batches are added to."""

    def add(self, x: Array) -> None: ...

    def statistics(self) -> tuple[Array, ...]:
        """Return the running statistics of what was added, in float64."""


class OfChannels:
    """The mean and the variance of all values of each channel."""

    def __init__(self, layer: ChannelLayer, unbiased: bool = False) -> None:
        self._layer, self._unbiased = layer, unbiased
        self._pooled: Moments | None = None

    def add(self, x: Array) -> None:
        self.merge(moments_as_seen(self._layer, x))

    def merge(self, of_batch: Moments) -> None:
        """Add a batch of these moments."""
        self._pooled = of_batch if self._pooled is None else self._pooled.merge(of_batch)

    def statistics(self) -> tuple[Array, ...]:
        pooled = self._pooled
        assert pooled is not None
        if pooled.count < _validation.fewest_values(self._unbiased):
            raise ValueError(
                f"{type(self._layer).__name__} must see more than one value per channel for an "
                f"unbiased variance"
            )
        divisor = pooled.count - 1 if self._unbiased else pooled.count
        with np.errstate(all="ignore"):
            return pooled.mean, np.asarray(pooled.m2) / divisor


class OfDeviations(OfChannels):
    """The mean and the deviation, sqrt(variance + eps), of all values of each channel."""

    def statistics(self) -> tuple[Array, Array]:
        assert self._pooled is not None
        with np.errstate(all="ignore"):
            return self._pooled.mean, np.sqrt(self._pooled.var + self._layer.eps)


class OfSquares(OfChannels):
    """The mean square of all values of each channel."""

    def statistics(self) -> tuple[Array, ...]:
        return super().statistics()[1:]


class OfSamples:
    """The averages, over all samples, of the mean and the variance that each sample has alone."""

    def __init__(self, layer: InstanceNorm) -> None:
        self._layer = layer
        self._count = 0
        self._sums = np.zeros((2, layer.num_features))

    def add(self, x: Array) -> None:
        values = x.size // (len(x) * self._layer.num_features)
        _validation.enough_values("x", x, values, "channel of each sample", unbiased=True)
        with np.errstate(all="ignore"):
            for sample in range(len(x)):
                alone = moments(x[sample : sample + 1], self._layer.axis)
                self._sums += alone.mean, alone.m2 / (alone.count - 1)
        self._count += len(x)

    def statistics(self) -> tuple[Array, Array]:
        mean, variance = self._sums / self._count
        return mean, variance


class OfMatrices:
    """The mean, and the matrix made of the covariance, of all values of each group."""

    def __init__(self, layer: WhiteningLayer) -> None:
        self._layer = layer
        each = layer.num_features // layer.num_groups
        self._count = 0
        self._mean = np.zeros((layer.num_groups, each))
        self._scatter = np.zeros((layer.num_groups, each, each))

    def add(self, x: Array) -> None:
        mean, covariance = _whitening.mean_and_covariance(x, self._layer.axis, self._scatter.shape)
        count = x.size // mean.size
        with np.errstate(all="ignore"):
            share = count / (self._count + count)
            distance = mean.reshape(self._mean.shape) - self._mean
            outer = distance[:, :, None] * distance[:, None, :]
            self._scatter += count * covariance + self._count * share * outer
            self._mean += share * distance
        self._count += count

    def statistics(self) -> tuple[Array, Array]:
        mean, covariance = self._mean.reshape(-1), self._scatter / self._count
        if self._layer.averaged == COVARIANCE:
            return mean, covariance
        with np.errstate(all="ignore"):
            return mean, self._layer._whiten(mean, covariance).matrix


def pool_of(layer: Averaging) -> Pool:
    """Return an empty pool of the kind of statistics that a layer has."""
    if isinstance(layer, BatchRenorm):
        return OfDeviations(layer)
    if isinstance(layer, InstanceNorm):
        return OfSamples(layer)
    if isinstance(layer, WhiteningLayer):
        return OfMatrices(layer)
    if isinstance(layer, MovingAverageBatchNorm):
        return OfSquares(layer)
    assert isinstance(layer, (TrackingLayer, CrossIterationBatchNorm))
    return OfChannels(layer, layer.unbiased)
