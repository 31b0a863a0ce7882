"""Calls of what normalizes weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from fuzz import draws, oracle, oracle_of_members
from fuzz.call import Array, Call, Expected, Random, Refused, draw_x, many, one, upstream, wide
from fuzz.judge import Quantity


def _draw_filters(rng: Random) -> tuple[Array, int]:
    x, axis = draw_x(rng, full=True)
    return x, draws.pick(rng, (0, axis))


def weight_norm(rng: Random, name: str) -> Call:
    v, axis = _draw_filters(rng)
    dim = draws.pick(rng, (None, axis % v.ndim, 0))
    g = _lengths_given(rng, v, dim)
    eps = draws.pick(rng, (0.0, 0.0, 1e-12, 1e-3, 10.0))
    arguments = {"v": v, "g": g, "dim": dim, "eps": eps}
    forward = name.endswith("forward")

    def expect() -> Expected:
        w, norm = oracle_of_members.with_lengths(v, g, dim, eps), oracle_of_members.lengths(v, dim)
        return Expected({"w": w, "norm": norm} if forward else {"w": w})

    unpack = many if forward else one
    return Call(name, arguments, expect, unpack, ("v",), ("v",), (), dim)


def _lengths_given(rng: Random, v: Array, dim: int | None) -> Array:
    if dim is None:
        shape: tuple[int, ...] = draws.pick(rng, ((), (1,)))
    else:
        whole = tuple(n if d == dim else 1 for d, n in enumerate(v.shape))
        shape = draws.pick(rng, ((v.shape[dim],), whole))
    return draws.running(rng, shape)


def weight_norm_backward(rng: Random) -> Call:
    v, axis = _draw_filters(rng)
    dim = draws.pick(rng, (None, axis % v.ndim, 0))
    g, dw = _lengths_given(rng, v, dim), upstream(rng, v)
    eps = draws.pick(rng, (0.0, 0.0, 1e-12, 1e-3, 10.0))
    norm = draws.saved(rng, wide(oracle_of_members.lengths(v, dim))[0])
    arguments = {"dw": dw, "v": v, "g": g, "norm": norm, "dim": dim, "eps": eps}

    def expect() -> Expected:
        dv, dg = oracle_of_members.with_lengths_backward(dw, v, g, norm, dim, eps)
        return Expected({"dv": dv, "dg": dg})

    return Call("weight_norm_backward", arguments, expect, many, ("dw", "v"), ("dw", "v"), (), dim)


def _rule(rng: Random, scaled: bool) -> tuple[oracle_of_members.Rule, dict[str, Any]]:
    """How filters are standardized, and the arguments that say so."""
    eps = draws.pick(rng, (1e-5, 1e-5, 1e-4, 1e-3, 1e-12, 0.0))
    if scaled:
        gamma, floor = draws.pick(rng, (1.0, 1.7139588594436646, 0.3)), draws.chance(rng, 0.6)
        rule = oracle_of_members.Rule(eps, gamma=gamma, floor=floor)
        return rule, {"gamma": gamma, "eps": eps, "floor": floor}
    inside, unbiased = draws.chance(rng, 0.6), draws.chance(rng, 0.4)
    rule = oracle_of_members.Rule(eps, inside, unbiased)
    return rule, {"eps": eps, "eps_inside": inside, "unbiased": unbiased}


def standardization(rng: Random, name: str) -> Call:
    w, axis = _draw_filters(rng)
    rule, how = _rule(rng, name.startswith("scaled"))
    gain = draws.parameter(rng, (w.shape[axis],), 0.6)
    arguments = {"w": w, "gain": gain, **how, "axis": axis}
    forward = name.endswith("forward")

    def expect() -> Expected | Refused:
        values = w.size // max(w.shape[axis], 1)
        if rule.unbiased and values == 1:
            return Refused(("w",))
        if not values or not w.size:
            return Expected({"y": Quantity(w.astype(oracle.WIDE), {}, w.dtype, w.dtype)})
        y, mean, std = oracle_of_members.standardized(w, axis, gain, rule)
        return Expected({"y": y, "mean": mean, "std": std} if forward else {"y": y})

    unpack = many if forward else one
    return Call(name, arguments, expect, unpack, ("w",), ("w",), (), axis)


def standardization_backward(rng: Random, name: str) -> Call:
    w, axis = _draw_filters(rng)
    rule, how = _rule(rng, name.startswith("scaled"))
    gain, dy = draws.parameter(rng, (w.shape[axis],), 0.6), upstream(rng, w)
    values = w.size // max(w.shape[axis], 1)
    if rule.unbiased and values < 2:
        mean, std = np.zeros(w.shape[axis]), np.ones(w.shape[axis])
    else:
        found = oracle_of_members.standardized(w, axis, None, rule)[1:]
        mean, std = (draws.saved(rng, each) for each in wide(*found))
    arguments = {"dy": dy, "w": w, "mean": mean, "std": std, "gain": gain, **how, "axis": axis}

    def expect() -> Expected | Refused:
        if rule.unbiased and values == 1 and w.size:
            return Refused(("w",))
        if not w.size:
            return Expected({"dw": Quantity(w.astype(oracle.WIDE), {}, w.dtype, w.dtype)})
        dw, dgain = oracle_of_members.standardized_backward(dy, w, axis, mean, std, gain, rule)
        return Expected({"dw": dw, "dgain": dgain})

    return Call(name, arguments, expect, many, ("dy", "w"), ("dy", "w"), (), axis)


def centralization(rng: Random, name: str) -> Call:
    """The gradient is the same function."""
    w, axis = _draw_filters(rng)
    given = "dy" if name.endswith("backward") else "w"

    def expect() -> Expected:
        y, mean = oracle_of_members.centralized(w, axis)
        return Expected({"y": y, "mean": mean} if name.endswith("forward") else {"y": y})

    arguments = {given: w, "axis": axis}
    unpack = many if name.endswith("forward") else one
    return Call(name, arguments, expect, unpack, (given,), (given,), (), axis)


def _vectors(rng: Random, w: Array, dim: int) -> tuple[Array, Array]:
    return tuple(
        draws.running(rng, (n,), full=True) for n in oracle_of_members.matrix(w, dim).shape
    )


def _draw_matrix(rng: Random) -> tuple[Array, int]:
    """Mostly of moderate values: the rest is for what must not crash."""
    ndim = int(rng.integers(2, 5))
    shape, dtype = draws.shape(rng, ndim, ndim), draws.dtype(rng)
    draw = draws.mild_values if draws.chance(rng, 0.8) else draws.values
    return draw(rng, shape, dtype), int(rng.integers(-ndim, ndim))


def spectral(rng: Random, name: str) -> Call:
    w, dim = _draw_matrix(rng)
    u, v = _vectors(rng, w, dim)
    iterations, v_first = int(rng.integers(0, 4)), draws.chance(rng, 0.4)
    eps = draws.pick(rng, (1e-12, 1e-12, 1e-6))
    arguments = {"w": w, "u": u, "v": v, "n_power_iterations": iterations, "eps": eps}
    arguments |= {"dim": dim, "v_first": v_first}
    forward = name.endswith("forward")

    def expect() -> Expected:
        if not w.size:
            return Expected({"y": Quantity(w.astype(oracle.WIDE), {}, w.dtype, w.dtype)})
        found = oracle_of_members.divided(w, u, v, iterations, eps, dim, v_first)
        if forward:
            return Expected(found._asdict())
        after = {"u": found.u._replace(dtype=u.dtype), "v": found.v._replace(dtype=v.dtype)}
        return Expected({"y": found.y}, after)

    changed = () if forward or not iterations else ("u", "v")
    unpack = many if forward else one
    return Call(name, arguments, expect, unpack, ("w",), ("w",), changed)


def spectral_backward(rng: Random) -> Call:
    w, dim = _draw_matrix(rng)
    u, v = _vectors(rng, w, dim)
    if w.size:
        found = oracle_of_members.divided(w, u, v, 3, 1e-12, dim, False)
        of_sigma, u, v = wide(*found[1:])
        sigma = float(of_sigma)
    else:
        sigma = 1.0
    dy, eps = upstream(rng, w), 1e-12
    arguments = {"dy": dy, "w": w, "sigma": sigma, "u": u, "v": v, "eps": eps, "dim": dim}

    def expect() -> Expected:
        dw = oracle_of_members.divided_backward(dy, w, sigma, u, v, eps, dim)
        return Expected({"dw": dw})

    return Call("spectral_norm_backward", arguments, expect, one, ("dy", "w"), ("dy", "w"))
