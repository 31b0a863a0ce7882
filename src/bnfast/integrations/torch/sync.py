"""Synchronized batch normalization as a module of PyTorch, on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from bnfast._scalars import describe
from bnfast.distributed import (
    Communicator,
    TorchCommunicator,
    sync_batch_norm_backward,
    sync_batch_norm_forward,
)
from bnfast.distributed.exchange import failures_told
from bnfast.integrations.torch.functions import DTYPES, Gradients, end_tracking, memory, tracking_of


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """``torch.nn.SyncBatchNorm`` for the CPU, where PyTorch has none: over gloo.

    In training, the statistics and gradients are those of the batch that all processes have parts
    of; every process has the same bits. In evaluation it is ``torch.nn.BatchNorm1d`` to ``3d``.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats
        As of ``torch.nn.SyncBatchNorm``.
    process_group : torch.distributed.ProcessGroup or bnfast.distributed.Communicator, optional
        The processes: the default group where None. A group of its own keeps its messages apart
        from those of DistributedDataParallel.

    Raises
    ------
    RuntimeError
        Where torch.distributed has not been initialized.
    ConnectionError
        In a call, where another process ended or was late.
    TypeError, ValueError
        In a call, on all processes, where one of them has an input that is refused.

    Notes
    -----
    The input has float32 or float64, two dimensions or more, and channels along axis 1. As with
    PyTorch's, gradients of parameters are those of a process's own part, for
    DistributedDataParallel to join. Gradients cannot be differentiated once more. torch.compile
    leaves the module as it is, in a graph of its own.

    Examples
    --------
    In a program for ``torchrun --nproc-per-node 2 program.py``::

        torch.distributed.init_process_group("gloo")
        model = SyncBatchNorm.convert_sync_batchnorm(model)
        model = torch.nn.parallel.DistributedDataParallel(model)
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        **factory: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **factory)
        if not isinstance(process_group, Communicator):
            process_group = TorchCommunicator(process_group)
        self.communicator = process_group

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected input with at least 2 dimensions, got {x.dim()}")

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """Normalize with the statistics of all processes; in evaluation, with the running ones."""
        if not self.training and self.running_mean is not None:
            return super().forward(x)
        running, momentum = tracking_of(self)
        y: Tensor = _Synchronize.apply(
            x, self.weight, self.bias, running, momentum, self.eps, self.communicator
        )
        end_tracking(self, running)
        return y

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Synchronize every batch norm of a model.

        Each module stays the object that it is, but for its class: parameters, buffers, hooks and
        ``state_dict`` are unchanged.

        Parameters
        ----------
        module : torch.nn.Module
            Changed in place.
        process_group : torch.distributed.ProcessGroup or bnfast.distributed.Communicator, optional
            As of the class; all of the model have the same communicator.

        Returns
        -------
        torch.nn.Module
            `module` itself.

        Raises
        ------
        TypeError
            Where `module` is no module.
        ValueError
            Where a batch norm is lazy and has not been called.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {describe(module)}")
        found = [
            (path, each)
            for path, each in module.named_modules()
            if isinstance(each, nn.modules.batchnorm._BatchNorm) and not isinstance(each, cls)
        ]
        for path, each in found:
            if isinstance(each, nn.modules.lazy.LazyModuleMixin):
                raise ValueError(
                    f"module must have batch norms of known sizes, got {type(each).__name__} at "
                    f"{path!r}: convert after the first call"
                )
        if not isinstance(process_group, Communicator):
            process_group = TorchCommunicator(process_group)
        for _, each in found:
            each.__class__ = cls
            each.communicator = process_group
        return module


class _Synchronize(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: tuple[Tensor | None, Tensor | None],
        momentum: float,
        eps: float,
        communicator: Communicator,
    ) -> Tensor:
        with failures_told(communicator):
            if not x.is_cpu or x.dtype not in DTYPES or x.dim() < 2:
                raise TypeError(
                    "expected a float32 or float64 input of the CPU with at least 2 dimensions, "
                    f"got {str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)} on the "
                    f"device {x.device}"
                )
        running_mean, running_var = map(memory, running)
        y = torch.empty_like(x)
        _, ctx.saved = sync_batch_norm_forward(
            memory(x),
            communicator,
            memory(weight),
            memory(bias),
            eps,
            running_mean=running_mean,
            running_var=running_var,
            momentum=momentum,
            out=y.numpy(),
        )
        ctx.save_for_backward(x, weight)
        ctx.communicator = communicator
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x, weight = ctx.saved_tensors
        dx = torch.empty_like(x)
        _, dweight, dbias = sync_batch_norm_backward(
            memory(dy), memory(x), ctx.saved, ctx.communicator, memory(weight), out=dx.numpy()
        )
        needs = ctx.needs_input_grad
        return (
            dx,
            torch.from_numpy(dweight) if needs[1] else None,
            torch.from_numpy(dbias) if needs[2] else None,
            *(None, None, None, None),
        )
