"""What is unusual in the statistics of a batch norm layer."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnfast._typing import Array

# Values ten deviations from zero leave float16, whose largest number is 65504.
_HUGE = (65504 / 10) ** 2

MEANINGS = {
    "not finite": "a mean or a variance is NaN or infinite",
    "negative": "the variance is negative",
    "dead": "the variance is 0: the channel was constant",
    "subnormal": "the variance is below the normal numbers of its type",
    "tiny": "the variance is less than eps, which decides the scale",
    "huge": f"the variance is above {_HUGE:.1e}: ten deviations leave the range of float16",
    "off": "the scale is 0: the output is constant",
}


def _smallest_normal(dtype: np.dtype[Any]) -> float:
    narrow = dtype.itemsize if dtype.kind == "f" else 4  # bfloat16 has the range of float32
    return float(np.finfo(f"f{narrow}").tiny)


def unusual(
    mean: Array, variance: Array, scale: Array | None, epsilon: float, dtype: np.dtype[Any]
) -> dict[str, list[int]]:
    """Return the channels of which something is unusual, by what it is.

    Of a channel's statistics the first that holds, in the order of `MEANINGS`; the scale besides.
    """
    finite = np.isfinite(mean) & np.isfinite(variance)
    kinds = {
        "not finite": ~finite,
        "negative": variance < 0,
        "dead": variance == 0,
        "subnormal": variance < _smallest_normal(dtype),
        "tiny": variance < epsilon,
        "huge": variance > _HUGE,
    }
    found = {}
    rest = np.ones(mean.shape, bool)
    for name, holds in kinds.items():
        found[name] = np.flatnonzero(holds & rest).tolist()
        rest &= ~holds
    found["off"] = [] if scale is None else np.flatnonzero(scale == 0).tolist()
    return {name: channels for name, channels in found.items() if channels}
