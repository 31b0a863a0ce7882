"""Normalizations as functions of PyTorch's tensors of the CPU, with bnfast's gradients.

The tensors' memory is used as it is, in any strides; outputs and gradients are laid out like x.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import Function

import bnfast

Array = NDArray[Any]
Gradients = tuple[Tensor | None, ...]


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

    def along(self, dx: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
        """Return the derivative of y along a direction of x."""
        given = *self._between, *self._saved, memory(weight)
        return torch.from_numpy(self._function("jvp")(memory(dx), memory(x), *given))

    def normalized(self, x: Tensor) -> Tensor:
        """Return y as it is without weight and bias."""
        parameters = (None, None) if self._has_bias else (None,)
        y, *_ = self._function("forward")(memory(x), *self._before, *parameters, self._eps)
        return torch.from_numpy(y)

    def composed(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return y of PyTorch's elementary operations, whose derivatives of any order are right."""
        groups = x.reshape(*x.shape[:1], *self._before, -1) if self._is_grouped else x
        dims = self._dims(x)
        deviation = groups - groups.mean(dims, keepdim=True) if self._has_bias else groups
        eps = torch.finfo(x.dtype).eps if self._eps is None else self._eps
        invstd = (deviation.square().mean(dims, keepdim=True) + eps).rsqrt()
        xhat = (deviation * invstd).reshape(x.shape)
        return xhat * self.spread(weight, x) + self.spread(bias, x)

    def _dims(self, x: Tensor) -> list[int]:
        if self._between:
            return [-1 - d for d in range(len(self._between[0]))]
        if self._is_grouped:
            return [2]
        return [d for d in range(x.dim()) if d != 1 and (d > 0 or self._stem == "batch_norm")]

    def parameter_shape(self, x: Tensor) -> tuple[int, ...]:
        """Return the shape of weight and bias."""
        return self._between[0] if self._between else (x.size(1),)

    def spread(self, parameter: Tensor, x: Tensor) -> Tensor:
        """Return a parameter such that it broadcasts against x."""
        return parameter if self._between else parameter.reshape(-1, *[1] * (x.dim() - 2))


def memory(tensor: Tensor | None) -> Any:
    """Return the memory of a tensor as an array, or None."""
    return None if tensor is None else tensor.detach().numpy()


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
        given = dy, x, weight, ctx.call, ctx.needs_input_grad
        if torch.is_grad_enabled():
            return *_Differentiate.apply(*given), None
        return *_gradients(*given), None

    @staticmethod
    def jvp(
        ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, _: None
    ) -> Tensor:
        x, weight = ctx.saved_tensors
        dy = torch.zeros_like(x) if dx is None else ctx.call.along(dx, x, weight)
        if dweight is not None:
            dy += ctx.call.normalized(x) * ctx.call.spread(dweight, x)
        if dbias is not None:
            dy += ctx.call.spread(dbias, x)
        return dy


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
        if torch.is_grad_enabled():
            found = _differentiable(ctx.call, upstream, dy, x, weight)
        else:
            of_gradients = tuple(map(memory, upstream))
            given = memory(dy), memory(x), memory(weight)
            found = tuple(map(torch.from_numpy, ctx.call.double_backward(of_gradients, *given)))
        ddy, by_x, by_weight = found
        return ddy, by_x, by_weight if ctx.needs_input_grad[2] else None, None, None


def _differentiable(
    call: Normalization,
    upstream: tuple[Tensor | None, ...],
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
) -> Gradients:
    """Do what `double_backward` does in operations that can be differentiated ever again."""
    with torch.enable_grad():
        bias = x.new_zeros(call.parameter_shape(x))
        scale = torch.ones_like(bias) if weight is None else weight
        dy, x, scale, bias = map(_tracked, (dy, x, scale, bias))
        y = call.composed(x, scale, bias)
        gradients = torch.autograd.grad(y, (x, scale, bias), dy, create_graph=True)
        given = [(g, u) for g, u in zip(gradients, upstream, strict=True) if u is not None]
        found: Gradients = torch.autograd.grad(
            [g for g, _ in given],
            (dy, x, scale),
            [u for _, u in given],
            create_graph=True,
            allow_unused=True,
        )
        return found


def _tracked(tensor: Tensor) -> Tensor:
    """Return an alias that has a gradient of its own, whatever else the tensor is made of."""
    if tensor.requires_grad:
        return tensor.view_as(tensor)
    return tensor.detach().requires_grad_()
