"""The float mode that results are made in, whatever the caller's is."""

from __future__ import annotations

from functools import update_wrapper

from bnfast import _core
from bnfast._typing import Function


def in_default_float_mode(function: Function) -> Function:
    """Return a function that keeps denormals and rounds to nearest, whatever the caller's mode is.

    The mode is put back when it returns or raises. What users call and computes, in NumPy or in the
    core, has this decorator; OpenMP's threads are cared for where they do their tasks. Threads of
    the BLAS that NumPy multiplies matrices with are not: their mode is their own.
    """
    guarded = _core.GuardedFunction(function)
    update_wrapper(guarded, function)
    return guarded
