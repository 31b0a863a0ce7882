"""A layer in the fuzzer: how it is made, what it is given, what a call of it is to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import bnfast
from fuzz import call, oracle
from fuzz.call import Array, Random
from fuzz.judge import DOUBLE, Quantity

# The parameters of layers of channels, of rows, and of those that whiten.
OF_CHANNELS = ("weight", "bias")

# Gradients of layers have the rounding of the statistics that the layer made, besides their own.
OF_OWN_STATISTICS = 4


class Step(NamedTuple):
    """What one call does: its output, the state after it, and the gradients for a dy.

    `of_output` has the gradients, for a dy and the output as it came, where they follow from that.
    """

    y: Quantity
    updated: dict[str, Quantity]
    batches: int
    gradients: Callable[[Array], dict[str, Quantity | None]]
    of_output: Callable[[Array, Array], dict[str, Quantity | None]] | None = None


class Plan(NamedTuple):
    """A layer of some shape: how it is made, given inputs, and what it is to do.

    `step` takes the layer, whose public attributes say all that counts, and the arguments of its
    call; it returns None where the call is to be refused, or what the error may name. `options` are
    keywords of a call. A layer that is `fused` has activations and residuals; one that is `masked`
    takes masks, which `step` has as `drawn`.
    """

    make: Callable[[], Any]
    inputs: Callable[[Random], tuple[Any, ...]]
    step: Callable[..., Step | call.Refused | None]
    description: str
    options: Callable[[Random], dict[str, Any]] = lambda rng: {}
    fused: bool = False
    masked: bool = False


def loosened(quantity: Quantity | None) -> Quantity | None:
    if quantity is None:
        return None
    sizes = {kind: size * OF_OWN_STATISTICS for kind, size in quantity.sizes.items()}
    return quantity._replace(sizes=sizes)


def gradients_by_name(found: Any, parameters: tuple[str, ...], layer_dtypes: dict[str, Any]) -> Any:
    """By attribute, in the dtypes of the parameters; None where there is no parameter."""
    dx, *others = found
    named = {"dx": loosened(dx)}
    for name, quantity in zip(parameters, others, strict=False):
        dtype = layer_dtypes[name]
        loose = loosened(quantity)
        named[f"{name}_grad"] = None if dtype is None else loose._replace(dtype=dtype)
    return named


def dtypes_of(layer: Any, parameters: tuple[str, ...]) -> dict[str, Any]:
    arrays = {name: getattr(layer, name) for name in parameters}
    return {name: None if array is None else array.dtype for name, array in arrays.items()}


def copies(*arrays: Array | None) -> list[Array | None]:
    return [None if array is None else array.copy() for array in arrays]


def momentum_of(layer: Any, number: int) -> float:
    """The weight of the next batch."""
    if callable(layer.momentum):
        return layer.momentum(number)
    return 1.0 / number if layer.momentum is None else layer.momentum


def learns_momentum(layer: Any) -> bool:
    return type(layer.momentum) is bnfast.LearnableMomentum


def trains(layer: Any) -> bool:
    """Whether the layer normalizes by the batch, if it has a choice."""
    return layer.training and not layer.frozen


def is_finite(x: Array, axis: int, centred: bool = True) -> bool:
    """Whether the statistics of a batch are such that nonfinite='skip' takes it."""
    of = oracle.statistics(x, oracle.of_channels(x.shape, axis), centred)
    most, values = np.finfo(DOUBLE).max, x.size / max(x.shape[axis], 1)
    return bool(((np.abs(of.mean) <= most) & (of.var * values <= most)).all())
