"""In-place layers, which write their output over their input and keep that output alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from bnfast import _dtypes, _primitives
from bnfast._activations import LEAKY, activation_of
from bnfast._primitives import Activation
from bnfast._scalars import describe
from bnfast._typing import Array
from bnfast.layers._fused import FusedTrackingLayer
from bnfast.layers._layer import Flag, Gradients
from bnfast.layers._tracking import Statistics

AnyInPlace = TypeVar("AnyInPlace", bound="InPlaceLayer")

# Weights whose square, and that of whose inverse, are normal numbers of float64.
LEAST_WEIGHT, MOST_WEIGHT = 1e-100, 1e100


def _least_slope(dtype: np.dtype[Any]) -> float:
    """Return the smallest normal number: with less, rounding leaves nothing of some z below 0.

    A subnormal y is off by half of the least number, so z by epsilon at most with this slope.
    """
    narrow = np.float16 if dtype.char == "e" else _dtypes.computed_in(dtype)
    return float(np.finfo(narrow).tiny)


class OfOutput(NamedTuple):
    """What a gradient needs besides y: how z = weight * xhat + bias and y = activation(z) came."""

    invstd: NDArray[np.float64]
    weight: Array | None
    bias: Array | None
    activation: Activation | None
    constant: bool  # the statistics did not come from x


class InPlaceLayer(FusedTrackingLayer):
    """A layer that may do so, with an activation that can be undone or none."""

    _shown_if_not: ClassVar[Mapping[str, Any]] = {
        **FusedTrackingLayer._shown_if_not,
        "inplace": False,
    }
    inplace = Flag()

    def __new__(cls: type[AnyInPlace], *_: Any, **__: Any) -> AnyInPlace:
        layer = super().__new__(cls)
        layer.inplace = False  # pickles of 0.1 have none
        return layer

    def _check_invertible(self) -> None:
        """Raise where the output would not tell what xhat was."""
        chosen = activation_of(self.activation, self.negative_slope)
        if chosen is not None and not chosen.is_invertible:
            slope = f" with {self.negative_slope}" if self.activation == LEAKY else ""
            raise ValueError(
                "activation must be one that inplace=True can invert, None or leaky_relu with a "
                f"negative_slope above 0, got {self.activation}{slope}"
            )
        if self.weight is None:
            return
        sizes = np.abs(self.weight.astype(np.float64))
        wrong = np.flatnonzero(~((sizes >= LEAST_WEIGHT) & (sizes <= MOST_WEIGHT)))
        if wrong.size:
            raise ValueError(
                "weight must not be 0 for inplace=True, which divides by it, nor as small or large "
                f"as {LEAST_WEIGHT:g} or {MOST_WEIGHT:g}, got {self.weight[wrong[0]]} in channel "
                f"{wrong[0]}"
            )

    def _destination(
        self, x: Array, out: Array | None, residual: object, counted: Any
    ) -> Array | None:
        if not self.inplace:
            return out
        self._check_invertible()
        least = _least_slope(x.dtype)
        if self.activation == LEAKY and self.negative_slope < least:
            raise ValueError(
                f"negative_slope must be at least {least:.2g} with inplace=True and data of "
                f"{x.dtype}, in which negative outputs would be lost, got {self.negative_slope}"
            )
        if residual is not None:
            raise ValueError(
                "residual must be None with inplace=True, which cannot subtract it, got "
                f"{describe(residual)}"
            )
        if counted is not None:
            raise ValueError("mask and lengths must be None with inplace=True, got one")
        if out is not None:
            return out
        if not x.flags.writeable:
            raise ValueError(
                "x must be writable with inplace=True, which writes over it, got a read-only "
                f"{describe(x)}"
            )
        return x

    def _is_plain(self, residual: object) -> bool:
        return not self.inplace and super()._is_plain(residual)

    def _save_fused(
        self,
        x: Array,
        y: Array,
        out: Array | None,
        statistics: Statistics,
        chosen: Activation | None,
        residual: Any,
    ) -> None:
        if not self.inplace:
            super()._save_fused(x, y, out, statistics, chosen, residual)
            return
        _, invstd, weight, _, constant = statistics
        bias = None if self.bias is None else self.bias.copy()
        of = OfOutput(invstd, weight, bias, chosen, constant)
        self._save(y, None, of, by=InPlaceLayer._gradients_of_output)

    def _gradients_of_output(
        self, dy: Array, out: Array | None, y: Array, of: OfOutput
    ) -> Gradients:
        """From the output alone: around bias and 1 / abs(weight) z is what x is around its own."""
        weight = np.ones(self.num_features) if of.weight is None else of.weight.astype(np.float64)
        bias = np.zeros(self.num_features) if of.bias is None else of.bias.astype(np.float64)
        size = np.abs(weight)
        with np.errstate(all="ignore"):
            scale = weight * size * of.invstd
        dx, dweight, dbias = _primitives.gradient_of_output(
            dy, y, self.axis, bias, 1.0 / size, scale, of.constant, out, of.activation
        )
        return dx, None if of.weight is None else dweight * np.sign(weight), dbias
