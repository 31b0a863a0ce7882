"""The activations that may follow a normalization, in the same pass: their names and arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bnfast import _primitives, _validation
from bnfast._primitives import Activation, Reduction
from bnfast._typing import Array

LEAKY = "leaky_relu"
_BY_NAME = {
    "relu": Activation("piecewise"),
    "relu6": Activation("piecewise", ceiling=6.0),
    "silu": Activation("silu"),
    "hardswish": Activation("hardswish"),
}
NAMES = ("relu", LEAKY, "relu6", "silu", "hardswish")


def activation_of(name: object, negative_slope: object) -> Activation | None:
    """Return what the kernels know of an activation; None for none."""
    if name is None:
        return None
    _validation.choice("activation", name, NAMES, or_none=True)
    if name != LEAKY:
        return _BY_NAME[str(name)]
    slope = _validation.real("negative_slope", negative_slope)
    if slope > 1.0:
        raise ValueError(f"negative_slope must be at most 1, got {negative_slope}")
    if slope == 0.0:
        return _BY_NAME["relu"]
    return Activation("piecewise", slope=slope, floor=-float("inf"))


def upstream_of(
    activation: Activation | None, residual: object, y: object
) -> tuple[object, object, bool]:
    """Return the residual and y that a gradient reads, and whether there was a residual."""
    if isinstance(residual, bool):
        if residual and y is None and activation is not None:
            raise ValueError("residual must be the array that was added, or y be given, got True")
        keeps, residual = residual, None
    else:
        keeps = residual is not None
    if y is not None and activation is not None:
        if activation.is_curve:
            raise ValueError(
                "y does not tell what silu or hardswish was given: leave it out, and give the "
                "bias and the residual where there were such"
            )
        if not activation.is_gated_by_output:
            raise ValueError(
                "y does not tell the gradient of leaky_relu with a negative_slope below 0: leave "
                "it out, and give the bias and the residual where there were such"
            )
    return residual, y, keeps


def gradients(
    given: tuple[Any, Any, Any, Any, Any, Any, bool],
    out: object,
    over: Reduction,
    activation: object,
    negative_slope: object,
    bias: object,
    residual: object,
    y: object,
    *,
    grouped: bool = False,
    reads: Mapping[str, object] | None = None,
    masked: _primitives.Masked = None,
) -> tuple[Array, ...]:
    """Return dx, dweight, dbias and, where there was a residual, its gradient.

    Of dy, x, axis, mean, invstd, weight and whether the statistics are constant; `masked` says
    which values count.
    """
    if activation is None and residual is None and bias is None and y is None:
        return _primitives.gradient(*given, out, over, grouped, reads, masked)
    chosen = activation_of(activation, negative_slope)
    added, output, keeps = upstream_of(chosen, residual, y)
    made = _primitives.fused_gradient(
        *given, out, over, grouped, bias, chosen, added, output, keeps, reads, masked
    )
    return made if keeps else made[:3]
