"""Batch normalization on the CPU: NumPy arrays in, NumPy arrays out."""

from bnfast._configuration import available_isas, show_config
from bnfast._memory import get_output_pool_limit, set_output_pool_limit
from bnfast._threads import get_num_threads, set_num_threads
from bnfast._version import __version__
from bnfast.functional import batch_norm, batch_norm_backward, batch_norm_forward, moments
from bnfast.layers import BatchNorm
from bnfast.statistics import Moments

__all__ = [
    "BatchNorm",
    "Moments",
    "__version__",
    "available_isas",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_forward",
    "get_num_threads",
    "get_output_pool_limit",
    "moments",
    "set_num_threads",
    "set_output_pool_limit",
    "show_config",
]
