"""Objects that own parameters and running statistics, one file per kind."""

from bnfast.layers.batch import BatchNorm
from bnfast.layers.response import FilterResponseNorm
from bnfast.layers.rows import LayerNorm, RMSNorm
from bnfast.layers.samples import GroupNorm, InstanceNorm
from bnfast.layers.whitening import DecorrelatedBatchNorm, IterNorm

__all__ = [
    "BatchNorm",
    "DecorrelatedBatchNorm",
    "FilterResponseNorm",
    "GroupNorm",
    "InstanceNorm",
    "IterNorm",
    "LayerNorm",
    "RMSNorm",
]
