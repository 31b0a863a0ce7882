"""Whether arrays share memory, also those that are no NumPy arrays."""

from __future__ import annotations

import numpy as np

from bnfast._arrays import as_array
from bnfast._typing import Array

# Beyond this much work numpy gives up on whether two arrays share an element.
_OVERLAP_WORK = 10_000


def overlaps_itself(array: Array) -> bool:
    """Whether two indices may name the same memory."""
    if array.flags.c_contiguous:
        return False
    reach = array.itemsize
    steps = sorted(
        (abs(stride), size)
        for stride, size in zip(array.strides, array.shape, strict=True)
        if size > 1
    )
    for stride, length in steps:
        if stride < reach:
            return True
        reach += stride * (length - 1)
    return False


def shares_memory(a: Array, b: Array) -> bool:
    """Whether two arrays have an element in common; in doubt, yes."""
    if a is not b and a.flags.owndata and b.flags.owndata:
        return False
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=_OVERLAP_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def is_same_memory(a: Array, b: Array) -> bool:
    """Whether every index names the same element; what the stride of a single step is, is moot."""
    if address(a) != address(b):
        return False
    axes = zip(a.shape, a.strides, b.strides, strict=True)
    return all(size == 1 or ours == theirs for size, ours, theirs in axes)


def memory_of(argument: object) -> Array | None:
    """Return the memory of an array, a tensor or a buffer as an array; None of what is copied."""
    if isinstance(argument, np.ndarray):
        return argument
    if argument is None or isinstance(argument, (int, float, list, tuple)):
        return None
    try:
        return as_array(argument)
    except Exception:  # no array: refused where it is read
        return None
