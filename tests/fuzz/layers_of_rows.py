"""Layers of rows: layer and RMS norm."""

from __future__ import annotations

from typing import Any

import numpy as np

from fuzz import call, draws, oracle
from fuzz.call import Array, Random
from fuzz.judge import arithmetic
from fuzz.layer import OF_CHANNELS, Plan, Step, dtypes_of
from fuzz.layer_draws import activation, constructor, with_residuals
from fuzz.layer_steps import ACTIVATIONS, activated, fused_of, step_by_input


def row_norm(rng: Random, name: str) -> Plan:
    ndim = int(rng.integers(1, 5))
    sizes = tuple(int(rng.integers(1, 9)) for _ in range(ndim))
    number = int(rng.integers(1, ndim + 1))
    axes = tuple(range(ndim - number, ndim))
    given: Any = None
    if draws.chance(rng, 0.4):
        axes = tuple(int(d) for d in rng.permutation(ndim)[:number])
        given = axes if number > 1 or draws.chance(rng, 0.5) else axes[0]
    rms, of_row = name == "RMSNorm", tuple(sizes[d] for d in axes)
    more = {} if rms else {"bias": draws.chance(rng, 0.7)}
    make, text = constructor(
        name,
        of_row,
        axis=given,
        elementwise_affine=draws.chance(rng, 0.7),
        dtype=draws.dtype(rng),
        **more,
        **activation(rng),
    )

    def inputs(rng: Random) -> tuple[Any, ...]:
        shape = [n if d in axes else int(rng.integers(1, 7)) for d, n in enumerate(sizes)]
        return (draws.values(rng, tuple(shape), draws.data_dtype(rng)),)

    def step(layer: Any, x: Array, residual: Array | None = None) -> Step | call.Refused:
        fused, fold = fused_of(layer, residual), oracle.of_rows(x.shape, axes)
        if fused.activation not in (None, *ACTIVATIONS):
            return call.Refused(("activation",))
        weight, bias = (
            None if p is None else p.astype(arithmetic(x.dtype)) for p in (layer.weight, layer.bias)
        )
        eps = float(np.finfo(arithmetic(x.dtype)).eps) if layer.eps is None else layer.eps
        plain = step_by_input(layer, x, fold, weight, bias, eps, not rms)
        found = oracle.forward(x, fold, weight, bias, eps, not rms)
        mean = None if rms else found.mean.value
        given = x, fold, mean, found.invstd, weight, bias
        return activated(plain, fused, given, dtypes_of(layer, OF_CHANNELS), False)

    return Plan(make, with_residuals(inputs), step, text, fused=True)
