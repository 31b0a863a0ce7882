"""One call of a normalization: which kernel computes which pass, and how parameters lie in x."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import autograd.numpy as anp
import numpy as np
from autograd.extend import defjvp, defvjp, primitive

import bnfast
from bnfast import _validation
from bnfast._typing import Array

# autograd's own has no forward mode.
_cast = primitive(lambda values, dtype: np.asarray(values, dtype))
defvjp(_cast, lambda ans, values, dtype: lambda g: _cast(g, values.dtype))
defjvp(_cast, lambda g, ans, values, dtype: _cast(g, dtype))


class Call(ABC):
    """One call of a normalization: its passes, with the statistics that `forward` found.

    All further passes, of derivatives of any order, are given the same x.
    """

    statistics: tuple[str, ...] = ("mean", "invstd")  # as the passes call them
    upstream: tuple[str, ...] = ("ddx", "ddweight", "ddbias")
    constant = False  # whether the statistics do not depend on x
    parameter_axes: tuple[int, ...]
    split: tuple[int, ...]  # the shape of x, with an axis of groups and one of their channels
    over: tuple[int, ...]  # the axes of that along which statistics are shared

    def __init__(
        self,
        stem: str,
        run: Callable[..., Any],
        tracking: dict[str, Any] | None = None,
        **geometry: Any,
    ) -> None:
        self._stem = stem
        self._run = run
        self._tracking = tracking or {}
        self._geometry = geometry

    @abstractmethod
    def arrange(self, x: Any) -> None:
        """Set axes and shapes, of arguments that the forward pass has taken."""

    def forward(self, x: Any, weight: Any, bias: Any) -> Array:
        """Return y, and keep the statistics."""
        y: Array
        y, *saved = self._run(x, weight, bias, **self._tracking)
        self.shape, self.dtype = y.shape, y.dtype
        self._saved = dict(zip(self.statistics, saved, strict=True))
        self.arrange(x)
        self.count = max(1, math.prod(self.split[d] for d in self.over))
        return y

    def backward(self, dy: Any, x: Any, weight: Any, parameters: int) -> tuple[Array, ...]:
        """Return the gradients of x and of the first `parameters` of weight and bias."""
        found: tuple[Array, ...] = self._pass("backward", dy=self._like_x(dy), x=x, weight=weight)
        return found[: 1 + parameters]

    def double_backward(self, upstream: Any, dy: Any, x: Any, weight: Any) -> tuple[Array, ...]:
        """Return the gradients of dy, x and weight; upstream are those of what backward gave."""
        given = dict.fromkeys(self.upstream) | dict(zip(self.upstream, upstream, strict=False))
        given["ddx"] = self._like_x(upstream[0])
        given |= {"dy": self._like_x(dy), "x": x, "weight": weight}
        found: tuple[Array, ...] = self._pass("double_backward", **given)
        return found

    def jacobian(self, u: Any, x: Any) -> Array:
        """Return J(u)."""
        found: Array = self._pass("jvp", dx=self._like_x(u), x=x)
        return found

    def xhat(self, x: Any) -> Array:
        """Return the normalized x."""
        found: Array = self._run(x)[0]
        return found

    def invstd(self, x: Any) -> Array:
        """Return invstd, such that it broadcasts against the split x."""
        shape = [1 if d in self.over else n for d, n in enumerate(self.split)]
        invstd: Array = self._saved[self.statistics[-1]]
        return invstd.astype(self.dtype).reshape(shape)

    def _pass(self, kind: str, **given: Any) -> Any:
        return getattr(bnfast, f"{self._stem}_{kind}")(**given, **self._saved, **self._geometry)

    def _like_x(self, values: Any) -> Array:
        return np.asarray(values, self.dtype)

    def mean(self, values: Any) -> Any:
        """Return the means, over a split array, of what shares statistics; they broadcast."""
        return anp.sum(values, axis=self.over, keepdims=True) / self.count

    def spread(self, parameter: Any) -> Any:
        """Return a parameter such that it broadcasts against x."""
        if parameter is None:
            return 1.0
        axes = self.parameter_axes
        sizes = [1] * (len(self.shape) - len(axes)) + [self.shape[d] for d in axes]
        moved = anp.moveaxis(anp.reshape(parameter, sizes), _last(len(axes)), axes)
        return _cast(moved, self.dtype)

    def gather(self, values: Any) -> Any:
        """Return the sums of what shares a parameter."""
        axes = self.parameter_axes
        moved = anp.moveaxis(values, axes, _last(len(axes)))
        return anp.sum(moved, axis=tuple(range(len(self.shape) - len(axes))))


def _last(axes: int) -> tuple[int, ...]:
    return tuple(range(-axes, 0))


class Batch(Call):
    """Batch norm in training: statistics of channels."""

    def arrange(self, x: Any) -> None:
        axis = self._geometry["axis"] % len(self.shape)
        self.parameter_axes = (axis,)
        self.split = self.shape
        self.over = tuple(d for d in range(len(self.split)) if d != axis)


class Evaluation(Batch):
    """Batch norm by running statistics."""

    constant = True

    def __init__(self, run: Callable[..., Any], axis: int) -> None:
        super().__init__("batch_norm", run, axis=axis, training=False)

    def xhat(self, x: Any) -> Array:
        mean, invstd = self._saved.values()
        with np.errstate(all="ignore"):
            variance = invstd**-2.0
        return bnfast.batch_norm(x, mean, variance, eps=0.0, axis=self._geometry["axis"])


class Samples(Call):
    """Instance and group norm: statistics of the channels, or groups of channels, of a sample."""

    def arrange(self, x: Any) -> None:
        axis = self._geometry["axis"] % len(self.shape)
        groups = self._saved["mean"].shape[1]
        self.parameter_axes = (axis,)
        self.split = (
            *self.shape[:axis],
            groups,
            self.shape[axis] // max(1, groups),
            *self.shape[axis + 1 :],
        )
        self.over = tuple(d for d in range(len(self.split)) if d not in (0, axis))


class Rows(Call):
    """Layer norm: statistics of rows, whose elements have parameters."""

    def arrange(self, x: Any) -> None:
        _, self.parameter_axes = _validation.normalized_axes(x, **self._geometry)
        self.split, self.over = self.shape, self.parameter_axes

    def backward(self, dy: Any, x: Any, weight: Any, parameters: int) -> tuple[Array, ...]:
        given = {"dy": self._like_x(dy), "x": x, "weight": weight}
        found: tuple[Array, ...] = self._pass("backward", **given, parameters=parameters > 0)
        return found[: 1 + parameters]


class RootMeanSquares(Rows):
    """RMS norm: around 0."""

    statistics = ("invrms",)
    upstream = ("ddx", "ddweight")
