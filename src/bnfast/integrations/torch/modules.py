"""PyTorch's modules, whose calls on the CPU bnfast computes, and how models get them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnfast._scalars import describe
from bnfast.integrations._report import Entry, Report
from bnfast.integrations.torch.functions import (
    DTYPES,
    Normalization,
    end_tracking,
    is_observed,
    is_recomputed,
    memory,
    normalize,
    tracking_of,
)
from bnfast.integrations.torch.sync import SyncBatchNorm

_PLAIN = (nn.Parameter, Tensor)


def _is_computed(x: Tensor, shape: tuple[int, ...], *others: Tensor | None) -> bool:
    """Whether bnfast has a kernel for this call: eager, of plain tensors of one type in memory.

    `others`, the parameters and running statistics, have this shape. What torch.compile fuses, and
    what is traced or transformed, is left to PyTorch; so is what it refuses.
    """
    return (
        type(x) is Tensor
        and not is_observed()
        and not torch.is_autocast_enabled("cpu")
        and x.is_cpu
        and x.dtype in DTYPES
        and x.layout is torch.strided
        and x.dim() >= 2
        and not (x.is_inference() and torch.is_grad_enabled())
        and all(
            type(t) in _PLAIN and t.is_cpu and t.dtype is x.dtype and t.shape == shape
            for t in others
            if t is not None
        )
    )


def _recomputed(module: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    """Return PyTorch's output with statistics of the batch that nothing keeps.

    Running ones it must have, all the same: PyTorch compares how many tensors are saved.
    """
    module._check_input_dim(x)
    running = (
        statistic.clone() if module.track_running_stats and statistic is not None else None
        for statistic in (module.running_mean, module.running_var)
    )
    return nn.functional.batch_norm(
        *(x, *running, module.weight, module.bias), training=True, momentum=0.0, eps=module.eps
    )


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        """Normalize with the statistics of the batch; without them, as the parent class does."""
        if not self.training and self.running_mean is not None:
            return super().forward(x)
        weight, bias = self.weight, self.bias
        running, momentum = tracking_of(self)
        is_computed = _is_computed(x, x.shape[1:2], weight, bias, *running)
        if not is_computed or x.numel() <= x.size(1):  # a single value of a channel, or none
            if is_recomputed(self):
                return _recomputed(self, x)
            return super().forward(x)
        self._check_input_dim(x)
        call = Normalization(
            "batch_norm",
            self.eps,
            running_mean=memory(running[0]),
            running_var=memory(running[1]),
            momentum=momentum,
        )
        y = normalize(x, weight, bias, call)
        end_tracking(self, running)
        return y


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d``, trained by bnfast."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d``, trained by bnfast."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d``, trained by bnfast."""


class _InstanceNorm(nn.modules.instancenorm._InstanceNorm):
    def forward(self, x: Tensor) -> Tensor:
        """Normalize with the statistics of each sample; with running ones, as the parent does."""
        weight, bias = self.weight, self.bias
        if (
            self.track_running_stats
            or not _is_computed(x, (self.num_features,), weight, bias)
            or x.dim() != self._get_no_batch_dim() + 1
            or x.size(1) != self.num_features
            or x.numel() <= x.size(0) * x.size(1)
        ):
            return super().forward(x)
        return normalize(x, weight, bias, Normalization("instance_norm", self.eps))


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """``torch.nn.InstanceNorm1d``, computed by bnfast."""


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """``torch.nn.InstanceNorm2d``, computed by bnfast."""


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """``torch.nn.InstanceNorm3d``, computed by bnfast."""


class GroupNorm(nn.GroupNorm):
    """``torch.nn.GroupNorm``, computed by bnfast."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the groups of channels of every sample."""
        weight, bias = self.weight, self.bias
        if (
            not _is_computed(x, x.shape[1:2], weight, bias)
            or x.size(1) % self.num_groups
            or x.numel() <= x.size(0) * self.num_groups
        ):
            return super().forward(x)
        call = Normalization("group_norm", self.eps, (self.num_groups,))
        return normalize(x, weight, bias, call)


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm``, computed by bnfast."""

    def forward(self, x: Tensor) -> Tensor:
        """Divide every row by its root mean square."""
        weight, shape = self.weight, self.normalized_shape
        if not _is_computed(x, shape, weight) or x.shape[-len(shape) :] != shape or not x.numel():
            return super().forward(x)
        return normalize(x, weight, None, Normalization("rms_norm", self.eps, (shape,), (shape,)))


_SWAPPED: dict[type[nn.Module], type[nn.Module]] = {
    theirs: ours
    for ours in (
        *(BatchNorm1d, BatchNorm2d, BatchNorm3d),
        *(InstanceNorm1d, InstanceNorm2d, InstanceNorm3d),
        *(GroupNorm, RMSNorm),
    )
    for theirs in ours.__bases__[-1:]
}
_COMPUTED = {*_SWAPPED.values(), SyncBatchNorm}
_NORMALIZATIONS = (
    *(nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm),
    *(nn.LocalResponseNorm, nn.CrossMapLRN2d),
)


def accelerate(model: nn.Module) -> Report:
    """Let bnfast train the normalizations of a model on the CPU, from now on.

    Each module stays the object that it is, but for its class: parameters, buffers, hooks,
    ``state_dict`` and ``isinstance`` are unchanged. `restore` takes it back.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place.

    Returns
    -------
    Report
        The normalizations that were swapped, and those that were not, each with the reason.

    Raises
    ------
    TypeError
        Where `model` is no module.

    Notes
    -----
    Tensors are used as they are, in the contiguous and the channels_last format. Running
    statistics, counters and errors are PyTorch's. Gradients can be differentiated any number of
    times, in both modes, and in batches (``is_grads_batched``); those of PyTorch's own modules are
    wrong from the third time on.

    PyTorch goes on to compute what it is as fast at, or what bnfast has no kernel for: layer norm,
    batch norm in evaluation, instance norm with running statistics, half precision and autocast,
    other devices, and what is compiled, traced or transformed by torch.func. `restore` a model
    before tools that know PyTorch's classes alone: torch.fx.symbolic_trace, torch.jit.script and
    torch.ao.quantization.

    Examples
    --------
    >>> import torch
    >>> from bnfast.integrations.torch import accelerate
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    >>> print(accelerate(model))
    bnfast computes 1 of 1 normalization layers
      1 BatchNorm2d
    """
    _refuse_other_models(model)
    swapped, left = [], []
    for path, module in model.named_modules():
        if not isinstance(module, _NORMALIZATIONS):
            continue
        kind = type(module)
        entry = Entry(path, kind.__name__, _reason_to_leave(module))
        if entry.reason:
            left.append(entry)
        else:
            module.__class__ = _SWAPPED.get(kind, kind)
            swapped.append(entry)
    return Report("PyTorch", tuple(swapped), tuple(left))


def _reason_to_leave(module: nn.Module) -> str:
    kind = type(module)
    if kind not in _SWAPPED and kind not in _COMPUTED:
        if isinstance(module, nn.modules.lazy.LazyModuleMixin):
            return "its sizes are not known before its first call: accelerate after that"
        if isinstance(module, nn.LayerNorm):
            return "PyTorch is faster"
        return "bnfast has no kernel for this class"
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
        return "it has running statistics"
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"its dtype is {str(tensor.dtype).removeprefix('torch.')}"
        if not tensor.is_cpu:
            return f"it is on the device {tensor.device}"
    return ""


def restore(model: nn.Module) -> None:
    """Give a model PyTorch's own normalizations back.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place.

    Raises
    ------
    TypeError
        Where `model` is no module.
    """
    _refuse_other_models(model)
    theirs = {ours: theirs for theirs, ours in _SWAPPED.items()}
    for module in model.modules():
        module.__class__ = theirs.get(type(module), type(module))


def _refuse_other_models(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {describe(model)}")
