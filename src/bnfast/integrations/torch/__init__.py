"""PyTorch on the CPU: its normalizations, computed by bnfast.

`accelerate` a model for training; `recomputing` keeps checkpointed training from counting batches
twice; `batch_norm` is for models that are compiled or exported;
`SyncBatchNorm` has the statistics of several processes.
"""

from __future__ import annotations

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        'bnfast.integrations.torch needs PyTorch 2.13 or newer: python -m pip install "torch>=2.13"'
    ) from error

from bnfast.integrations._report import Entry, Report
from bnfast.integrations.torch.functions import recomputing
from bnfast.integrations.torch.modules import accelerate, restore
from bnfast.integrations.torch.operations import batch_norm
from bnfast.integrations.torch.sync import SyncBatchNorm

__all__ = ["Entry", "Report", "SyncBatchNorm", "accelerate", "batch_norm", "recomputing", "restore"]
