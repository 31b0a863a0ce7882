"""What layers keep alive between a forward pass and its backward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from bnfast._typing import Array


def _memory_of(array: Array) -> Array:
    """Return the array whose memory a view shows."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def kept_arrays(*owners: object) -> dict[int, Array]:
    """Return every memory that objects refer to, by way of attributes and containers, once."""
    found: dict[int, Array] = {}
    seen: set[int] = set()
    waiting = [*owners]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, (str, bytes, type)):
            continue
        seen.add(id(item))
        if isinstance(item, np.ndarray):
            memory = _memory_of(item)
            found[id(memory)] = memory
        elif isinstance(item, Mapping):
            waiting.extend(item.values())
        elif isinstance(item, Iterable):
            waiting.extend(item)
        else:
            waiting.extend(getattr(item, "__dict__", {}).values())
    return found


def kept_bytes(*owners: object, but: Iterable[Array] = ()) -> int:
    """Return how many bytes objects keep alive, without those of some arrays."""
    left_out = {id(_memory_of(array)) for array in but}
    memories = kept_arrays(*owners)
    return sum(array.nbytes for key, array in memories.items() if key not in left_out)
