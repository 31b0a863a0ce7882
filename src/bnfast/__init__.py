"""Batch normalization on the CPU: NumPy arrays in, NumPy arrays out."""

from bnfast._configuration import available_isas, show_config
from bnfast._memory import get_output_pool_limit, set_output_pool_limit
from bnfast._threads import get_num_threads, set_num_threads
from bnfast._version import __version__
from bnfast.functional import (
    batch_norm,
    batch_norm_backward,
    batch_norm_forward,
    group_norm,
    group_norm_backward,
    group_norm_forward,
    instance_norm,
    instance_norm_backward,
    instance_norm_forward,
    layer_norm,
    layer_norm_backward,
    layer_norm_forward,
    moments,
    rms_norm,
    rms_norm_backward,
    rms_norm_forward,
)
from bnfast.layers import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from bnfast.statistics import Moments

__all__ = [
    "BatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "Moments",
    "RMSNorm",
    "__version__",
    "available_isas",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_forward",
    "get_num_threads",
    "get_output_pool_limit",
    "group_norm",
    "group_norm_backward",
    "group_norm_forward",
    "instance_norm",
    "instance_norm_backward",
    "instance_norm_forward",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_forward",
    "moments",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_forward",
    "set_num_threads",
    "set_output_pool_limit",
    "show_config",
]
