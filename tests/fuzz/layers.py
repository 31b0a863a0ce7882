"""The layers, and for each how one is drawn."""

from __future__ import annotations

from collections.abc import Callable

from fuzz.call import Random
from fuzz.layer import Plan
from fuzz.layers_of_averages import moving_average
from fuzz.layers_of_batches import batch_norm, conditional, ghost, renorm
from fuzz.layers_of_cross_iteration import cross_iteration
from fuzz.layers_of_rows import row_norm
from fuzz.layers_of_samples import group_norm, instance_norm, response
from fuzz.layers_of_weights import spectral, standardization, weight_norm
from fuzz.layers_of_whitening import whitening

LAYERS: dict[str, Callable[[Random], Plan]] = {
    "BatchNorm": batch_norm,
    "InstanceNorm": instance_norm,
    "GhostBatchNorm": ghost,
    "ConditionalBatchNorm": conditional,
    "BatchRenorm": renorm,
    "MovingAverageBatchNorm": moving_average,
    "CrossIterationBatchNorm": cross_iteration,
    "GroupNorm": group_norm,
    "LayerNorm": lambda rng: row_norm(rng, "LayerNorm"),
    "RMSNorm": lambda rng: row_norm(rng, "RMSNorm"),
    "FilterResponseNorm": response,
    "DecorrelatedBatchNorm": lambda rng: whitening(rng, "DecorrelatedBatchNorm"),
    "IterNorm": lambda rng: whitening(rng, "IterNorm"),
    "WeightStandardization": lambda rng: standardization(rng, "WeightStandardization"),
    "ScaledWeightStandardization": lambda rng: standardization(rng, "ScaledWeightStandardization"),
    "WeightNorm": weight_norm,
    "SpectralNorm": spectral,
}
