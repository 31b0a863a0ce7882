"""A call of a public function, what is expected of it, and what all draws of such have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from fuzz import draws, masks, oracle, oracle_of_masks
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
    that `out` may be. `channels` is the axis along which nothing may leak, or None. `passed_on`
    is an argument that may itself be among the results. `counts` says which values of x a mask lets
    count; None of all.
    """

    name: str
    arguments: dict[str, Any]
    expect: Callable[[], Expected | Refused]
    unpack: Callable[[Any], tuple[Any, ...]]
    inputs: tuple[str, ...]
    in_place: tuple[str, ...]
    updated: tuple[str, ...] = ()
    channels: int | None = None
    passed_on: str | None = None
    counts: Array | None = None


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


def activation(rng: Random) -> dict[str, Any]:
    names = ("relu", "leaky_relu", "relu6", "silu", "hardswish")
    return {
        "activation": draws.pick(rng, names),
        "negative_slope": draws.pick(rng, (0.01, 0.3, 1.0, -0.5, 0.0)),
    }


def fused(rng: Random, x: Array) -> dict[str, Any]:
    """An activation and a residual, either, or neither."""
    arguments: dict[str, Any] = {}
    if draws.chance(rng, 0.4):
        arguments |= activation(rng)
    if draws.chance(rng, 0.3):
        arguments["residual"] = draws.values(rng, x.shape, x.dtype)
    return arguments


def masked(
    rng: Random, x: Array, axis: int, groups: int | None = None, per_group: bool | None = None
) -> tuple[dict[str, Any], oracle_of_masks.Masked | None]:
    """Arguments that say what counts, and its oracle; often of all.

    Without `per_group` the statistics are those of a batch, else those of samples.
    """
    if not draws.chance(rng, 0.35):
        return (
            {"padding": draws.pick(rng, masks.PADDINGS)} if draws.chance(rng, 0.1) else {}
        ), None
    arguments, counts = masks.draw(rng, x.shape, axis)
    given = counts, x.shape, axis, arguments.get("padding", masks.PADDINGS[0])
    if per_group is None:
        return arguments, oracle_of_masks.of_batch(*given)
    return arguments, oracle_of_masks.of_samples(*given, groups, per_group)


def refused_mask(
    counted: oracle_of_masks.Masked, x: Array, arguments: dict[str, Any], unbiased: bool
) -> Refused | None:
    """Where nothing counts, or a single value has no unbiased variance."""
    name = "mask" if "mask" in arguments else "lengths"
    if not counted.counts.any() and counted.counts.size:
        return Refused((name,), x.size > 0)
    if unbiased and counted.fewest == 1:
        return Refused((name, "x"), x.size > 0)
    return None


def spoiled(rng: Random, counted: oracle_of_masks.Masked | None, array: Array) -> Array:
    """Often with anything where values do not count."""
    if counted is None or draws.chance(rng, 0.4):
        return array
    return masks.filled(rng, array, counted.everywhere(array.shape[counted.axis]))


def spoiled_arrays(
    rng: Random, counted: oracle_of_masks.Masked | None, fused: dict[str, Any]
) -> dict[str, Any]:
    """The same of a residual and an output, where there are such."""
    like_x = {k: v for k, v in fused.items() if k in ("residual", "y")}
    arrays = {k: v for k, v in like_x.items() if isinstance(v, np.ndarray)}
    return fused | {name: spoiled(rng, counted, array) for name, array in arrays.items()}


def counts_of(counted: oracle_of_masks.Masked | None, x: Array) -> Array | None:
    return None if counted is None else counted.everywhere(x.shape[counted.axis])


def after_statistics(
    counted: oracle_of_masks.Masked | None, y: Quantity, x: Array, fused: dict[str, Any]
) -> Quantity:
    """An output with a residual, an activation and padding, where there are such."""
    if fused:
        y = oracle.activated(y, fused)
    return y if counted is None else counted.padded(y, x)


def like_output(fused: dict[str, Any]) -> tuple[str, ...]:
    """The arguments that are like the output, x the last."""
    return ("residual", "x") if "residual" in fused else ("x",)


def is_told_by_output(fused: dict[str, Any]) -> bool:
    """Whether y says what goes through an activation."""
    name, slope = fused["activation"], fused["negative_slope"]
    return name in ("relu", "relu6") or (name == "leaky_relu" and slope >= 0)


def fused_of_gradient(rng: Random, x: Array, bias: Array | None, y: Quantity) -> dict[str, Any]:
    """The arguments of a gradient, of a forward pass that had this bias and this output."""
    arguments = fused(rng, x)
    if not arguments:
        return arguments
    arguments["bias"] = bias
    if "activation" not in arguments:  # what was added is of no use then
        if draws.chance(rng, 0.5):
            arguments["residual"] = draws.pick(rng, (True, True, False))
        return arguments
    if draws.chance(rng, 0.5 if is_told_by_output(arguments) else 0.02):
        with np.errstate(all="ignore"):
            made = oracle.activated(y, arguments).value.astype(x.dtype)
        arguments["y"] = np.ascontiguousarray(made)
    if draws.chance(rng, 0.5 if "y" in arguments else 0.03):
        arguments["residual"] = draws.pick(rng, (True, True, False))
    return arguments


def refused_gradient(fused: dict[str, Any]) -> Refused | None:
    """Where y does not tell enough, or there is none."""
    if fused.get("activation") is None:
        return None
    wrong = ("y",) if "y" in fused and not is_told_by_output(fused) else ()
    if fused.get("residual") is True and "y" not in fused:
        wrong = (*wrong, "residual")
    return Refused(wrong) if wrong else None


def of_gradient(fused: dict[str, Any]) -> tuple[str, ...]:
    """The arguments of a gradient that are like its output, x the last."""
    arrays = [name for name in ("y", "residual") if isinstance(fused.get(name), np.ndarray)]
    return (*arrays, "dy", "x")


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
    means = fold.statistic(of.mean)
    averaged = means if means.ndim > 1 else None
    return Tracked(
        oracle.blended(mean, new[0], momentum, of_all(error), x.dtype, averaged),
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
