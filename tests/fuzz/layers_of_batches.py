"""Layers whose statistics are of a batch, whole or in parts."""

from __future__ import annotations

from typing import Any

import numpy as np

import bnfast
from fuzz import call, draws, oracle, oracle_of_members
from fuzz.call import Array, Random
from fuzz.judge import Quantity
from fuzz.layer import (
    OF_CHANNELS,
    Plan,
    Step,
    copies,
    dtypes_of,
    gradients_by_name,
    is_finite,
    momentum_of,
    trains,
)
from fuzz.layer_draws import (
    AVERAGES,
    NONFINITE,
    activation,
    channel_inputs,
    constructor,
    data_inputs,
    geometry,
    learned_momentum,
    not_empty,
    recompute,
    sometimes_nonfinite,
    tracking,
    with_residuals,
)
from fuzz.layer_steps import (
    activated_step,
    counted_of_batch,
    step_by_running,
    step_by_statistics,
    with_logit,
)


def batch_norm(rng: Random) -> Plan:
    channels, axis, ndim = geometry(rng)
    more = tracking(rng) | activation(rng)
    if draws.chance(rng, 0.3):
        more["inplace"] = True
        slope = draws.pick(rng, (0.01, 0.3, 1.0))
        more |= draws.pick(rng, ({"activation": None}, {"activation": "leaky_relu"}))
        more["negative_slope"] = slope
    learned = learned_momentum(rng)
    more |= learned
    if learned and draws.chance(rng, 0.8):  # others refuse it
        more |= {"activation": None, "inplace": False}
    make, text = constructor(
        "BatchNorm",
        channels,
        axis=axis,
        affine=draws.chance(rng, 0.7),
        unbiased=draws.chance(rng, 0.7),
        **more,
    )

    step = activated_step(axis, oracle.of_channels, counted_of_batch)
    inputs = with_residuals(sometimes_nonfinite(data_inputs(channels, axis, ndim)))
    return Plan(make, inputs, step, text, recompute, True, True)


def ghost(rng: Random) -> Plan:
    channels, axis, ndim = geometry(rng, 1)
    size = int(rng.integers(1, 5))
    make, text = constructor(
        "GhostBatchNorm",
        channels,
        size,
        axis=axis,
        affine=draws.chance(rng, 0.7),
        unbiased=draws.chance(rng, 0.5),
        **(tracking(rng) | learned_momentum(rng)),
    )

    def step(layer: Any, x: Array) -> Step | call.Refused | None:
        folds = [
            (part, oracle.of_channels(x[part].shape, axis)) for part in oracle.ghosts(len(x), size)
        ]
        return with_logit(layer, step_by_statistics(layer, x, folds, layer.unbiased))

    inputs = sometimes_nonfinite(not_empty(data_inputs(channels, axis, ndim)))
    return Plan(make, inputs, step, text)


def conditional(rng: Random) -> Plan:
    channels, axis, ndim = geometry(rng, 1)
    classes = int(rng.integers(1, 5))
    make, text = constructor(
        "ConditionalBatchNorm",
        channels,
        classes,
        axis=axis,
        unbiased=draws.chance(rng, 0.7),
        **(tracking(rng) | learned_momentum(rng)),
    )
    of_x = not_empty(channel_inputs(channels, axis, ndim, draws.mild_values))

    def inputs(rng: Random) -> tuple[Any, ...]:
        (x,) = of_x(rng)
        return x, rng.integers(0, classes, len(x))

    inputs = sometimes_nonfinite(inputs)

    def step(layer: Any, x: Array, labels: Array) -> Step | call.Refused | None:
        folds = [(slice(None), oracle.of_conditions(x.shape, axis))]
        return with_logit(layer, step_by_statistics(layer, x, folds, layer.unbiased, labels))

    return Plan(make, inputs, step, text)


def renorm(rng: Random) -> Plan:
    channels, axis, ndim = geometry(rng)
    schedule = draws.pick(
        rng,
        (None, bnfast.RenormSchedule(3.0, 5.0, 0, 0, 0), bnfast.RenormSchedule(2.0, 1.0, 1, 6, 3)),
    )
    make, text = constructor(
        "BatchRenorm",
        channels,
        axis=axis,
        affine=draws.chance(rng, 0.7),
        schedule=schedule,
        momentum=draws.pick(rng, (0.01, 0.5, 1.0, *AVERAGES)),
        frozen=draws.chance(rng, 0.1),
        nonfinite=draws.pick(rng, NONFINITE),
        dtype=draws.dtype(rng),
    )
    limits = schedule or bnfast.RenormSchedule()

    def step(layer: Any, x: Array) -> Step | None:
        fold, dtypes = oracle.of_channels(x.shape, axis), dtypes_of(layer, OF_CHANNELS)
        weight, bias, mean, std = copies(
            layer.weight, layer.bias, layer.running_mean, layer.running_std
        )
        if not trains(layer):
            wide = std.astype(oracle.WIDE)
            return step_by_running(x, fold, mean, wide**2, weight, bias, 0.0, dtypes)
        takes = layer.nonfinite == "propagate" or is_finite(x, axis)
        if layer.nonfinite == "raise" and not takes:
            return None
        at = layer.num_batches_tracked
        r_max, d_max = _limits(limits, at)
        found = oracle_of_members.corrected(
            x, fold, mean, std, weight, bias, layer.eps, r_max, d_max
        )
        momentum = momentum_of(layer, at + 1)
        size = found.sigma + 0 * found.invstd.sizes["statistics"]
        of_mean = found.mean.sizes["statistics"]
        updated = {
            "running_mean": oracle.blended(mean, found.mean.value, momentum, of_mean, x.dtype),
            "running_std": oracle.blended(std, found.sigma, momentum, size, x.dtype),
        }

        def gradients(dy: Array) -> dict[str, Quantity | None]:
            back = oracle_of_members.corrected_backward(
                dy,
                x,
                fold,
                found.mean.value,
                found.invstd.value,
                found.r.value,
                found.d.value,
                weight,
            )
            # d has the rounding of the mean and of the deviation, times their ratio to the old.
            dweight = _with_rounding_of(back.dweight, back.dbias, found.d)
            return gradients_by_name((back.dx, dweight, back.dbias), OF_CHANNELS, dtypes)

        return Step(found.y, updated if takes else {}, int(takes), gradients)

    inputs = sometimes_nonfinite(not_empty(data_inputs(channels, axis, ndim)))
    return Plan(make, inputs, step, text)


def _with_rounding_of(dweight: Quantity, dbias: Quantity, d: Quantity) -> Quantity:
    more = np.abs(dbias.value) * d.sizes["statistics"]
    return dweight._replace(sizes={**dweight.sizes, "statistics": more})


def _limits(schedule: Any, step: int) -> tuple[float, float]:
    """How far the batch of a step may be corrected."""

    def gone(end: int) -> float:
        if step < schedule.begin:
            return 0.0
        return 1.0 if step >= end else (step - schedule.begin) / (end - schedule.begin)

    r_max = 1.0 + (schedule.r_max - 1.0) * gone(schedule.r_end)
    return r_max, schedule.d_max * gone(schedule.d_end)
