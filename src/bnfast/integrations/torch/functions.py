"""Normalizations as functions of PyTorch's tensors of the CPU, with bnfast's gradients.

The tensors' memory is used as it is, in any strides; outputs and gradients are laid out like x.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import Function, forward_ad

import bnfast

Array = NDArray[Any]
Gradients = tuple[Tensor | None, ...]
DTYPES = (torch.float32, torch.float64)


class Normalization:
    """A call of one of bnfast's normalizations: its arguments besides tensors, and what it saved.

    The forward pass, ``<stem>_forward``, takes `before` after x; the others take `between` there.
    `tracking` are keywords of the forward pass.
    """

    def __init__(
        self,
        stem: str,
        eps: float | None,
        before: tuple[Any, ...] = (),
        between: tuple[Any, ...] = (),
        **tracking: Any,
    ) -> None:
        self._stem, self._eps, self._before, self._between = stem, eps, before, between
        self._tracking = tracking
        self._has_bias = stem != "rms_norm"
        self._is_grouped = stem == "group_norm"
        self._saved: list[Array] = []

    def _function(self, form: str) -> Any:
        return getattr(bnfast, f"{self._stem}_{form}")

    def forward(self, x: Array, weight: Array | None, bias: Array | None, out: Array) -> None:
        """Write y, update running statistics, and keep what the gradients need."""
        parameters = (weight, bias) if self._has_bias else (weight,)
        _, *self._saved = self._function("forward")(
            x, *self._before, *parameters, self._eps, out=out, **self._tracking
        )

    def backward(
        self, dy: Array, x: Array, weight: Array | None, out: Array
    ) -> tuple[Array, Array | None]:
        """Write dx; return dweight and dbias."""
        _, dweight, *dbias = self._function("backward")(
            dy, x, *self._between, *self._saved, weight, out=out
        )
        return dweight, dbias[0] if dbias else None

    def double_backward(
        self,
        upstream: tuple[Array | None, Array | None, Array | None],
        dy: Array,
        x: Array,
        weight: Array | None,
    ) -> tuple[Array, Array, Array]:
        """Return the gradients by dy, x and weight, of those by dx, dweight and dbias."""
        given = upstream if self._has_bias else upstream[:2]
        found: tuple[Array, Array, Array] = self._function("double_backward")(
            *given, dy, x, *self._between, *self._saved, weight
        )
        return found

    def anew(self) -> Normalization:
        """Return the same call, which updates no running statistics."""
        return Normalization(self._stem, self._eps, self._before, self._between)

    def elementary_gradients(self, dy: Tensor, x: Tensor, weight: Tensor | None) -> Gradients:
        """Return dx, dweight and dbias of PyTorch's elementary operations.

        These can be differentiated, batched and traced any number of times.
        """
        dims = self._dims(x)

        def groups(tensor: Tensor) -> Tensor:
            return tensor.reshape(x.size(0), *self._before, -1) if self._is_grouped else tensor

        def mean(tensor: Tensor) -> Tensor:
            return tensor.mean(dims, keepdim=True)

        eps = torch.finfo(x.dtype).eps if self._eps is None else self._eps
        deviation = groups(x)
        deviation = deviation - mean(deviation) if self._has_bias else deviation
        invstd = (mean(deviation.square()) + eps).rsqrt()
        xhat = deviation * invstd
        g = groups(dy if weight is None else dy * self.spread(weight, x))
        g = g - mean(g) if self._has_bias else g
        dx = invstd * (g - xhat * mean(g * xhat))
        return (
            dx.reshape(x.shape),
            self._parameter_sums(dy * xhat.reshape(x.shape)),
            self._parameter_sums(dy) if self._has_bias else None,
        )

    def _dims(self, x: Tensor) -> list[int]:
        if self._between:
            return [-1 - d for d in range(len(self._between[0]))]
        if self._is_grouped:
            return [2]
        return [d for d in range(x.dim()) if d != 1 and (d > 0 or self._stem == "batch_norm")]

    def _parameter_sums(self, tensor: Tensor) -> Tensor:
        if self._between:
            return tensor.reshape(-1, *self._between[0]).sum(0)
        return tensor.sum([d for d in range(tensor.dim()) if d != 1])

    def spread(self, parameter: Tensor, x: Tensor) -> Tensor:
        """Return a parameter such that it broadcasts against x."""
        return parameter if self._between else parameter.reshape(-1, *[1] * (x.dim() - 2))


def memory(tensor: Tensor | None) -> Any:
    """Return the memory of a tensor as an array, or None.

    Only a tensor that is not what its memory holds, such as a view with PyTorch's negative bit, is
    copied.
    """
    if tensor is None:
        return None
    if tensor.dtype is torch.bfloat16:  # which NumPy has not
        raise TypeError(f"expected float32 or float64, got bfloat16 of shape {tuple(tensor.shape)}")
    return tensor.numpy(force=True)


_recomputes: ContextVar[bool] = ContextVar("bnfast_recomputes", default=False)


@contextmanager
def recomputing() -> Iterator[None]:
    """Let batches go through modules again, whose running statistics do not see them twice.

    For the second forward pass of checkpointed training, as ``context_fn`` of PyTorch's
    ``checkpoint``. It concerns the modules of this library, in the calling thread.

    Examples
    --------
    ::

        from contextlib import nullcontext
        from torch.utils.checkpoint import checkpoint
        from bnfast.integrations.torch import accelerate, recomputing

        accelerate(segment)
        y = checkpoint(
            segment, x, use_reentrant=False, context_fn=lambda: (nullcontext(), recomputing())
        )
    """
    token = _recomputes.set(True)
    try:
        yield
    finally:
        _recomputes.reset(token)


def is_recomputed(module: Any) -> bool:
    """Whether a module has seen this batch before, in training."""
    if torch.compiler.is_compiling():  # which cannot ask, and leaves these modules to PyTorch
        return False
    return bool(module.training and _recomputes.get())


def tracking_of(module: Any) -> tuple[tuple[Tensor | None, Tensor | None], float]:
    """Return what a batch updates, running_mean and running_var of a module, and its weight."""
    if not (module.training and module.track_running_stats) or is_recomputed(module):
        return (None, None), 0.0
    momentum, counter = module.momentum, module.num_batches_tracked
    if momentum is None:  # the plain average of all batches
        momentum = 0.0 if counter is None else 1.0 / (float(counter) + 1.0)
    return (module.running_mean, module.running_var), momentum


def end_tracking(module: Any, running: tuple[Tensor | None, Tensor | None]) -> None:
    """Count a batch, and tell autograd of the statistics that NumPy has changed."""
    for statistic in running:
        if statistic is not None:
            torch.autograd.graph.increment_version(statistic)
    if running[0] is not None and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)


def is_observed() -> bool:
    """Whether PyTorch compiles, transforms or records operations, so that it has to see them."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch.jit.is_tracing()
    )


def _is_elementary(*tensors: Tensor | None) -> bool:
    """Whether gradients have to be PyTorch's operations, which see what is not in the memory."""
    is_batched = torch._C._functorch.is_legacy_batchedtensor  # as by ``is_grads_batched``
    return is_observed() or any(t is not None and is_batched(t) for t in tensors)


def _has_tangents() -> bool:
    """Whether tensors may have the tangents of PyTorch's forward mode."""
    return bool(forward_ad._current_level >= 0)


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, call: Normalization) -> Tensor:
    """Return what a call of a normalization makes of x; autograd can differentiate it twice."""
    y: Tensor = _Normalize.apply(x, weight, bias, call)
    return y


class _Normalize(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, call: Normalization
    ) -> Tensor:
        y = torch.empty_like(x)
        call.forward(memory(x), memory(weight), memory(bias), y.numpy())
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if _is_elementary(dy) or _has_tangents():
            dx, dweight, dbias = ctx.call.elementary_gradients(dy, x, weight)
            return dx, dweight if needed[1] else None, dbias if needed[2] else None, None
        given = dy, x, weight, ctx.call, needed
        if torch.is_grad_enabled():
            return *_Differentiate.apply(*given), None
        return *_gradients(*given), None

    @staticmethod
    def jvp(
        ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, _: None
    ) -> Tensor:
        x, weight = ctx.saved_tensors
        call, dy = ctx.call, torch.zeros_like(x)
        if dx is not None:  # the Jacobian of xhat is symmetric: the backward pass multiplies by it
            along: Tensor | None
            if _is_elementary(dx):
                along, *_ = call.elementary_gradients(dx, x, None)
            else:
                along, *_ = _Differentiate.apply(dx, x, None, call, (True, False, False))
            dy = dy + (along if weight is None else along * call.spread(weight, x))
        if dweight is not None:
            dy = dy + normalize(x, None, None, call.anew()) * call.spread(dweight, x)
        return dy if dbias is None else dy + call.spread(dbias, x)


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    call: Normalization,
    needed: tuple[bool, ...],
) -> Gradients:
    dx = torch.empty_like(x)
    dweight, dbias = call.backward(memory(dy), memory(x), memory(weight), dx.numpy())
    return (
        dx,
        torch.from_numpy(dweight) if needed[1] else None,
        torch.from_numpy(dbias) if needed[2] else None,
    )


class _Differentiate(Function):
    """The gradients, which can be differentiated in their turn."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        call: Normalization,
        needed: tuple[bool, ...],
    ) -> Gradients:
        ctx.save_for_backward(dy, x, weight)
        ctx.set_materialize_grads(False)
        ctx.call = call
        return _gradients(dy, x, weight, call, needed)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Gradients:
        dy, x, weight = ctx.saved_tensors
        if torch.is_grad_enabled() or _is_elementary(*upstream) or _has_tangents():
            needed = ctx.needs_input_grad[:3]
            return *_differentiable(ctx.call, upstream, (dy, x, weight), needed), None, None
        of_gradients = tuple(map(memory, upstream))
        given = memory(dy), memory(x), memory(weight)
        found = ctx.call.double_backward(of_gradients, *given)
        ddy, by_x, by_weight = map(torch.from_numpy, found)
        return ddy, by_x, by_weight if ctx.needs_input_grad[2] else None, None, None


def _differentiable(
    call: Normalization,
    upstream: tuple[Tensor | None, ...],
    inputs: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
) -> Gradients:
    """Do what `double_backward` does in operations that can be differentiated ever again."""
    create_graph = torch.is_grad_enabled()
    wanted = [n for n, is_needed in enumerate(needed) if is_needed]
    own: list[Any] = list(inputs)
    with torch.enable_grad():
        for n in wanted:
            own[n] = own[n].view_as(own[n])  # an alias has a gradient of its own
        gradients = call.elementary_gradients(*own)
        given = [
            (g, u)
            for g, u in zip(gradients, upstream, strict=True)
            if g is not None and g.requires_grad and u is not None
        ]
        if not given:
            return None, None, None
        found = torch.autograd.grad(
            [g for g, _ in given],
            [own[n] for n in wanted],
            [u for _, u in given],
            create_graph=create_graph,
            allow_unused=True,
        )
    of_inputs = dict(zip(wanted, found, strict=True))
    return tuple(map(of_inputs.get, range(len(inputs))))
