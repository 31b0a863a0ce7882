"""Calls of what has its statistics over a batch, whole or in parts."""

from __future__ import annotations

from typing import Any

import numpy as np

import bnfast
from fuzz import draws, oracle, oracle_of_activations, oracle_of_masks, oracle_of_members
from fuzz.call import (
    Array,
    Call,
    Expected,
    Random,
    Refused,
    Tracked,
    after_statistics,
    carried,
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
    with_saved,
)
from fuzz.judge import DOUBLE, Quantity, arithmetic


def batch_norm(rng: Random, name: str) -> Call:
    conditional, ghost = name.startswith("conditional"), name.startswith("ghost")
    x, axis = draw_x(rng, first=1 if conditional or ghost else 0, full=conditional)
    by_mask, counted = ({}, None) if conditional or ghost else masked(rng, x, axis)
    x = spoiled(rng, counted, x)
    shape, fold = x.shape, oracle.of_channels(x.shape, axis)
    channels = (shape[axis],)
    if conditional:
        fold = oracle.of_conditions(shape, axis)
    training, has_running = draws.chance(rng, 0.6), draws.chance(rng, 0.8)
    weight, bias = pair(rng, fold.parameter_shape)
    has_running = has_running or not training
    mean = draws.running(rng, channels) if has_running else None
    var = draws.running(rng, channels, positive=True) if has_running else None
    size = int(rng.integers(1, shape[0] + 2))
    arguments: dict[str, Any] = {"x": x}
    if ghost:
        arguments["ghost_size"] = size
    order = {"running_mean": mean, "running_var": var, "weight": weight, "bias": bias}
    if conditional:
        order = {name: order[name] for name in ("weight", "bias", "running_mean", "running_var")}
    arguments |= order
    eps, momentum = draws.eps(rng), draws.momentum(rng)
    unbiased = draws.chance(rng, 0.7)
    arguments |= {"training": training, "momentum": momentum, "eps": eps}
    arguments |= {"axis": axis, "unbiased": unbiased}
    after_it = {} if conditional or ghost else spoiled_arrays(rng, counted, fused(rng, x))
    inputs = like_output(after_it)
    arguments |= after_it | by_mask
    parts = oracle.ghosts(shape[0], size) if ghost else [slice(None)]

    def expect() -> Expected | Refused:
        if not training:
            y = oracle.evaluate(x, fold, mean, var, weight, bias, eps)
            return Expected({"y": after_statistics(counted, y, x, after_it)})
        outputs, running = [], (mean, var)
        for part in parts:
            folded = fold._replace(shape=x[part].shape)
            if has_running and unbiased and folded.count == 1:
                return Refused(("x", *by_mask), x.size > 0)
        if counted is not None:
            of_all = x, weight, bias, eps, after_it, by_mask, (mean, var) if has_running else ()
            expected = _by_mask(counted, *of_all, momentum, unbiased)
            if isinstance(expected, Refused):
                return expected
            return expected._replace(returned={"y": expected.returned["y"]})
        updated = None
        for part in parts:
            folded = fold._replace(shape=x[part].shape)
            found = oracle.forward(x[part], folded, weight, bias, eps)
            outputs.append(found.y)
            if has_running and x.size:
                now = tracked(found.of, folded, x, *running, momentum, unbiased)
                if updated is not None:
                    now = carried(updated, now, momentum)
                updated = now
                running = tuple(q.value.astype(q.dtype) for q in now)
        y = oracle.concatenated(outputs) if outputs else None
        after = Tracked(*unchanged(mean, var)) if has_running else None
        if y is None:
            y = Quantity(x.astype(oracle.WIDE), {}, x.dtype, x.dtype)
        y = oracle.activated(y, after_it) if after_it else y
        after = updated or after
        if after is None:
            return Expected({"y": y})
        return Expected({"y": y}, {"running_mean": after.mean, "running_var": after.var})

    changed = ("running_mean", "running_var") if training and has_running else ()
    counts = counts_of(counted, x)
    return Call(name, arguments, expect, one, inputs, inputs, changed, axis, counts=counts)


def _by_mask(
    counted: oracle_of_masks.Masked,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    after_it: dict[str, Any],
    by_mask: dict[str, Any],
    running: tuple[Array, ...],
    momentum: float,
    unbiased: bool,
) -> Expected | Refused:
    """What comes of the statistics of the values that count."""
    refused = refused_mask(counted, x, by_mask, bool(running) and unbiased)
    if refused:
        return refused
    y, mean, invstd, of = counted.forward(x, weight, bias, eps)
    y = after_statistics(counted, y, x, after_it)
    returned = {"y": y, "mean": mean, "invstd": invstd} if x.size else {"y": y}
    if not running:
        return Expected(returned)
    after = unchanged(*running)
    if x.size:
        after = counted.tracked(of, x, running, momentum, unbiased)
    return Expected(returned, dict(zip(("running_mean", "running_var"), after, strict=True)))


def batch_norm_forward(rng: Random, name: str) -> Call:
    conditional = name.startswith("conditional")
    x, axis = draw_x(rng, first=1 if conditional else 0, full=conditional)
    by_mask, counted = ({}, None) if conditional else masked(rng, x, axis)
    x = spoiled(rng, counted, x)
    fold = (oracle.of_conditions if conditional else oracle.of_channels)(x.shape, axis)
    weight, bias = pair(rng, fold.parameter_shape)
    eps = draws.eps(rng)
    after_it = {} if conditional else spoiled_arrays(rng, counted, fused(rng, x))
    inputs = like_output(after_it)
    arguments = {"x": x, "weight": weight, "bias": bias, "eps": eps, "axis": axis, **after_it}
    arguments |= by_mask
    running, momentum, unbiased = (), draws.momentum(rng), draws.chance(rng, 0.7)
    if not conditional and draws.chance(rng, 0.5):
        channels = (x.shape[axis],)
        running = draws.running(rng, channels), draws.running(rng, channels, positive=True)
        arguments |= {"running_mean": running[0], "running_var": running[1]}
        arguments |= {"momentum": momentum, "unbiased": unbiased}

    def expect() -> Expected | Refused:
        if running and unbiased and fold.count == 1:
            return Refused(("x", *by_mask), x.size > 0)
        if counted is not None:
            of_all = x, weight, bias, eps, after_it, by_mask, running
            return _by_mask(counted, *of_all, momentum, unbiased)
        y, mean, invstd, of = oracle.forward(x, fold, weight, bias, eps)
        y = oracle.activated(y, after_it) if after_it else y
        returned = {"y": y, "mean": mean, "invstd": invstd} if fold.count else {"y": y}
        if not running:
            return Expected(returned)
        after = unchanged(*running)
        if x.size:
            after = tracked(of, fold, x, *running, momentum, unbiased)
        return Expected(returned, dict(zip(("running_mean", "running_var"), after, strict=True)))

    changed = ("running_mean", "running_var") if running else ()
    counts = counts_of(counted, x)
    return Call(name, arguments, expect, many, inputs, inputs, changed, axis, counts=counts)


def batch_norm_backward(rng: Random, name: str) -> Call:
    conditional = name.startswith("conditional")
    x, axis = draw_x(rng, first=1 if conditional else 0, full=conditional)
    by_mask, counted = ({}, None) if conditional else masked(rng, x, axis)
    x = spoiled(rng, counted, x)
    fold = (oracle.of_conditions if conditional else oracle.of_channels)(x.shape, axis)
    dy, training = spoiled(rng, counted, upstream(rng, x)), draws.chance(rng, 0.7)
    weight, bias = pair(rng, fold.parameter_shape)
    if training:
        given = (x, fold) if counted is None else (x,)
        forward = oracle.forward if counted is None else counted.forward
        found = forward(*given, weight, bias, draws.eps(rng))
        y, (mean, invstd) = found.y, (draws.saved(rng, a) for a in wide(found.mean, found.invstd))
    else:
        mean = draws.running(rng, (x.shape[axis],))
        invstd = draws.running(rng, (x.shape[axis],), positive=True)
        with np.errstate(all="ignore"):
            variance = invstd.astype(oracle.WIDE) ** -2
        y = oracle.evaluate(x, fold, mean, variance, weight, bias, 0.0)
    arguments = {"dy": dy, "x": x, "mean": mean, "invstd": invstd, "weight": weight}
    arguments |= {"axis": axis, "training": training}
    after_it = {}
    if not conditional:
        after_it = spoiled_arrays(rng, counted, fused_of_gradient(rng, x, bias, y))
    inputs = of_gradient(after_it)
    arguments |= after_it | by_mask

    def expect() -> Expected | Refused:
        if counted is not None:
            refused = refused_gradient(after_it)
            if training:
                refused = refused or refused_mask(counted, x, by_mask, False)
            given = dy, x, mean, invstd, weight, bias, after_it
            return refused or Expected(counted.backward(*given, constant=not training))
        if after_it:
            given = dy, x, fold, mean, invstd, weight, bias, after_it
            refused = refused_gradient(after_it)
            return refused or Expected(
                oracle_of_activations.backward(*given, constant=not training)
            )
        found = oracle.backward(
            dy,
            x,
            fold,
            mean,
            invstd,
            weight,
            constant=not training,
            mean_is_whole=not (conditional and x.dtype == DOUBLE),
        )
        return Expected(found._asdict())

    in_place = ("dy",) if conditional and training else ("dy", "x")
    counts = counts_of(counted, x)
    return Call(name, arguments, expect, many, inputs, in_place, (), axis, "dy", counts)


def batch_norm_halves(rng: Random, name: str) -> Call:
    """The sums of a gradient, and dx from sums that are known."""
    x, axis = draw_x(rng)
    fold = oracle.of_channels(x.shape, axis)
    dy, weight = upstream(rng, x), draws.parameter(rng, fold.parameter_shape)
    found = oracle.forward(x, fold, None, None, draws.eps(rng))
    mean, invstd = (draws.saved(rng, each) for each in wide(found.mean, found.invstd))
    given = dy, x, fold, mean, invstd, weight
    arguments = {"dy": dy, "x": x, "mean": mean, "invstd": invstd}
    if name.endswith("sums"):

        def expect() -> Expected:
            gradients = oracle.backward(*given, dtype=DOUBLE)
            return Expected({"sum_dy": gradients.dbias, "sum_dy_xhat": gradients.dweight})

        return Call(name, arguments | {"axis": axis}, expect, many, ("dy", "x"), (), (), axis)

    sums = oracle.backward(*given, dtype=DOUBLE)
    sum_dy, sum_dy_xhat = wide(sums.dbias, sums.dweight)
    arguments |= {"weight": weight, "sum_dy": sum_dy, "sum_dy_xhat": sum_dy_xhat}
    arguments |= {"count": max(fold.count, 1), "axis": axis}

    def expect_dx() -> Expected:
        return Expected({"dx": oracle.backward(*given).dx})

    return Call(name, arguments, expect_dx, one, ("dy", "x"), ("dy", "x"), (), axis)


def moments(rng: Random) -> Call:
    x, axis = draw_x(rng)
    fold = oracle.of_channels(x.shape, axis)

    def expect() -> Expected:
        of = oracle.statistics(x, fold)
        if not fold.count:
            zero = Quantity(np.zeros(x.shape[axis], oracle.WIDE), {}, DOUBLE, DOUBLE)
            return Expected({"mean": zero, "m2": zero})
        m2 = fold.statistic(of.var) * fold.count
        size = fold.statistic(oracle.unjudged(of.var, of.usable)) * fold.count
        return Expected(
            {
                "mean": oracle.mean_of(of, fold, x.dtype),
                "m2": Quantity(m2, {"statistics": size}, x.dtype, DOUBLE),
            }
        )

    return Call(
        "moments", {"x": x, "axis": axis}, expect, lambda m: (m.mean, m.m2), ("x",), (), (), axis
    )


def summary(rng: Random) -> Call:
    call = moments(rng)
    x, axis = call.arguments["x"], call.arguments["axis"]
    others = tuple(d for d in range(x.ndim) if d != axis % x.ndim)

    def expect() -> Expected:
        wide = x.astype(DOUBLE)
        with np.errstate(invalid="ignore"):
            extremes = {
                "minimum": np.fmin.reduce(wide, others, initial=np.nan),
                "maximum": np.fmax.reduce(wide, others, initial=np.nan),
                "nonfinite": (~np.isfinite(x)).sum(others),
            }
        exact = {
            name: Quantity(value.astype(oracle.WIDE), {}, DOUBLE, DOUBLE)
            for name, value in extremes.items()
        }
        return Expected({**call.expect().returned, **exact})

    return call._replace(
        name="summary",
        expect=expect,
        unpack=lambda s: (s.mean, s.m2, s.minimum, s.maximum, s.nonfinite.astype(np.float64)),
    )


def ghost_forward(rng: Random) -> Call:
    x, axis = draw_x(rng, first=1)
    channels = (x.shape[axis],)
    weight, bias = pair(rng, channels)
    size, eps = int(rng.integers(1, x.shape[0] + 2)), draws.eps(rng)
    arguments = {"x": x, "ghost_size": size, "weight": weight, "bias": bias, "eps": eps}
    arguments |= {"axis": axis}

    def expect() -> Expected:
        parts = [x[part] for part in oracle.ghosts(len(x), size)]
        found = [
            oracle.forward(part, oracle.of_channels(part.shape, axis), weight, bias, eps)
            for part in parts
        ]
        if not x.size:
            return Expected({"y": Quantity(x.astype(oracle.WIDE), {}, x.dtype, x.dtype)})
        return Expected(
            {
                "y": oracle.concatenated([each.y for each in found]),
                "mean": oracle.concatenated([each.mean for each in found], np.stack),
                "invstd": oracle.concatenated([each.invstd for each in found], np.stack),
            }
        )

    return Call("ghost_batch_norm_forward", arguments, expect, many, ("x",), ("x",), (), axis)


def ghost_backward(rng: Random) -> Call:
    x, axis = draw_x(rng, first=1)
    channels = (x.shape[axis],)
    dy, weight = upstream(rng, x), draws.parameter(rng, channels)
    size = int(rng.integers(1, x.shape[0] + 2))
    parts = oracle.ghosts(len(x), size)
    folds = [oracle.of_channels(x[part].shape, axis) for part in parts]
    eps = draws.eps(rng)
    each = [
        wide(*oracle.forward(x[part], fold, None, None, eps)[1:3])
        for part, fold in zip(parts, folds, strict=True)
    ]
    stacked = np.array(each).reshape(len(parts), 2, *channels)
    mean, invstd = (draws.saved(rng, stacked[:, k]) for k in (0, 1))
    arguments = {"dy": dy, "x": x, "ghost_size": size, "mean": mean, "invstd": invstd}
    arguments |= {"weight": weight, "axis": axis}

    def expect() -> Expected:
        result = arithmetic(x.dtype) if weight is None else weight.dtype
        found = [
            oracle.backward(dy[part], x[part], fold, mean[k], invstd[k], weight)
            for k, (part, fold) in enumerate(zip(parts, folds, strict=True))
        ]
        if not found:
            empty = Quantity(x.astype(oracle.WIDE), {}, x.dtype, x.dtype)
            zero = Quantity(np.zeros(channels, oracle.WIDE), {}, x.dtype, result)
            return Expected({"dx": empty, "dweight": zero, "dbias": zero})
        return Expected(
            {
                "dx": oracle.concatenated([gradients.dx for gradients in found]),
                "dweight": oracle.added([gradients.dweight for gradients in found]),
                "dbias": oracle.added([gradients.dbias for gradients in found]),
            }
        )

    return Call(
        "ghost_batch_norm_backward", arguments, expect, many, ("dy", "x"), ("dy", "x"), (), axis
    )


def renorm(rng: Random, name: str) -> Call:
    x, axis = draw_x(rng)
    fold, channels = oracle.of_channels(x.shape, axis), (x.shape[axis],)
    weight, bias = pair(rng, channels)
    mean, std = draws.running(rng, channels), draws.running(rng, channels, positive=True)
    forward = name.endswith("forward")
    training = forward or draws.chance(rng, 0.6)
    momentum, eps = draws.momentum(rng), draws.eps(rng)
    r_max, d_max = draws.pick(rng, ((1.0, 0.0), (3.0, 5.0), (1.5, 0.5), (100.0, 1000.0)))
    arguments = {"x": x, "running_mean": mean, "running_std": std, "weight": weight, "bias": bias}
    if not forward:
        arguments["training"] = training
    arguments |= {"momentum": momentum, "eps": eps, "r_max": r_max, "d_max": d_max, "axis": axis}

    def expect() -> Expected:
        if not training:
            variance = std.astype(oracle.WIDE) ** 2
            return Expected({"y": oracle.evaluate(x, fold, mean, variance, weight, bias, 0.0)})
        found = oracle_of_members.corrected(x, fold, mean, std, weight, bias, eps, r_max, d_max)
        returned = found._asdict()
        sigma = returned.pop("sigma")
        if not forward or not x.size:
            returned = {"y": found.y}
        after = unchanged(mean, std)
        if x.size:
            size = sigma + 0 * found.invstd.sizes["statistics"]
            after = [
                oracle.blended(
                    mean, found.mean.value, momentum, found.mean.sizes["statistics"], x.dtype
                ),
                oracle.blended(std, sigma, momentum, size, x.dtype),
            ]
        return Expected(returned, dict(zip(("running_mean", "running_std"), after, strict=True)))

    changed = ("running_mean", "running_std") if training else ()
    unpack = with_saved if forward else one
    return Call(name, arguments, expect, unpack, ("x",), ("x",), changed, axis)


def renorm_backward(rng: Random) -> Call:
    x, axis = draw_x(rng)
    fold, channels = oracle.of_channels(x.shape, axis), (x.shape[axis],)
    dy, weight = upstream(rng, x), draws.parameter(rng, channels)
    found = oracle_of_members.corrected(
        x,
        fold,
        rng.normal(size=channels),
        rng.uniform(0.5, 2, channels),
        None,
        None,
        draws.eps(rng),
        3.0,
        5.0,
    )
    saved = bnfast.Renormalized(*wide(found.mean, found.invstd, found.r, found.d))
    arguments = {"dy": dy, "x": x, "saved": saved, "weight": weight, "axis": axis}

    def expect() -> Expected:
        gradients = oracle_of_members.corrected_backward(dy, x, fold, *saved, weight)
        return Expected(gradients._asdict())

    return Call(
        "batch_renorm_backward", arguments, expect, many, ("dy", "x"), ("dy", "x"), (), axis
    )
