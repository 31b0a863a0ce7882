"""Normalizations for autograd (github.com/HIPS/autograd), differentiable any number of times."""

from __future__ import annotations

try:
    import autograd  # noqa: F401
except ImportError as error:
    raise ImportError(
        "bnfast.integrations.autograd needs autograd: python -m pip install autograd"
    ) from error

from bnfast.integrations.autograd.functions import (
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
)

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]
