"""Layers whose statistics are of each sample: instance, group, filter response norm."""

from __future__ import annotations

from typing import Any

from fuzz import call, draws, masks, oracle, oracle_of_members
from fuzz.call import Array, Random
from fuzz.judge import Quantity
from fuzz.layer import OF_CHANNELS, Plan, Step, copies, dtypes_of, gradients_by_name
from fuzz.layer_draws import (
    activation,
    constructor,
    data_inputs,
    geometry,
    recompute,
    sometimes_nonfinite,
    tracking,
    with_residuals,
)
from fuzz.layer_steps import (
    ACTIVATIONS,
    activated,
    activated_step,
    counted_of_samples,
    fused_of,
    step_by_input,
    step_of_masked,
)


def instance_norm(rng: Random) -> Plan:
    channels, axis, ndim = geometry(rng, 1)
    make, text = constructor(
        "InstanceNorm",
        channels,
        axis=axis,
        affine=draws.chance(rng, 0.6),
        **tracking(rng),
        **activation(rng),
    )

    step = activated_step(axis, oracle.of_planes, counted_of_samples)
    inputs = with_residuals(sometimes_nonfinite(data_inputs(channels, axis, ndim)))
    return Plan(make, inputs, step, text, recompute, True, True)


def group_norm(rng: Random) -> Plan:
    ndim, groups = int(rng.integers(2, 5)), int(rng.integers(1, 4))
    channels, axis = groups * int(rng.integers(1, 4)), draws.axis(rng, ndim, 1)
    make, text = constructor(
        "GroupNorm",
        groups,
        channels,
        axis=axis,
        affine=draws.chance(rng, 0.7),
        dtype=draws.dtype(rng),
        **activation(rng),
    )

    def step(
        layer: Any,
        x: Array,
        residual: Array | None = None,
        *,
        drawn: masks.Drawn | None = None,
    ) -> Step | call.Refused:
        fold, fused = oracle.of_groups(x.shape, axis, groups), fused_of(layer, residual)
        if drawn is not None:
            return step_of_masked(
                layer, x, drawn, fused, counted_of_samples(x, axis, drawn, groups)
            )
        if fused.activation not in (None, *ACTIVATIONS):
            return call.Refused(("activation",))
        weight, bias = copies(layer.weight, layer.bias)
        found = oracle.forward(x, fold, weight, bias, layer.eps)
        plain = step_by_input(layer, x, fold, weight, bias, layer.eps)
        given = x, fold, found.mean.value, found.invstd, weight, bias
        return activated(plain, fused, given, dtypes_of(layer, OF_CHANNELS), False)

    inputs = with_residuals(data_inputs(channels, axis, ndim))
    return Plan(make, inputs, step, text, fused=True, masked=True)


def response(rng: Random) -> Plan:
    channels, axis, ndim = geometry(rng, 1)
    make, text = constructor(
        "FilterResponseNorm",
        channels,
        axis=axis,
        affine=draws.chance(rng, 0.7),
        thresholded=draws.chance(rng, 0.6),
        learned_eps=draws.pick(rng, (None, 1e-4)),
        dtype=draws.dtype(rng),
    )
    parameters = ("weight", "bias", "tau", "learned_eps")

    def step(layer: Any, x: Array) -> Step:
        given = copies(*(getattr(layer, name) for name in parameters))
        *first, learned = given
        dtypes = dtypes_of(layer, parameters)
        y, inverse = oracle_of_members.response(x, axis, *first, layer.eps, learned)

        def gradients(dy: Array) -> dict[str, Quantity | None]:
            found = oracle_of_members.response_backward(dy, x, axis, inverse.value, *first, learned)
            return gradients_by_name(found, parameters, dtypes)

        return Step(y, {}, 0, gradients)

    return Plan(make, data_inputs(channels, axis, ndim), step, text)
