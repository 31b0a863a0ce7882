"""Calls of what normalizes each sample by itself."""

from __future__ import annotations

from typing import Any

from fuzz import draws, oracle, oracle_of_activations, oracle_of_masks, oracle_of_members
from fuzz.call import (
    Array,
    Call,
    Expected,
    Random,
    Refused,
    Tracked,
    after_statistics,
    counts_of,
    draw_x,
    fused,
    fused_of_gradient,
    like_output,
    many,
    masked,
    of_gradient,
    one,
    pair,
    refused_gradient,
    refused_mask,
    spoiled,
    spoiled_arrays,
    tracked,
    unchanged,
    upstream,
    wide,
)


def instance_norm(rng: Random) -> Call:
    x, axis = draw_x(rng, first=1)
    by_mask, counted = masked(rng, x, axis, per_group=False)
    x = spoiled(rng, counted, x)
    fold, channels = oracle.of_planes(x.shape, axis), (x.shape[axis],)
    weight, bias = pair(rng, channels)
    own, has_running = draws.chance(rng, 0.7), draws.chance(rng, 0.5)
    has_running = has_running or not own
    mean = draws.running(rng, channels) if has_running else None
    var = draws.running(rng, channels, positive=True) if has_running else None
    momentum, eps = draws.momentum(rng), draws.eps(rng)
    arguments = {"x": x, "running_mean": mean, "running_var": var, "weight": weight, "bias": bias}
    arguments |= {"use_input_stats": own, "momentum": momentum, "eps": eps, "axis": axis}
    after_it = spoiled_arrays(rng, counted, fused(rng, x))
    inputs = like_output(after_it)
    arguments |= after_it | by_mask

    def expect() -> Expected | Refused:
        if not own:
            batch = oracle.of_channels(x.shape, axis)
            y = oracle.evaluate(x, batch, mean, var, weight, bias, eps)
            return Expected({"y": after_statistics(counted, y, x, after_it)})
        if has_running and fold.count == 1:
            return Refused(("x", *by_mask), x.size > 0)
        refused = counted and refused_mask(counted, x, by_mask, has_running)
        if refused:
            return refused
        given = (x, fold) if counted is None else (x,)
        forward = oracle.forward if counted is None else counted.forward
        found = forward(*given, weight, bias, eps)
        y = after_statistics(counted, found.y, x, after_it)
        if not has_running:
            return Expected({"y": y})
        after = Tracked(*unchanged(mean, var))
        if x.size and counted is not None:
            after = Tracked(*counted.tracked(found.of, x, (mean, var), momentum, True))
        elif x.size:
            after = tracked(found.of, fold, x, mean, var, momentum, True)
        return Expected({"y": y}, {"running_mean": after.mean, "running_var": after.var})

    changed = ("running_mean", "running_var") if own and has_running else ()
    like_x = inputs, inputs, changed, axis
    counts = counts_of(counted, x)
    return Call("instance_norm", arguments, expect, one, *like_x, counts=counts)


def of_samples(
    rng: Random, kind: str, *, full: bool = False
) -> tuple[Array, dict[str, Any], oracle.Fold]:
    """An input of instance or group normalization, with the arguments that say its fold."""
    if kind == "instance":
        x, axis = draw_x(rng, first=1, full=full)
        return x, {"axis": axis}, oracle.of_planes(x.shape, axis)
    groups = draws.pick(rng, (1, 2, 3, 4, 8))
    x, axis = draw_x(rng, groups, first=1, full=full)
    per_group = draws.chance(rng, 0.2)
    fold = oracle.of_groups(x.shape, axis, groups if x.shape[axis] else 0, per_group)
    return x, {"num_groups": groups, "axis": axis, "per_group": per_group}, fold


def _masked(
    rng: Random, x: Array, how: dict[str, Any]
) -> tuple[dict[str, Any], oracle_of_masks.Masked | None]:
    """Arguments that say what counts of such an input."""
    groups, channels = how.get("num_groups"), x.shape[how["axis"]]
    groups = groups if channels or groups is None else 0
    return masked(rng, x, how["axis"], groups, how.get("per_group", False))


def group_norm(rng: Random, name: str) -> Call:
    x, how, fold = of_samples(rng, name.partition("_")[0])
    by_mask, counted = _masked(rng, x, how)
    x = spoiled(rng, counted, x)
    weight, bias = pair(rng, fold.parameter_shape)
    eps = draws.eps(rng)
    arguments: dict[str, Any] = {"x": x}
    if "num_groups" in how:
        arguments["num_groups"] = how.pop("num_groups")
    after_it = spoiled_arrays(rng, counted, fused(rng, x))
    inputs = like_output(after_it)
    arguments |= {"weight": weight, "bias": bias, "eps": eps, **how, **after_it, **by_mask}
    forward = name.endswith("forward")

    def expect() -> Expected | Refused:
        refused = counted and refused_mask(counted, x, by_mask, False)
        if refused:
            return refused
        given = (x, fold) if counted is None else (x,)
        normalize = oracle.forward if counted is None else counted.forward
        y, mean, invstd, _ = normalize(*given, weight, bias, eps)
        y = after_statistics(counted, y, x, after_it)
        if not forward or not fold.count or not (counted is None or x.size):
            return Expected({"y": y})
        return Expected({"y": y, "mean": mean, "invstd": invstd})

    channels = None if name.startswith("group") else how["axis"]
    like_x = inputs, inputs, (), channels
    counts = counts_of(counted, x)
    return Call(name, arguments, expect, many if forward else one, *like_x, counts=counts)


def group_norm_backward(rng: Random, name: str) -> Call:
    x, how, fold = of_samples(rng, name.partition("_")[0])
    by_mask, counted = _masked(rng, x, how)
    x = spoiled(rng, counted, x)
    how.pop("num_groups", None)
    dy, (weight, bias) = upstream(rng, x), pair(rng, fold.parameter_shape)
    dy = spoiled(rng, counted, dy)
    given = (x, fold) if counted is None else (x,)
    forward = oracle.forward if counted is None else counted.forward
    found = forward(*given, weight, bias, draws.eps(rng))
    mean, invstd = (draws.saved(rng, each) for each in wide(found.mean, found.invstd))
    after_it = spoiled_arrays(rng, counted, fused_of_gradient(rng, x, bias, found.y))
    inputs = of_gradient(after_it)
    arguments = {"dy": dy, "x": x, "mean": mean, "invstd": invstd, "weight": weight, **how}
    arguments |= after_it | by_mask

    def expect() -> Expected | Refused:
        if counted is not None:
            refused = refused_gradient(after_it) or refused_mask(counted, x, by_mask, False)
            of_counted = dy, x, mean, invstd, weight, bias, after_it
            return refused or Expected(counted.backward(*of_counted))
        given = dy, x, fold, mean, invstd, weight, bias, after_it
        return refused_gradient(after_it) or Expected(oracle_of_activations.backward(*given))

    channels = None if name.startswith("group") else how["axis"]
    like_x = inputs, ("dy", "x"), (), channels, "dy"
    return Call(name, arguments, expect, many, *like_x, counts_of(counted, x))


def response(rng: Random, name: str) -> Call:
    x, axis = draw_x(rng, first=1)
    channels = (x.shape[axis],)
    weight, bias = pair(rng, channels)
    tau = draws.parameter(rng, channels, 0.6)
    learned = draws.parameter(rng, draws.pick(rng, (channels, (1,))), 0.4)
    eps = draws.eps(rng)
    arguments = {"x": x, "weight": weight, "bias": bias, "tau": tau, "eps": eps}
    arguments |= {"learned_eps": learned, "axis": axis}
    forward = name.endswith("forward")

    def expect() -> Expected:
        y, invrms = oracle_of_members.response(x, axis, weight, bias, tau, eps, learned)
        return Expected({"y": y, "invrms": invrms} if forward and x.size else {"y": y})

    return Call(name, arguments, expect, many if forward else one, ("x",), ("x",), (), axis)


def response_backward(rng: Random) -> Call:
    x, axis = draw_x(rng, first=1)
    channels = (x.shape[axis],)
    dy, (weight, bias) = upstream(rng, x), pair(rng, channels)
    tau = draws.parameter(rng, channels, 0.6)
    learned = draws.parameter(rng, draws.pick(rng, (channels, (1,))), 0.4)
    _, inverse = oracle_of_members.response(x, axis, None, None, None, draws.eps(rng), learned)
    invrms = draws.saved(rng, wide(inverse)[0])
    arguments = {"dy": dy, "x": x, "invrms": invrms, "weight": weight, "bias": bias, "tau": tau}
    arguments |= {"learned_eps": learned, "axis": axis}

    def expect() -> Expected:
        found = oracle_of_members.response_backward(dy, x, axis, invrms, weight, bias, tau, learned)
        names = ("dx", "dweight", "dbias", "dtau", "dlearned_eps")
        return Expected(dict(zip(names, found, strict=True)))

    return Call(
        "filter_response_norm_backward",
        arguments,
        expect,
        many,
        ("dy", "x"),
        ("dy", "x"),
        (),
        axis,
    )
