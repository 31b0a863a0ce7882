"""The public functions, and for each how a call of it is drawn."""

from __future__ import annotations

import functools
from collections.abc import Callable

from fuzz import calls_of_averages as averages
from fuzz import calls_of_batches as batches
from fuzz import calls_of_cross_iteration as cross_iteration
from fuzz import calls_of_derivatives as derivatives
from fuzz import calls_of_rows as rows
from fuzz import calls_of_samples as samples
from fuzz import calls_of_weights as weights
from fuzz import calls_of_whitening as whitening
from fuzz.call import Call, Random

_DIFFERENTIATED = ("batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm")

# What draws the calls of several functions is told which.
OF_SEVERAL: dict[Callable[[Random, str], Call], tuple[str, ...]] = {
    batches.batch_norm: ("batch_norm", "conditional_batch_norm", "ghost_batch_norm"),
    batches.batch_norm_forward: ("batch_norm_forward", "conditional_batch_norm_forward"),
    batches.batch_norm_backward: ("batch_norm_backward", "conditional_batch_norm_backward"),
    batches.batch_norm_halves: ("batch_norm_backward_sums", "batch_norm_backward_input"),
    batches.renorm: ("batch_renorm", "batch_renorm_forward"),
    averages.moving_average: ("moving_average_batch_norm", "moving_average_batch_norm_forward"),
    cross_iteration.cross_iteration: (
        *("cross_iteration_batch_norm", "cross_iteration_batch_norm_forward"),
    ),
    derivatives.jvp: tuple(f"{stem}_jvp" for stem in _DIFFERENTIATED),
    derivatives.double_backward: tuple(f"{stem}_double_backward" for stem in _DIFFERENTIATED),
    samples.group_norm: ("group_norm", "group_norm_forward", "instance_norm_forward"),
    samples.group_norm_backward: ("group_norm_backward", "instance_norm_backward"),
    samples.response: ("filter_response_norm", "filter_response_norm_forward"),
    rows.row_norm: ("layer_norm", "layer_norm_forward", "rms_norm", "rms_norm_forward"),
    rows.row_norm_backward: ("layer_norm_backward", "rms_norm_backward"),
    weights.weight_norm: ("weight_norm", "weight_norm_forward"),
    weights.standardization: (
        *("weight_standardization", "weight_standardization_forward"),
        *("scaled_weight_standardization", "scaled_weight_standardization_forward"),
    ),
    weights.standardization_backward: (
        *("weight_standardization_backward", "scaled_weight_standardization_backward"),
    ),
    weights.centralization: (
        *("weight_centralization", "weight_centralization_forward"),
        "weight_centralization_backward",
    ),
    weights.spectral: ("spectral_norm", "spectral_norm_forward"),
    whitening.whitening: ("decorrelated_batch_norm", "iterative_norm"),
    whitening.whitening_forward: (*("decorrelated_batch_norm_forward", "iterative_norm_forward"),),
    whitening.whitening_backward: (
        *("decorrelated_batch_norm_backward", "iterative_norm_backward"),
    ),
}

CALLS: dict[str, Callable[[Random], Call]] = {
    "moments": batches.moments,
    "summary": batches.summary,
    "ghost_batch_norm_forward": batches.ghost_forward,
    "ghost_batch_norm_backward": batches.ghost_backward,
    "batch_renorm_backward": batches.renorm_backward,
    "moving_average_batch_norm_backward": averages.moving_average_backward,
    "cross_iteration_batch_norm_backward": cross_iteration.cross_iteration_backward,
    "instance_norm": samples.instance_norm,
    "filter_response_norm_backward": samples.response_backward,
    "weight_norm_backward": weights.weight_norm_backward,
    "spectral_norm_backward": weights.spectral_backward,
    **{
        name: functools.partial(draw, name=name)
        for draw, names in OF_SEVERAL.items()
        for name in names
    },
}
