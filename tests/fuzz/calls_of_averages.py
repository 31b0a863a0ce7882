"""Calls of moving average batch normalization."""

from __future__ import annotations

from typing import Any

import numpy as np

import bnfast
from fuzz import draws, oracle, oracle_of_averages
from fuzz.call import Array, Call, Expected, Random, draw_x, many, one, pair, unchanged, upstream
from fuzz.judge import Quantity


def _buffer(rng: Random, channels: int, positive: bool) -> tuple[Array, int]:
    """Rows of statistics, and the row of the next batch."""
    rows = int(rng.integers(1, 5))
    return draws.running(rng, (rows, channels), positive, full=True), int(rng.integers(rows))


def _channels(x: Array, axis: int, buffer: Array) -> int | None:
    """The axis of channels, unless a buffer could be taken for an array like x."""
    return None if buffer.shape == x.shape else axis


def moving_average(rng: Random, name: str) -> Call:
    x, axis = draw_x(rng, full=True)
    fold, channels = oracle.of_channels(x.shape, axis), x.shape[axis]
    weight, bias = pair(rng, (channels,))
    var = draws.running(rng, (channels,), positive=True, full=True)
    buffer, row = _buffer(rng, channels, True)
    forward = name.endswith("forward")
    training = forward or draws.chance(rng, 0.6)
    momentum, eps = draws.momentum(rng), draws.eps(rng)
    averaged, r_max = draws.chance(rng, 0.6), draws.pick(rng, (1.0, 1.0, 1.5, 5.0, 1e6))
    arguments: dict[str, Any] = {"x": x, "running_var": var}
    if training:
        arguments["square_buffer"] = buffer
    arguments |= {"weight": weight, "bias": bias}
    if not forward:
        arguments["training"] = training
    arguments |= {"momentum": momentum, "eps": eps, "row": row, "averaged": averaged}
    arguments |= {"r_max": r_max, "axis": axis}

    def expect() -> Expected:
        if not training:
            nothing = np.zeros(channels)
            return Expected({"y": oracle.evaluate(x, fold, nothing, var, weight, bias, eps)})
        if not x.size:
            y = Quantity(x.astype(oracle.WIDE), {}, x.dtype, x.dtype)
            before = dict(zip(changed, unchanged(var, buffer), strict=True))
            return Expected({"y": y}, before)
        found = oracle_of_averages.moving_average(
            *(x, fold, var, buffer, weight, bias, momentum, eps, row, averaged, r_max)
        )._asdict()
        updated = {key: found.pop(key) for key in changed}
        return Expected(found if forward else {"y": found["y"]}, updated)

    changed = ("running_var", "square_buffer") if training else ()
    unpack = (lambda result: (result[0], result[1].invrms, result[1].r)) if forward else one
    where = _channels(x, axis, buffer)
    return Call(name, arguments, expect, unpack, ("x",), ("x",), changed, where)


def moving_average_backward(rng: Random) -> Call:
    x, axis = draw_x(rng, full=True)
    fold, channels = oracle.of_channels(x.shape, axis), x.shape[axis]
    dy, weight = upstream(rng, x), draws.parameter(rng, (channels,))
    buffer, row = _buffer(rng, channels, False)
    with np.errstate(all="ignore"):
        invrms = oracle.forward(x, fold, None, None, draws.eps(rng), centred=False).invstd.value
    r, averaged = rng.uniform(0.2, 5, channels), draws.chance(rng, 0.6)
    saved = bnfast.functional.MovingAveraged(invrms.astype(np.float64), r, row, averaged)
    arguments = {"dy": dy, "x": x, "saved": saved, "gradient_buffer": buffer, "weight": weight}
    arguments["axis"] = axis

    def expect() -> Expected:
        if not x.size:
            dx = Quantity(x.astype(oracle.WIDE), {}, x.dtype, x.dtype)
            return Expected({"dx": dx}, {"gradient_buffer": unchanged(buffer)[0]})
        found = oracle_of_averages.moving_average_backward(
            dy, x, fold, *saved, buffer, weight
        )._asdict()
        updated = {"gradient_buffer": found.pop("gradient_buffer")}
        return Expected(found, updated)

    name, where = "moving_average_batch_norm_backward", _channels(x, axis, buffer)
    changed = ("gradient_buffer",)
    return Call(name, arguments, expect, many, ("dy", "x"), ("dy", "x"), changed, where)
