"""Masks of layers: which positions of a batch count."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfast import _primitives, _validation
from bnfast._typing import Array
from bnfast.layers._tracking import TrackingLayer
from bnfast.running_averages import LearnableMomentum


def checked_once(
    layer: TrackingLayer, x: Array, mask: Any, lengths: Any, padding: str
) -> tuple[_primitives.Masked, NDArray[np.bool_] | None]:
    """Return these arguments, as calls of the core and of the backward pass need not check again.

    And which positions count: all axes of x but that of the channels; None for all.
    """
    counted = _validation.counted(mask, lengths, padding, x, layer.axis % x.ndim)
    if counted is None:
        return None, None
    if layer._observer is not None:
        raise ValueError(
            "mask and lengths must be None while a layer is recalibrated or monitored, got one"
        )
    if type(layer.momentum) is LearnableMomentum:
        raise ValueError("mask and lengths must be None with a LearnableMomentum, got one")
    if mask is None:
        return (None, _validation.CheckedLengths(counted), padding), counted
    return (counted, None, padding), counted
