"""Stateless operations, one file per kind."""

from bnfast.functional.batch import (
    batch_norm,
    batch_norm_backward,
    batch_norm_backward_input,
    batch_norm_backward_sums,
    batch_norm_forward,
)
from bnfast.functional.conditional import (
    conditional_batch_norm,
    conditional_batch_norm_backward,
    conditional_batch_norm_forward,
)
from bnfast.functional.cross_iteration import (
    CrossIterated,
    IterationStatistics,
    cross_iteration_batch_norm,
    cross_iteration_batch_norm_backward,
    cross_iteration_batch_norm_forward,
)
from bnfast.functional.ghost import (
    ghost_batch_norm,
    ghost_batch_norm_backward,
    ghost_batch_norm_forward,
)
from bnfast.functional.moments import moments, summary
from bnfast.functional.moving_average import (
    MovingAveraged,
    moving_average_batch_norm,
    moving_average_batch_norm_backward,
    moving_average_batch_norm_forward,
    weight_centralization,
    weight_centralization_backward,
    weight_centralization_forward,
)
from bnfast.functional.renorm import (
    Renormalized,
    RenormSchedule,
    batch_renorm,
    batch_renorm_backward,
    batch_renorm_forward,
)
from bnfast.functional.response import (
    filter_response_norm,
    filter_response_norm_backward,
    filter_response_norm_forward,
)
from bnfast.functional.rows import (
    layer_norm,
    layer_norm_backward,
    layer_norm_forward,
    rms_norm,
    rms_norm_backward,
    rms_norm_forward,
)
from bnfast.functional.samples import (
    group_norm,
    group_norm_backward,
    group_norm_forward,
    instance_norm,
    instance_norm_backward,
    instance_norm_forward,
)
from bnfast.functional.spectral import (
    spectral_norm,
    spectral_norm_backward,
    spectral_norm_forward,
)
from bnfast.functional.standardization import (
    scaled_weight_standardization,
    scaled_weight_standardization_backward,
    scaled_weight_standardization_forward,
    weight_standardization,
    weight_standardization_backward,
    weight_standardization_forward,
)
from bnfast.functional.weight_norm import (
    weight_norm,
    weight_norm_backward,
    weight_norm_forward,
)
from bnfast.functional.whitening import (
    IterativelyWhitened,
    Whitened,
    decorrelated_batch_norm,
    decorrelated_batch_norm_backward,
    decorrelated_batch_norm_forward,
    iterative_norm,
    iterative_norm_backward,
    iterative_norm_forward,
)

__all__ = [
    "CrossIterated",
    "IterationStatistics",
    "IterativelyWhitened",
    "MovingAveraged",
    "RenormSchedule",
    "Renormalized",
    "Whitened",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_backward_input",
    "batch_norm_backward_sums",
    "batch_norm_forward",
    "batch_renorm",
    "batch_renorm_backward",
    "batch_renorm_forward",
    "conditional_batch_norm",
    "conditional_batch_norm_backward",
    "conditional_batch_norm_forward",
    "cross_iteration_batch_norm",
    "cross_iteration_batch_norm_backward",
    "cross_iteration_batch_norm_forward",
    "decorrelated_batch_norm",
    "decorrelated_batch_norm_backward",
    "decorrelated_batch_norm_forward",
    "filter_response_norm",
    "filter_response_norm_backward",
    "filter_response_norm_forward",
    "ghost_batch_norm",
    "ghost_batch_norm_backward",
    "ghost_batch_norm_forward",
    "group_norm",
    "group_norm_backward",
    "group_norm_forward",
    "instance_norm",
    "instance_norm_backward",
    "instance_norm_forward",
    "iterative_norm",
    "iterative_norm_backward",
    "iterative_norm_forward",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_forward",
    "moments",
    "moving_average_batch_norm",
    "moving_average_batch_norm_backward",
    "moving_average_batch_norm_forward",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_forward",
    "scaled_weight_standardization",
    "scaled_weight_standardization_backward",
    "scaled_weight_standardization_forward",
    "spectral_norm",
    "spectral_norm_backward",
    "spectral_norm_forward",
    "summary",
    "weight_centralization",
    "weight_centralization_backward",
    "weight_centralization_forward",
    "weight_norm",
    "weight_norm_backward",
    "weight_norm_forward",
    "weight_standardization",
    "weight_standardization_backward",
    "weight_standardization_forward",
]
