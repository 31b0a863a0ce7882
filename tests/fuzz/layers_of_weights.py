"""Layers of weights rather than data."""

from __future__ import annotations

from typing import Any

import numpy as np

from fuzz import draws, oracle, oracle_of_members
from fuzz.call import Array, Random
from fuzz.judge import Quantity
from fuzz.layer import Plan, Step, copies, dtypes_of, gradients_by_name, loosened
from fuzz.layer_draws import constructor


def _filters(rng: Random) -> tuple[tuple[int, ...], int, np.dtype]:
    ndim = int(rng.integers(2, 5))
    shape = tuple(int(rng.integers(2, 7)) for _ in range(ndim))
    return shape, draws.pick(rng, (0, ndim - 1, -1)), draws.dtype(rng)


def standardization(rng: Random, name: str) -> Plan:
    shape, axis, _ = _filters(rng)
    if name.startswith("Scaled"):
        gamma, floor = draws.pick(rng, (1.0, 1.7)), draws.chance(rng, 0.6)
        rule = oracle_of_members.Rule(1e-4, gamma=gamma, floor=floor)
        more = {"gamma": gamma, "eps": 1e-4, "floor": floor}
    else:
        rule = oracle_of_members.Rule(1e-5, draws.chance(rng, 0.6), draws.chance(rng, 0.4))
        more = {"eps": 1e-5, "eps_inside": rule.inside, "unbiased": rule.unbiased}
    make, text = constructor(
        name, shape[axis], gain=draws.chance(rng, 0.6), axis=axis, dtype=draws.dtype(rng), **more
    )

    def inputs(rng: Random) -> tuple[Any, ...]:
        return (draws.values(rng, shape, draws.dtype(rng)),)

    def step(layer: Any, w: Array) -> Step:
        (gain,) = copies(layer.gain)
        y, mean, std = oracle_of_members.standardized(w, axis, gain, rule)

        def gradients(dy: Array) -> dict[str, Quantity | None]:
            found = oracle_of_members.standardized_backward(
                dy, w, axis, mean.value, std.value, gain, rule
            )
            return gradients_by_name(found, ("gain",), dtypes_of(layer, ("gain",)))

        return Step(y, {}, 0, gradients)

    return Plan(make, inputs, step, text)


def weight_norm(rng: Random) -> Plan:
    shape, axis, dtype = _filters(rng)
    dim = draws.pick(rng, (None, axis % len(shape)))
    eps = draws.pick(rng, (0.0, 1e-3))
    make, text = constructor("WeightNorm", draws.mild_values(rng, shape, dtype), dim, eps)

    def step(layer: Any) -> Step:
        v, g = layer.v.copy(), layer.g.copy()
        y = oracle_of_members.with_lengths(v, g, dim, eps)

        def gradients(dy: Array) -> dict[str, Quantity | None]:
            norm = oracle_of_members.lengths(v, dim).value
            dv, dg = oracle_of_members.with_lengths_backward(dy, v, g, norm, dim, eps)
            return {"dx": loosened(dv), "g_grad": loosened(dg), "v_grad": loosened(dv)}

        return Step(y, {}, 0, gradients)

    return Plan(make, lambda rng: (), step, text)


def spectral(rng: Random) -> Plan:
    shape, dim, dtype = _filters(rng)
    first = draws.mild_values(rng, shape, dtype)
    iterations, v_first = int(rng.integers(1, 4)), draws.chance(rng, 0.4)
    make, text = constructor("SpectralNorm", first, iterations, dim=dim, v_first=v_first)

    def inputs(rng: Random) -> tuple[Any, ...]:
        return (draws.mild_values(rng, shape, draws.dtype(rng)),)

    def step(layer: Any, w: Array) -> Step:
        u, v = copies(layer.u, layer.v)
        number = iterations if layer.training else 0
        found = oracle_of_members.divided(w, u, v, number, layer.eps, dim, v_first)
        updated = {}
        if layer.training:
            updated = {name: getattr(found, name)._replace(dtype=u.dtype) for name in ("u", "v")}

        def gradients(dy: Array) -> dict[str, Quantity | None]:
            dw = oracle_of_members.divided_backward(
                dy, w, found.sigma.value, found.u.value, found.v.value, layer.eps, dim
            )
            doubtful = np.isinf(np.asarray(found.sigma.sizes["matrices"]))
            sizes = {kind: oracle.unjudged(s, ~doubtful) for kind, s in dw.sizes.items()}
            return {"dx": loosened(dw._replace(sizes=sizes))}

        return Step(found.y, updated, 0, gradients)

    return Plan(make, inputs, step, text)
