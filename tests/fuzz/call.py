"""A call of a public function, what is expected of it, and what all draws of such have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from fuzz import draws, oracle
from fuzz.judge import DOUBLE, HALVES, Quantity

Array = np.ndarray
Random = np.random.Generator


class Expected(NamedTuple):
    """What a call returns, by name, and what it writes to arguments."""

    returned: dict[str, Quantity]
    updated: Mapping[str, Quantity] = MappingProxyType({})


class Refused(NamedTuple):
    """The call raises one error, which names one of these arguments; or only may."""

    names: tuple[str, ...]
    surely: bool = True


class Call(NamedTuple):
    """A function and its arguments, contiguous arrays among them, in the order of its signature.

    `inputs` are the arguments that are like the output, x the last, and `in_place` those of them
    that `out` may be. `channels` is the axis along which nothing may leak, or None.
    """

    name: str
    arguments: dict[str, Any]
    expect: Callable[[], Expected | Refused]
    unpack: Callable[[Any], tuple[Any, ...]]
    inputs: tuple[str, ...]
    in_place: tuple[str, ...]
    updated: tuple[str, ...] = ()
    channels: int | None = None


def one(result: Any) -> tuple[Any, ...]:
    return (result,)


def many(result: Any) -> tuple[Any, ...]:
    return tuple(result)


def with_saved(result: Any) -> tuple[Any, ...]:
    """An output, and a tuple of what was saved."""
    return (result[0], *result[1])


def wide(*quantities: Quantity) -> list[Array]:
    """Statistics as a forward pass without error returns them."""
    with np.errstate(all="ignore"):
        return [np.asarray(quantity.value, DOUBLE) for quantity in quantities]


# What takes data of 16 bits; the others refuse it, and so do derivatives.
OF_HALVES = (
    *("batch_norm", "ghost_batch_norm", "batch_renorm", "instance_norm", "group_norm"),
    *("layer_norm", "rms_norm", "filter_response_norm", "moments", "summary"),
)


def takes_halves(name: str) -> bool:
    return name.startswith(OF_HALVES) and not name.endswith(("jvp", "double_backward"))


def draw_x(
    rng: Random, multiple: int = 1, first: int = 0, *, full: bool = False
) -> tuple[Array, int]:
    """An input and its channel axis, which is not before `first`; a `full` one has no 16 bits."""
    ndim = int(rng.integers(2, 7))
    axis = draws.axis(rng, ndim, first)
    shape = draws.shape(rng, ndim, ndim, (axis, multiple))
    dtype = draws.dtype(rng) if full else draws.data_dtype(rng)
    return draws.values(rng, shape, dtype), axis


def upstream(rng: Random, x: Array) -> Array:
    kind = rng.random()
    if kind < 0.6:
        return rng.normal(size=x.shape).astype(x.dtype)
    if kind < 0.8:
        return np.full(x.shape, rng.normal(), x.dtype)
    exponent = 10 if x.dtype in HALVES else 30
    return (rng.normal(size=x.shape) * 2.0 ** rng.uniform(-exponent, exponent)).astype(x.dtype)


def pair(rng: Random, shape: tuple[int, ...]) -> tuple[Array | None, Array | None]:
    return draws.parameter(rng, shape), draws.parameter(rng, shape)


def fused(rng: Random, x: Array) -> dict[str, Any]:
    """An activation and a residual, either, or neither."""
    arguments: dict[str, Any] = {}
    if draws.chance(rng, 0.4):
        names = ("relu", "leaky_relu", "relu6", "silu", "hardswish")
        arguments["activation"] = draws.pick(rng, names)
        arguments["negative_slope"] = draws.pick(rng, (0.01, 0.3, 1.0, -0.5))
    if draws.chance(rng, 0.3):
        arguments["residual"] = draws.values(rng, x.shape, x.dtype)
    return arguments


def like_output(fused: dict[str, Any]) -> tuple[str, ...]:
    """The arguments that are like the output, x the last."""
    return ("residual", "x") if "residual" in fused else ("x",)


class Tracked(NamedTuple):
    """Running statistics after training."""

    mean: Quantity
    var: Quantity


def tracked(
    of: oracle.Statistics,
    fold: oracle.Fold,
    x: Array,
    mean: Array,
    var: Array,
    momentum: float,
    unbiased: bool,
) -> Tracked:
    """After one batch, whose statistics may be those of several samples."""

    def of_all(kept: Array) -> Array:
        single = fold.statistic(kept)
        return single if single.ndim == 1 else single.mean(0)

    std, correction = np.sqrt(of.var), fold.count / (fold.count - 1) if unbiased else 1
    error = oracle.unjudged(std, of.usable)
    scale = of_all(oracle.unjudged(of.var, of.usable)) * correction
    new = of_all(of.mean), of_all(of.var) * correction
    return Tracked(
        oracle.blended(mean, new[0], momentum, of_all(error), x.dtype),
        oracle.blended(var, new[1], momentum, scale, x.dtype),
    )


def unchanged(*arrays: Array) -> list[Quantity]:
    zero: dict[str, Array] = {}
    return [Quantity(a.astype(oracle.WIDE), zero, a.dtype, a.dtype) for a in arrays]


def carried(before: Tracked, now: Tracked, momentum: float) -> Tracked:
    """The errors of one part's statistics in those of the next."""
    share, found = abs(1 - momentum), []
    for old, new in zip(before, now, strict=True):
        sizes = {
            kind: np.asarray(new.sizes.get(kind, 0) + share * old.sizes.get(kind, 0))
            for kind in {*new.sizes, *old.sizes}
        }
        found.append(new._replace(sizes=sizes))
    return Tracked(*found)
