"""The limit: how fast the memory can be read and written, measured beside everything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from bnfast import _core

Array = NDArray[Any]

# How many bytes of an array's size a probe moves: it reads x, writes y, or both.
MOVED = {"copy": 2, "streaming_copy": 2, "in_place": 2, "read": 1}


def probes(x: Array, y: Array, threads: int) -> dict[str, Callable[[], object]]:
    """Return calls that move arrays of this size, and do nothing else."""

    def probe(kind: str) -> Callable[[], object]:
        return lambda: _core.probe_memory(kind, x, y, threads)

    return {kind: probe(kind) for kind in MOVED}


def best(operation: str, nbytes: int, seconds: Mapping[str, float]) -> tuple[float, str]:
    """Return the limit in bytes a second, and what set it.

    Inference and training read one array and write one: the best of the probes that do so, a limit
    in place too, though only those who need not keep x can reach that. Backward reads another one.
    """
    kind = min((k for k, moved in MOVED.items() if moved == 2), key=lambda k: seconds[k])
    if operation == "backward":
        return 3 * nbytes / (seconds[kind] + seconds["read"]), f"{kind} and read"
    return 2 * nbytes / seconds[kind], kind
