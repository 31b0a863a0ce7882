"""Stateless operations, one file per kind."""

from bnfast.functional.batch import (
    batch_norm,
    batch_norm_backward,
    batch_norm_forward,
    moments,
)

__all__ = ["batch_norm", "batch_norm_backward", "batch_norm_forward", "moments"]
