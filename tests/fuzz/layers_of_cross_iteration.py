"""The layer that normalizes by the statistics of its last iterations."""

from __future__ import annotations

from typing import Any

import numpy as np

import bnfast
from fuzz import call, draws, oracle, oracle_of_averages, oracle_of_cross_iteration
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
from fuzz.layer_draws import constructor, sometimes_nonfinite, tracking
from fuzz.layer_steps import step_by_running

WINDOW = tuple(f"window_{name}" for name in ("filters", "mean", "var", "dmean", "dvar"))


def _window_of(layer: Any) -> list[Array]:
    return [getattr(layer, name) for name in WINDOW]


def cross_iteration(rng: Random) -> Plan:
    spatial, groups = int(rng.integers(3)), draws.pick(rng, (1, 1, 2))
    channels, axis = groups * int(rng.integers(1, 4)), draws.axis(rng, 2 + spatial, 1)
    kernel = tuple(int(n) for n in rng.integers(1, 4, spatial)) if draws.chance(rng, 0.8) else ()
    filter_shape = (channels, int(rng.integers(1, 4)), *kernel)

    def numbers(low: int, high: int) -> tuple[int, ...]:
        """One for each axis; often the same."""
        found = tuple(int(n) for n in rng.integers(low, high, spatial))
        return found if draws.chance(rng, 0.4) else found[:1] * spatial

    of = oracle_of_cross_iteration.Layer(
        filter_shape, numbers(1, 3), numbers(0, 2), numbers(1, 3), groups
    )
    window, burn_in = int(rng.integers(1, 5)), draws.pick(rng, (0, 0, 1, 3))
    settings = tracking(rng)
    del settings["track_running_stats"]
    steps = ((name, getattr(of, name)) for name in ("stride", "padding", "dilation") if spatial)
    geometry = {name: each[0] if len(set(each)) == 1 else each for name, each in steps}
    make, text = constructor(
        *("CrossIterationBatchNorm", filter_shape, window),
        axis=axis,
        affine=draws.chance(rng, 0.7),
        burn_in=burn_in,
        groups=groups,
        unbiased=draws.chance(rng, 0.7),
        **geometry,
        **settings,
    )
    first, rate = rng.normal(size=filter_shape), draws.pick(rng, (0.0, 1e-3, 0.1))

    def inputs(rng: Random) -> tuple[Any, ...]:
        sizes = of.sizes_of(tuple(int(n) for n in rng.integers(1, 6, spatial)))
        samples = 0 if draws.chance(rng, 0.03) else int(rng.integers(1, 7))
        shape = samples, filter_shape[1] * groups, *sizes
        sources = draws.mild_values(rng, shape, draws.dtype(rng))
        filters = (first + rate * rng.normal(size=filter_shape)).astype(draws.dtype(rng))
        x = np.moveaxis(of.output(sources, filters), 1, axis).astype(draws.dtype(rng))
        return np.ascontiguousarray(x), np.moveaxis(sources, 1, axis), filters

    def step(layer: Any, x: Array, sources: Array, filters: Array) -> Step | None:
        fold, dtypes = oracle.of_channels(x.shape, axis), dtypes_of(layer, OF_CHANNELS)
        weight, bias, mean, var = copies(
            layer.weight, layer.bias, layer.running_mean, layer.running_var
        )
        if not trains(layer):
            return step_by_running(x, fold, mean, var, weight, bias, layer.eps, dtypes)
        if layer.unbiased and fold.count == 1:
            return None
        takes = layer.nonfinite == "propagate" or is_finite(x, axis)
        if layer.nonfinite == "raise" and not takes:
            return None
        takes = takes and x.size > 0
        seen = layer.num_batches_tracked
        past, rows = seen - burn_in, window - 1
        kept = [number % rows for number in range(max(past - rows, 0), past)]
        entries = [
            bnfast.IterationStatistics(*(array[row] for array in copies(*_window_of(layer))))
            for row in reversed(kept)
        ]
        found: Any = oracle.forward(x, fold, weight, bias, layer.eps)
        of_batch = found.of
        if entries and x.size:
            found = oracle_of_cross_iteration.normalized(
                *(x, fold, filters, entries, weight, bias, layer.eps)
            )
        updated = {}
        if takes:
            after = call.tracked(
                *(of_batch, fold, x, mean, var, momentum_of(layer, seen + 1), layer.unbiased)
            )
            updated = {"running_mean": after.mean, "running_var": after.var}
        if takes and rows and past >= 0:
            of_iteration = oracle_of_cross_iteration.iteration(x, fold, axis, sources, filters, of)
            for name, buffer, new in zip(
                WINDOW, copies(*_window_of(layer)), of_iteration, strict=True
            ):
                updated[name] = oracle_of_averages.with_row(buffer, past % rows, new)

        def gradients(dy: Array) -> dict[str, Quantity | None]:
            back = oracle_of_cross_iteration.backward_of_layer(
                *(dy, x, fold, found, 1 + len(entries), weight)
            )
            return gradients_by_name(back, OF_CHANNELS, dtypes)

        return Step(found.y, updated, int(takes), gradients)

    return Plan(make, sometimes_nonfinite(inputs), step, text)
