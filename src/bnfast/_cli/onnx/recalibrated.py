"""A batch norm layer whose statistics are made anew."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

import bnfast
from bnfast._cli.failure import Failure
from bnfast._cli.onnx.graph import attribute, called
from bnfast._cli.onnx.health import unusual
from bnfast._cli.onnx.layers import Normalization, as_vector
from bnfast._typing import Array
from bnfast.statistics import Moments

MEAN, VARIANCE = 3, 4  # inputs of a node
_FEWEST_VALUES = 2  # of a channel: a single one has no variance


@dataclass
class RecalibratedLayer:
    """A layer whose statistics are made anew."""

    normalization: Normalization
    scale: Array | None
    before: tuple[Array, Array]  # mean and variance, as they are stored
    moments: Moments | None = None
    after: tuple[Array, Array] = field(init=False)  # as they are stored

    @property
    def _called(self) -> str:
        return called(self.normalization.node)

    @property
    def taken(self) -> str:
        """The value that it normalizes."""
        return str(self.normalization.node.input[0])

    def add(self, x: Array) -> None:
        """Add what arrives at it of a batch."""
        x = x if x.dtype in (np.float32, np.float64) else x.astype(np.float32)
        if x.ndim == 1:
            x = x[:, np.newaxis]
        of_elements = not attribute(self.normalization.node, "spatial", 1)
        part = bnfast.moments(x, tuple(range(1, x.ndim)) if of_elements else 1)
        self.moments = part if self.moments is None else self.moments.merge(part)

    def finish(self) -> None:
        """Round the statistics to the types that the model has them in."""
        moments = self.moments
        if moments is None or np.any(np.asarray(moments.count) < _FEWEST_VALUES):
            count = 0 if moments is None else np.min(moments.count)
            raise Failure(
                f"{self._called}: expected at least {_FEWEST_VALUES} values in each channel, got "
                f"{count}"
            )
        if not np.all(np.isfinite(moments.mean) & np.isfinite(moments.m2)):
            raise Failure(f"{self._called}: expected finite values, got NaN or infinity")
        with np.errstate(over="ignore"):
            mean, variance = (
                statistic.reshape(old.shape).astype(old.dtype)
                for statistic, old in zip((moments.mean, moments.var), self.before, strict=True)
            )
        for name, new in (("mean", mean), ("variance", variance)):
            if not np.all(np.isfinite(new.astype(np.float64))):
                raise Failure(f"{self._called}: the new {name} leaves the range of {new.dtype}")
        self.after = mean, variance

    @property
    def difference(self) -> Array:
        """The root mean square difference of the outputs of each channel, where the scale is 1.

        Between the old statistics and the new ones, on these data.
        """
        epsilon = self.normalization.epsilon
        (old_mean, old_variance), (mean, variance) = (
            [as_vector(statistic) for statistic in both] for both in (self.before, self.after)
        )
        with np.errstate(all="ignore"):
            divisor = np.sqrt(old_variance + epsilon)
            moved = (mean - old_mean) / divisor
            stretched = np.sqrt(variance) * (1 / divisor - 1 / np.sqrt(variance + epsilon))
            difference: Array = np.sqrt(moved**2 + stretched**2)
        return difference

    @property
    def unusual(self) -> dict[str, list[int]]:
        """What is unusual in the new statistics."""
        mean, variance = (as_vector(statistic) for statistic in self.after)
        epsilon = self.normalization.epsilon
        return unusual(mean, variance, self.scale, epsilon, self.after[1].dtype)
