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
from bnfast.integrations.torch.functions import Gradients, memory


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
    DistributedDataParallel to join. Gradients cannot be differentiated once more.

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

    def forward(self, x: Tensor) -> Tensor:
        """Normalize with the statistics of all processes; in evaluation, with the running ones."""
        if not self.training and self.running_mean is not None:
            return super().forward(x)
        self._check_input_dim(x)
        running: tuple[Tensor | None, Tensor | None] = None, None
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            running = self.running_mean, self.running_var
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        y: Tensor = _Synchronize.apply(
            x, self.weight, self.bias, running, momentum, self.eps, self.communicator
        )
        for statistic in running:
            if statistic is not None:
                torch.autograd.graph.increment_version(statistic)
        return y

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Return a model in whose place of every batch norm is a synchronized one.

        Parameters
        ----------
        module : torch.nn.Module
            The modules in it are replaced; a batch norm itself is returned as a new one.
        process_group : torch.distributed.ProcessGroup or bnfast.distributed.Communicator, optional
            As of the class; all of the model have the same communicator.

        Returns
        -------
        torch.nn.Module
            With the same parameters and buffers, as the same objects.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {describe(module)}")
        if not isinstance(process_group, Communicator):
            process_group = TorchCommunicator(process_group)
        converted = module
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, cls):
            converted = cls(
                module.num_features,
                module.eps,
                module.momentum,
                module.affine,
                module.track_running_stats,
                process_group,
            )
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                setattr(converted, name, tensor)
            converted.training = module.training
        for name, child in module.named_children():
            setattr(converted, name, cls.convert_sync_batchnorm(child, process_group))
        return converted


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
