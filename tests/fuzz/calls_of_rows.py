"""Calls of what normalizes rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from fuzz import draws, oracle, oracle_of_activations
from fuzz.call import (
    Array,
    Call,
    Expected,
    Random,
    Refused,
    fused,
    fused_of_gradient,
    like_output,
    many,
    of_gradient,
    one,
    pair,
    refused_gradient,
    upstream,
    wide,
)
from fuzz.judge import arithmetic


def of_rows(rng: Random, *, full: bool = False) -> tuple[Array, dict[str, Any], oracle.Fold]:
    """An input, with the arguments that say which axes make a row; a `full` one has no 16 bits."""
    ndim = int(rng.integers(1, 7))
    dtype = draws.dtype(rng) if full else draws.data_dtype(rng)
    x = draws.values(rng, draws.shape(rng, ndim, ndim, (ndim - 1, 1)), dtype)
    if draws.chance(rng, 0.5):
        number = int(rng.integers(1, ndim + 1))
        axes, given = tuple(range(ndim - number, ndim)), None
    else:
        number = int(rng.integers(1, min(ndim, 3) + 1))
        axes = tuple(int(d) for d in rng.permutation(ndim)[:number])
        given = tuple(d - ndim if draws.chance(rng, 0.3) else d for d in axes)
    sizes: Any = tuple(x.shape[d] for d in axes)
    if len(axes) == 1 and draws.chance(rng, 0.5):
        sizes, given = sizes[0], None if given is None else given[0]
    elif draws.chance(rng, 0.3):
        sizes = list(sizes)
    return x, {"normalized_shape": sizes, "axis": given}, oracle.of_rows(x.shape, axes)


def _row_eps(rng: Random, rms: bool, dtype: np.dtype) -> tuple[Any, float]:
    """As given, and as a number."""
    if rms and draws.chance(rng, 0.5):
        return None, float(np.finfo(arithmetic(dtype)).eps)
    eps = draws.eps(rng)
    return eps, eps


def row_norm(rng: Random, name: str) -> Call:
    x, how, fold = of_rows(rng)
    rms, forward = name.startswith("rms"), name.endswith("forward")
    weight, bias = pair(rng, fold.parameter_shape)
    eps, number = _row_eps(rng, rms, x.dtype)
    arguments = {"x": x, "normalized_shape": how["normalized_shape"], "weight": weight}
    if rms:
        bias = None
    else:
        arguments["bias"] = bias
    after_it = fused(rng, x)
    arguments |= {"eps": eps, "axis": how["axis"], **after_it}
    inputs = like_output(after_it)

    def expect() -> Expected:
        y, mean, invstd, _ = oracle.forward(x, fold, *_rounded(x, weight, bias), number, not rms)
        if after_it:
            y = oracle.activated(y, after_it)
        if not forward or not fold.count:
            return Expected({"y": y})
        saved = {"invrms": invstd} if rms else {"mean": mean, "invstd": invstd}
        return Expected({"y": y, **saved})

    return Call(name, arguments, expect, many if forward else one, inputs, inputs)


def _rounded(x: Array, *parameters: Array | None) -> list[Array | None]:
    """Parameters of elements as they are computed with."""
    return [p if p is None else p.astype(arithmetic(x.dtype)) for p in parameters]


def row_norm_backward(rng: Random, name: str) -> Call:
    x, how, fold = of_rows(rng)
    rms = name.startswith("rms")
    dy, (weight, bias) = upstream(rng, x), pair(rng, fold.parameter_shape)
    bias = None if rms else bias
    found = oracle.forward(x, fold, *_rounded(x, weight, bias), draws.eps(rng), not rms)
    saved = {
        "mean": draws.saved(rng, wide(found.mean)[0]),
        "invrms" if rms else "invstd": draws.saved(rng, wide(found.invstd)[0]),
    }
    if rms:
        del saved["mean"]
    parameters = draws.chance(rng, 0.7)
    arguments = {"dy": dy, "x": x, "normalized_shape": how["normalized_shape"], **saved}
    arguments |= {"weight": weight, "axis": how["axis"], "parameters": parameters}
    after_it = fused_of_gradient(rng, x, bias, found.y)
    arguments |= {k: v for k, v in after_it.items() if k != "bias" or not rms}
    inputs = of_gradient(after_it)

    def expect() -> Expected | Refused:
        result = arithmetic(x.dtype) if weight is None else weight.dtype
        gradients = oracle_of_activations.backward(
            dy,
            x,
            fold,
            saved.get("mean"),
            saved["invrms" if rms else "invstd"],
            *_rounded(x, weight, bias),
            after_it,
            dtype=result,
        )
        unwanted = {"dbias"} if rms else set()
        names = [key for key in gradients if key not in unwanted]
        found = {
            key: gradients[key] if parameters or key in ("dx", "dresidual") else None
            for key in names
        }
        return refused_gradient(after_it) or Expected(found)

    return Call(name, arguments, expect, many, inputs, ("dy", "x"), passed_on="dy")
