"""Batch normalization with the statistics of a batch that several processes have parts of.

`SyncBatchNorm` is the layer, `sync_batch_norm_forward` and `sync_batch_norm_backward` are the
functions. A rank is one of these processes; ranks reach each other through a `Communicator`:
`MPICommunicator` (mpi4py), `TorchCommunicator` (torch.distributed with gloo), or one of your own.

Import it by name, ``import bnfast.distributed``; that imports neither mpi4py nor PyTorch.
"""

from bnfast.distributed.batch import (
    Synchronized,
    sync_batch_norm_backward,
    sync_batch_norm_forward,
)
from bnfast.distributed.communicators import Communicator, MPICommunicator, TorchCommunicator
from bnfast.distributed.layer import SyncBatchNorm

__all__ = [
    "Communicator",
    "MPICommunicator",
    "SyncBatchNorm",
    "Synchronized",
    "TorchCommunicator",
    "sync_batch_norm_backward",
    "sync_batch_norm_forward",
]
