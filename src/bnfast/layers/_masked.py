"""Masks of layers: which positions of a batch count."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfast import _validation
from bnfast._typing import Array
from bnfast.layers._tracking import TrackingLayer
from bnfast.running_averages import LearnableMomentum

Masked = tuple[Any, Any, Any]  # mask, lengths, padding


def counted_by(layer: TrackingLayer, x: Array, masked: Masked) -> NDArray[np.bool_] | None:
    """Return which positions count: all axes of x but that of the channels; None for all."""
    counted = _validation.counted(*masked, x, layer.axis % x.ndim)
    if counted is not None and layer._observer is not None:
        raise ValueError(
            "mask and lengths must be None while a layer is recalibrated or monitored, got one"
        )
    if counted is not None and type(layer.momentum) is LearnableMomentum:
        raise ValueError("mask and lengths must be None with a LearnableMomentum, got one")
    return counted
