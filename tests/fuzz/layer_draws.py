"""The arguments of layers, and the inputs of their calls, drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import bnfast
from fuzz import call, draws
from fuzz.call import Array, Random
from fuzz.case import text_of

NONFINITE = ("propagate", "propagate", "skip", "raise")
AVERAGES = (
    bnfast.ExponentialAverage(old=0.75, bias_corrected=True),
    bnfast.CumulativeAverage(),
)


def constructor(name: str, *arguments: Any, **keywords: Any) -> tuple[Callable[[], Any], str]:
    """What makes a layer, and the text of its construction."""
    shown = [text_of(a) for a in arguments]
    shown += [f"{key}={text_of(value)}" for key, value in keywords.items()]
    return lambda: getattr(bnfast, name)(*arguments, **keywords), f"{name}({', '.join(shown)})"


def tracking(rng: Random) -> dict[str, Any]:
    return {
        "eps": draws.pick(rng, (1e-5, 1e-3)),
        "momentum": draws.pick(rng, (0.1, None, 0.5, 1.0, 0.0, *AVERAGES)),
        "frozen": draws.chance(rng, 0.1),
        "nonfinite": draws.pick(rng, NONFINITE),
        "track_running_stats": draws.chance(rng, 0.8),
        "dtype": draws.dtype(rng),
    }


def learned_momentum(rng: Random) -> dict[str, Any]:
    """Sometimes instead of another one."""
    if not draws.chance(rng, 0.3):
        return {}
    momentum = bnfast.LearnableMomentum(draws.pick(rng, (0.1, 0.5)), draws.chance(rng, 0.5))
    return {"momentum": momentum, "track_running_stats": True}


def activation(rng: Random) -> dict[str, Any]:
    """Often none."""
    return call.activation(rng) if draws.chance(rng, 0.5) else {}


def recompute(rng: Random) -> dict[str, Any]:
    return {"recompute": draws.chance(rng, 0.6)} if draws.chance(rng, 0.4) else {}


def geometry(rng: Random, first_axis: int = 0) -> tuple[int, int, int]:
    """How many channels there are, along which axis, of how many; `first_axis` has samples if 1."""
    ndim = int(rng.integers(2, 5))
    return int(rng.integers(1, 9)), draws.axis(rng, ndim, first_axis), ndim


def channel_inputs(
    channels: int,
    axis: int,
    ndim: int,
    draw: Callable[..., Array] = draws.values,
    dtype: Callable[[Random], np.dtype] = draws.dtype,
) -> Callable[[Random], tuple[Any, ...]]:
    def inputs(rng: Random) -> tuple[Any, ...]:
        sizes = [int(rng.integers(1, 7)) for _ in range(ndim)]
        if draws.chance(rng, 0.03):
            sizes[(axis + 1) % ndim] = 0
        sizes[axis] = channels
        return (draw(rng, tuple(sizes), dtype(rng)),)

    return inputs


def data_inputs(channels: int, axis: int, ndim: int) -> Callable[[Random], tuple[Any, ...]]:
    """Of layers that take 16 bits."""
    return channel_inputs(channels, axis, ndim, dtype=draws.data_dtype)


def not_empty(inputs: Callable[[Random], tuple[Any, ...]]) -> Any:
    def drawn(rng: Random) -> tuple[Any, ...]:
        found = inputs(rng)
        while not found[0].size:
            found = inputs(rng)
        return found

    return drawn


def sometimes_nonfinite(inputs: Callable[[Random], tuple[Any, ...]]) -> Any:
    """Of what has a choice about such batches."""

    def drawn(rng: Random) -> tuple[Any, ...]:
        x, *others = inputs(rng)
        if x.size and draws.chance(rng, 0.15):
            x.flat[int(rng.integers(x.size))] = draws.pick(rng, (np.nan, np.inf, -np.inf))
        return x, *others

    return drawn


def with_residuals(inputs: Callable[[Random], tuple[Any, ...]]) -> Any:
    """Of layers whose calls may add a residual."""

    def drawn(rng: Random) -> tuple[Any, ...]:
        (x,) = inputs(rng)
        if draws.chance(rng, 0.3):
            return x, rng.normal(size=x.shape).astype(x.dtype)
        return (x,)

    return drawn
