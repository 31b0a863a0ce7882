"""Calls of what whitens."""

from __future__ import annotations

from typing import Any

import numpy as np

import bnfast
from fuzz import draws, oracle, oracle_of_whitening
from fuzz.call import (
    Array,
    Call,
    Expected,
    Random,
    many,
    one,
    pair,
    unchanged,
    upstream,
    with_saved,
)
from fuzz.judge import DOUBLE, Quantity


def _draw_groups(rng: Random) -> tuple[Array, int, int]:
    groups, each = draws.pick(rng, (1, 1, 2, 3)), draws.pick(rng, (1, 2, 3, 4, 5))
    ndim = int(rng.integers(2, 5))
    axis = draws.axis(rng, ndim)
    sizes = [int(rng.integers(1, 9)) for _ in range(ndim)]
    sizes[axis] = groups * each
    if draws.chance(rng, draws.RARELY):
        sizes[(axis + 1) % ndim] = 0
    draw = draws.mild_values if draws.chance(rng, 0.85) else draws.values
    return draw(rng, tuple(sizes), draws.dtype(rng)), axis, groups


def _whiten_eps(rng: Random) -> float:
    return draws.pick(rng, (1e-5, 1e-3, 1e-1, 1.0))


def _iterations(rng: Random, name: str) -> tuple[int | None, dict[str, Any]]:
    if not name.startswith("iterative"):
        return None, {}
    number = draws.pick(rng, (1, 3, 5, 7))
    return number, {"iterations": number}


def whitening(rng: Random, name: str) -> Call:
    x, axis, groups = _draw_groups(rng)
    each, channels = x.shape[axis] // groups, (x.shape[axis],)
    weight, bias = pair(rng, channels)
    iterations, more = _iterations(rng, name)
    training, has_running = draws.chance(rng, 0.6), draws.chance(rng, 0.7)
    has_running = has_running or not training
    mean = draws.running(rng, channels) if has_running else None
    matrix = _running_matrix(rng, groups, each) if has_running else None
    momentum, eps = draws.momentum(rng), _whiten_eps(rng)
    averaged = draws.pick(rng, ("whitening", "covariance"))
    arguments = {"x": x, "running_mean": mean, "running_matrix": matrix, "weight": weight}
    arguments |= {"bias": bias, "training": training, "momentum": momentum, "eps": eps, **more}
    arguments |= {"num_groups": groups, "averaged": averaged, "axis": axis}

    def expect() -> Expected:
        empty = Quantity(x.astype(oracle.WIDE), {}, x.dtype, x.dtype)
        if not x.size:
            after = unchanged(mean, matrix) if training and has_running else []
            names = ("running_mean", "running_matrix")
            return Expected({"y": empty}, dict(zip(names, after, strict=False)))
        if not training:
            by = oracle_of_whitening.evaluation_of(mean, matrix, averaged, eps, iterations)
            return Expected({"y": oracle_of_whitening.whitened(x, axis, by, weight, bias)})
        by = oracle_of_whitening.whitening(x, axis, groups, eps, iterations)
        y = oracle_of_whitening.whitened(x, axis, by, weight, bias)
        if not has_running:
            return Expected({"y": y})
        after = oracle_of_whitening.tracked_matrix(by, x, mean, matrix, momentum, averaged)
        return Expected({"y": y}, after)

    changed = ("running_mean", "running_matrix") if training and has_running else ()
    return Call(name, arguments, expect, one, ("x",), ("x",), changed)


def _running_matrix(rng: Random, groups: int, each: int) -> Array:
    """Positive definite ones."""
    roots = rng.normal(size=(groups, each, each))
    matrix = roots @ roots.transpose(0, 2, 1) + np.eye(each)
    return np.ascontiguousarray(matrix, draws.dtype(rng))


def whitening_forward(rng: Random, name: str) -> Call:
    x, axis, groups = _draw_groups(rng)
    weight, bias = pair(rng, (x.shape[axis],))
    iterations, more = _iterations(rng, name)
    eps = _whiten_eps(rng)
    arguments = {"x": x, "weight": weight, "bias": bias, "eps": eps, **more}
    arguments |= {"num_groups": groups, "axis": axis}

    def expect() -> Expected:
        if not x.size:
            return Expected({"y": Quantity(x.astype(oracle.WIDE), {}, x.dtype, x.dtype)})
        by = oracle_of_whitening.whitening(x, axis, groups, eps, iterations)
        size = np.abs(x.astype(DOUBLE)).max(initial=0) * np.ones(x.shape[axis])
        mean = Quantity(by.mean.reshape(-1).astype(oracle.WIDE), {"matrices": size}, DOUBLE, DOUBLE)
        return Expected(
            {
                "y": oracle_of_whitening.whitened(x, axis, by, weight, bias),
                "mean": mean,
                "matrix": oracle_of_whitening.matrices(by.matrix, by),
            }
        )

    return Call(name, arguments, expect, with_saved, ("x",), ("x",))


def whitening_backward(rng: Random, name: str) -> Call:
    x, axis, groups = _draw_groups(rng)
    each, dy = x.shape[axis] // groups, upstream(rng, x)
    weight = draws.parameter(rng, (x.shape[axis],))
    iterations, _ = _iterations(rng, name)
    eps, training = _whiten_eps(rng), draws.chance(rng, 0.7) and x.size > 0
    kind = bnfast.Whitened if iterations is None else bnfast.IterativelyWhitened
    if training:
        by = oracle_of_whitening.whitening(x, axis, groups, eps, iterations)
        more = {} if iterations is None else {"iterations": iterations}
        saved = kind.of_covariance(by.mean.reshape(-1), by.covariance, eps, **more)
    else:
        mean, matrix = draws.running(rng, (x.shape[axis],)), _running_matrix(rng, groups, each)
        by = oracle_of_whitening.evaluation_of(mean, matrix, "whitening", eps, iterations)
        saved = kind(by.mean, by.matrix)
    arguments = {"dy": dy, "x": x, "saved": saved, "weight": weight, "axis": axis}
    arguments["training"] = training

    def expect() -> Expected:
        names = ("dx", "dweight", "dbias")
        found = oracle_of_whitening.gradients(
            dy, x, axis, by, weight, eps, iterations, not training
        )
        return Expected(dict(zip(names, found, strict=True)))

    return Call(name, arguments, expect, many, ("dy", "x"), ("dy", "x"))
