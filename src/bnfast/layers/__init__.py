"""Objects that own parameters and running statistics, one file per kind."""

from bnfast.layers.batch import BatchNorm
from bnfast.layers.conditional import ConditionalBatchNorm
from bnfast.layers.cross_iteration import CrossIterationBatchNorm
from bnfast.layers.ghost import GhostBatchNorm
from bnfast.layers.moving_average import MovingAverageBatchNorm
from bnfast.layers.renorm import BatchRenorm
from bnfast.layers.response import FilterResponseNorm
from bnfast.layers.rows import LayerNorm, RMSNorm
from bnfast.layers.samples import GroupNorm, InstanceNorm
from bnfast.layers.spectral import SpectralNorm
from bnfast.layers.standardization import ScaledWeightStandardization, WeightStandardization
from bnfast.layers.weight_norm import WeightNorm
from bnfast.layers.whitening import DecorrelatedBatchNorm, IterNorm

__all__ = [
    "BatchNorm",
    "BatchRenorm",
    "ConditionalBatchNorm",
    "CrossIterationBatchNorm",
    "DecorrelatedBatchNorm",
    "FilterResponseNorm",
    "GhostBatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "IterNorm",
    "LayerNorm",
    "MovingAverageBatchNorm",
    "RMSNorm",
    "ScaledWeightStandardization",
    "SpectralNorm",
    "WeightNorm",
    "WeightStandardization",
]
