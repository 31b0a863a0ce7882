"""Calls of cross-iteration batch normalization, whose window is no array: its memory is plain."""

from __future__ import annotations

from typing import Any

import numpy as np

import bnfast
from fuzz import draws, oracle, oracle_of_cross_iteration
from fuzz.call import (
    Array,
    Call,
    Expected,
    Random,
    Refused,
    draw_x,
    many,
    one,
    pair,
    tracked,
    unchanged,
    upstream,
    wide,
)
from fuzz.judge import DOUBLE, Quantity


def _window(rng: Random, channels: int) -> tuple[Array | None, list[bnfast.IterationStatistics]]:
    """The filters of now, and the iterations before, whose filters were a step away; or neither."""
    if draws.chance(rng, 0.25):
        return None, []
    shape = (channels, *draws.pick(rng, ((1,), (4,), (2, 3), (3, 1, 2))))
    filters = rng.normal(size=shape).astype(draws.dtype(rng))
    step = draws.pick(rng, (0.0, 1e-3, 0.1))
    entries = [
        bnfast.IterationStatistics(
            (filters + step * rng.normal(size=shape)).astype(filters.dtype),
            draws.running(rng, (channels,)),
            draws.running(rng, (channels,), positive=True),
            *(rng.normal(size=shape).astype(draws.dtype(rng)) for _ in range(2)),
        )
        for _ in range(int(rng.integers(1, 4)))
    ]
    return filters, entries


def cross_iteration(rng: Random, name: str) -> Call:
    x, axis = draw_x(rng, full=True)
    fold, channels = oracle.of_channels(x.shape, axis), (x.shape[axis],)
    filters, window = _window(rng, x.shape[axis])
    weight, bias = pair(rng, channels)
    forward = name.endswith("forward")
    training = forward or draws.chance(rng, 0.7)
    has_running = not training or (not forward and draws.chance(rng, 0.6))
    mean = draws.running(rng, channels) if has_running else None
    var = draws.running(rng, channels, positive=True) if has_running else None
    eps, momentum, unbiased = draws.eps(rng), draws.momentum(rng), draws.chance(rng, 0.7)
    arguments: dict[str, Any] = {"x": x}
    if not forward:
        arguments |= {"running_mean": mean, "running_var": var}
    arguments |= {"filters": filters, "window": window, "weight": weight, "bias": bias}
    if not forward:
        arguments |= {"training": training, "momentum": momentum, "unbiased": unbiased}
    arguments |= {"eps": eps, "axis": axis}

    def expect() -> Expected | Refused:
        if not training:
            return Expected({"y": oracle.evaluate(x, fold, mean, var, weight, bias, eps)})
        if has_running and unbiased and fold.count == 1:
            return Refused(("x",), x.size > 0)
        own = oracle.forward(x, fold, weight, bias, eps)
        of_own = {"y": own.y, "mean": own.mean, "invstd": own.invstd}
        found: dict[str, Quantity] = of_own
        if window and x.size:
            found = oracle_of_cross_iteration.normalized(
                x, fold, filters, window, weight, bias, eps
            )._asdict()
        iterations = Quantity(np.asarray(1 + len(window), oracle.WIDE), {}, DOUBLE, DOUBLE)
        found = {"y": found.pop("y"), "iterations": iterations} | (found if x.size else {})
        if forward:
            return Expected(found)
        after = list(unchanged(mean, var)) if has_running else []
        if has_running and x.size:
            after = list(tracked(own.of, fold, x, mean, var, momentum, unbiased))
        updated = dict(zip(changed, after, strict=True))
        return Expected({"y": found["y"]}, updated)

    def unpack(result: Any) -> tuple[Any, ...]:
        y, saved = result
        rest = (saved.mean, saved.invstd, saved.batch_mean, saved.batch_var)
        return y, float(saved.iterations), *(rest if x.size else ())

    changed = ("running_mean", "running_var") if training and has_running else ()
    return Call(name, arguments, expect, unpack if forward else one, ("x",), ("x",), changed, axis)


def cross_iteration_backward(rng: Random) -> Call:
    x, axis = draw_x(rng, full=True)
    fold, channels = oracle.of_channels(x.shape, axis), (x.shape[axis],)
    dy, weight = upstream(rng, x), draws.parameter(rng, channels)
    found = oracle.forward(x, fold, None, None, draws.eps(rng))
    mean, invstd = wide(found.mean, found.invstd)
    iterations = int(rng.integers(1, 5))
    if iterations > 1:
        with np.errstate(all="ignore"):  # what the window adds
            mean = mean + rng.normal(size=channels) / invstd
    variance = rng.uniform(0.5, 2, channels)
    saved = bnfast.functional.CrossIterated(mean, invstd, iterations, mean.copy(), variance)
    arguments = {"dy": dy, "x": x, "saved": saved, "weight": weight, "axis": axis}

    def expect() -> Expected:
        given = dy, x, fold, mean, invstd
        gradients = oracle_of_cross_iteration.backward(*given, iterations, weight)
        return Expected(gradients._asdict())

    name = "cross_iteration_batch_norm_backward"
    return Call(name, arguments, expect, many, ("dy", "x"), ("dy", "x"), (), axis)
