"""Layers that whiten: decorrelated batch norm, iterative normalization."""

from __future__ import annotations

from typing import Any

from fuzz import draws, oracle_of_whitening
from fuzz.call import Array, Random
from fuzz.judge import Quantity
from fuzz.layer import (
    OF_CHANNELS,
    Plan,
    Step,
    copies,
    dtypes_of,
    gradients_by_name,
    momentum_of,
    trains,
)
from fuzz.layer_draws import channel_inputs, constructor, not_empty, tracking


def whitening(rng: Random, name: str) -> Plan:
    ndim, groups = int(rng.integers(2, 5)), int(rng.integers(1, 3))
    channels, axis = groups * int(rng.integers(1, 4)), draws.axis(rng, ndim)
    more = {"iterations": int(rng.integers(1, 7))} if name == "IterNorm" else {}
    iterations = more.get("iterations")
    make, text = constructor(
        name,
        channels,
        groups,
        axis=axis,
        affine=draws.chance(rng, 0.7),
        averaged=draws.pick(rng, ("whitening", "covariance")),
        **more,
        **(tracking(rng) | {"eps": draws.pick(rng, (1e-3, 0.1))}),
    )

    def step(layer: Any, x: Array) -> Step:
        weight, bias, mean, matrix = copies(
            layer.weight, layer.bias, layer.running_mean, layer.running_matrix
        )
        dtypes, eps = dtypes_of(layer, OF_CHANNELS), layer.eps
        constant = not trains(layer) and mean is not None
        if constant:
            by = oracle_of_whitening.evaluation_of(mean, matrix, layer.averaged, eps, iterations)
        else:
            by = oracle_of_whitening.whitening(x, axis, groups, eps, iterations)
        y = oracle_of_whitening.whitened(x, axis, by, weight, bias)
        updated: dict[str, Quantity] = {}
        tracks = trains(layer) and layer.track_running_stats
        if tracks:
            momentum = momentum_of(layer, layer.num_batches_tracked + 1)
            updated = oracle_of_whitening.tracked_matrix(
                by, x, mean, matrix, momentum, layer.averaged
            )

        def gradients(dy: Array) -> dict[str, Quantity | None]:
            found = oracle_of_whitening.gradients(
                dy, x, axis, by, weight, eps, iterations, constant
            )
            return gradients_by_name(found, OF_CHANNELS, dtypes)

        return Step(y, updated, int(tracks), gradients)

    inputs = not_empty(channel_inputs(channels, axis, ndim, draws.mild_values))
    return Plan(make, inputs, step, text)
