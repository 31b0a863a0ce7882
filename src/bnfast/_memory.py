"""The memory that large outputs leave, kept for the next ones."""

from __future__ import annotations

import sys

from bnfast import _core, _validation

# Enough for one output of a few hundred megabytes, or several smaller ones.
DEFAULT_LIMIT = 256 << 20

_limit = 0


def set_output_pool_limit(limit: int) -> None:
    """Set how much of the memory that outputs of at least 4 MiB leave is kept for the next ones.

    Writing to new memory takes longer than normalizing, because the system clears it first. So when
    a large array that bnfast returned is gone, its memory is kept, up to this limit, the latest
    first, and the next output of the same size gets it. ``out=`` does the same by hand. Outputs are
    ordinary arrays that own their memory. Before the first call, ``BNFAST_OUTPUT_POOL_LIMIT``
    counts, and without that it is 256 MiB.

    Parameters
    ----------
    limit : int
        Bytes, not negative; 0 keeps nothing. What is kept beyond it is given back at once.

    Raises
    ------
    TypeError, ValueError
        If it is not an integer, or negative.

    Examples
    --------
    >>> import bnfast
    >>> before = bnfast.get_output_pool_limit()
    >>> bnfast.set_output_pool_limit(0)
    >>> bnfast.get_output_pool_limit()
    0
    >>> bnfast.set_output_pool_limit(before)
    """
    global _limit
    wanted = min(_validation.integer_from("limit", limit, 0), sys.maxsize)
    _core.limit_output_pool(wanted)
    _limit = wanted


def get_output_pool_limit() -> int:
    """Return how many bytes of memory may be kept for outputs.

    Returns
    -------
    int

    Examples
    --------
    >>> import bnfast
    >>> bnfast.get_output_pool_limit() >= 0
    True
    """
    return _limit
