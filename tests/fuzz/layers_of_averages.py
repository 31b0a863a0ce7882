"""The layer that normalizes by moving averages."""

from __future__ import annotations

from typing import Any

import numpy as np

from fuzz import draws, oracle, oracle_of_averages
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
    loosened,
    momentum_of,
    trains,
)
from fuzz.layer_draws import (
    AVERAGES,
    NONFINITE,
    channel_inputs,
    constructor,
    geometry,
    not_empty,
    sometimes_nonfinite,
)
from fuzz.layer_steps import step_by_running


def moving_average(rng: Random) -> Plan:
    channels, axis, ndim = geometry(rng)
    size, warm_up, later = (int(rng.integers(low, 5)) for low in (1, 0, 0))
    make, text = constructor(
        *("MovingAverageBatchNorm", channels, size),
        axis=axis,
        affine=draws.chance(rng, 0.7),
        momentum=draws.pick(rng, (0.02, 0.5, 1.0, *AVERAGES)),
        warm_up=warm_up,
        renormalized_from=later,
        r_max=draws.pick(rng, (1.0, 2.0, 1e3)),
        frozen=draws.chance(rng, 0.1),
        nonfinite=draws.pick(rng, NONFINITE),
        dtype=draws.dtype(rng),
    )

    def step(layer: Any, x: Array) -> Step | None:
        fold, dtypes = oracle.of_channels(x.shape, axis), dtypes_of(layer, OF_CHANNELS)
        weight, bias, var, squares = copies(
            layer.weight, layer.bias, layer.running_var, layer.square_buffer
        )
        nothing = np.zeros(channels)
        if not trains(layer):
            return step_by_running(x, fold, nothing, var, weight, bias, layer.eps, dtypes)
        takes = layer.nonfinite == "propagate" or is_finite(x, axis, centred=False)
        if layer.nonfinite == "raise" and not takes:
            return None
        seen = layer.num_batches_tracked
        row, averaged = seen % size, seen >= max(warm_up, size)
        r_max = layer.r_max if seen >= max(warm_up, later) else 1.0
        found = oracle_of_averages.moving_average(
            *(x, fold, var, squares, weight, bias, momentum_of(layer, seen + 1), layer.eps),
            *(row, averaged, r_max),
        )

        def gradients(dy: Array) -> dict[str, Quantity | None]:
            # The buffer as it is by then: a state may have been loaded since the call.
            *of_layer, buffer = oracle_of_averages.moving_average_backward(
                *(dy, x, fold, found.invrms.value, found.r.value, row, averaged),
                *(layer.gradient_buffer.copy(), weight),
            )
            named = gradients_by_name(of_layer, OF_CHANNELS, dtypes)
            return named | {"gradient_buffer": loosened(buffer)} if takes else named

        updated = {"running_var": found.running_var, "square_buffer": found.square_buffer}
        return Step(found.y, updated if takes else {}, int(takes), gradients)

    inputs = sometimes_nonfinite(not_empty(channel_inputs(channels, axis, ndim)))
    return Plan(make, inputs, step, text)
