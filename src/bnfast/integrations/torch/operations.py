"""Custom operations of PyTorch, ``torch.ops.bnfast``, for models that are exported or compiled.

They are functional, as `torch.library` wants of what has derivatives: new running statistics are
outputs, which `batch_norm` copies into the old ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import bnfast
from bnfast.integrations.torch.functions import DTYPES, memory

Gradients = tuple[Tensor | None, ...]


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Do what ``torch.nn.functional.batch_norm`` does, in training by ``torch.ops.bnfast``.

    Parameters
    ----------
    x, running_mean, running_var, weight, bias, training, momentum, eps
        As there; tensors of the CPU, of float32 or float64.

    Returns
    -------
    Tensor
        Laid out like `x`. It can be exported, compiled with ``fullgraph=True``, and differentiated
        twice.

    Raises
    ------
    TypeError, ValueError
        As `bnfast.batch_norm` raises them.
    """
    if not training:
        return torch.nn.functional.batch_norm(
            x, running_mean, running_var, weight, bias, False, momentum, eps
        )
    y, _, _, *running = torch.ops.bnfast.batch_norm(
        x, weight, bias, running_mean, running_var, momentum, eps
    )
    for old, new in zip((running_mean, running_var), running, strict=True):
        if old is not None:
            old.copy_(new)
    found: Tensor = y
    return found


@torch.library.custom_op("bnfast::batch_norm", mutates_args=(), device_types="cpu")
def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, mean, invstd, and the new running statistics, which are empty without old ones."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32 or float64, got {x.dtype}")
    y = torch.empty_like(x)
    running = _new_running(x, running_mean, running_var)
    updated: list[Any] = [None, None]
    for n, old in enumerate((running_mean, running_var)):
        if old is not None:
            updated[n] = running[n].copy_(old).numpy()
    _, mean, invstd = bnfast.batch_norm_forward(
        memory(x),
        memory(weight),
        memory(bias),
        eps,
        running_mean=updated[0],
        running_var=updated[1],
        momentum=momentum,
        out=y.numpy(),
    )
    return y, torch.from_numpy(mean), torch.from_numpy(invstd), *running


def _new_running(x: Tensor, mean: Tensor | None, var: Tensor | None) -> tuple[Tensor, Tensor]:
    new_mean, new_var = (x.new_empty(0) if s is None else torch.empty_like(s) for s in (mean, var))
    return new_mean, new_var


@torch.library.custom_op("bnfast::batch_norm_backward", mutates_args=(), device_types="cpu")
def _backward(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dweight and dbias."""
    dx = torch.empty_like(x)
    given = map(memory, (dy, x, mean, invstd, weight))
    _, dweight, dbias = bnfast.batch_norm_backward(*given, out=dx.numpy())
    return dx, torch.from_numpy(dweight), torch.from_numpy(dbias)


@torch.library.custom_op("bnfast::batch_norm_double_backward", mutates_args=(), device_types="cpu")
def _double_backward(
    ddx: Tensor | None,
    ddweight: Tensor | None,
    ddbias: Tensor | None,
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by dy, x and weight, of those by dx, dweight and dbias."""
    given = map(memory, (ddx, ddweight, ddbias, dy, x, mean, invstd, weight))
    ddy, by_x, by_weight = map(torch.from_numpy, bnfast.batch_norm_double_backward(*given))
    return ddy, by_x, by_weight


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, ...]:
    mean, invstd = (x.new_empty(x.shape[1], dtype=torch.float64) for _ in range(2))
    return torch.empty_like(x), mean, invstd, *_new_running(x, running_mean, running_var)


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, ...]:
    kind = x if weight is None else weight
    return torch.empty_like(x), kind.new_empty(x.shape[1]), kind.new_empty(x.shape[1])


@_double_backward.register_fake
def _(
    ddx: Tensor | None,
    ddweight: Tensor | None,
    ddbias: Tensor | None,
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
) -> tuple[Tensor, ...]:
    kind = x if weight is None else weight
    return torch.empty_like(x), torch.empty_like(x), kind.new_empty(x.shape[1])


def _keep_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, *_ = inputs
    _, mean, invstd, *_ = output
    ctx.save_for_backward(x, mean, invstd, weight)
    ctx.mark_non_differentiable(*output[1:])


def _differentiate_forward(ctx: Any, dy: Tensor, *_: Any) -> Gradients:
    dx, dweight, dbias = torch.ops.bnfast.batch_norm_backward(dy, *ctx.saved_tensors)
    needs = ctx.needs_input_grad
    return dx, dweight if needs[1] else None, dbias if needs[2] else None, None, None, None, None


def _keep_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _differentiate_backward(ctx: Any, *upstream: Tensor | None) -> Gradients:
    found = torch.ops.bnfast.batch_norm_double_backward(*upstream, *ctx.saved_tensors)
    ddy, by_x, by_weight = found
    return ddy, by_x, None, None, by_weight if ctx.needs_input_grad[4] else None


_forward.register_autograd(_differentiate_forward, setup_context=_keep_forward)
_backward.register_autograd(_differentiate_backward, setup_context=_keep_backward)
