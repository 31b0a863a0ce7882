"""The limit: how fast memory can be read and written, measured beside everything else.

Every probe touches as much memory as the operation does, so that it finds it in the same caches: a
copy from one half of it to the other, reading all of it, and writing all of it in place. What
writes nothing is held against reading alone: a loop of ours, and NumPy's maximum of x itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bnfast import _primitives
from bnfast._cli.bench.cell import Cell, Data, aligned_empty
from bnfast._typing import Array

# How often each byte of that memory is moved.
MOVED = {"copy": 1, "streaming_copy": 1, "in_place": 2, "read": 1}

# More than this is in no cache, and no slower.
MOST_BYTES = 512 << 20


class Probes:
    """What moves memory and does nothing else, for one cell."""

    def __init__(self, cell: Cell[Data], threads: int) -> None:
        dtype = cell.data.computed_in  # for bytes are moved, whatever they stand for
        line = 64 // dtype.itemsize
        half = max(line, min(cell.traffic, MOST_BYTES) // (2 * dtype.itemsize) // line * line)
        memory = aligned_empty((2 * half,), dtype)
        memory.fill(1)
        x, y = memory[:half], memory[half:]

        def probe(kind: str, source: Array, target: Array) -> Callable[[], object]:
            return lambda: _primitives.probe_memory(kind, source, target, threads)

        self.calls = {"read": probe("read", memory, memory)}
        if cell.data.output() is not None:
            self.calls |= {
                "copy": probe("copy", x, y),
                "streaming_copy": probe("streaming_copy", x, y),
                "in_place": probe("in_place", memory, memory),
            }
        self.moved = {kind: MOVED[kind] * memory.nbytes for kind in self.calls}
        if cell.data.output() is None:
            self.calls["maximum"] = cell.data.x.reshape(-1).max
            self.moved["maximum"] = cell.data.x.nbytes

    def rates(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """Return bytes read and written a second."""
        return {kind: moved / seconds[kind] for kind, moved in self.moved.items()}


def best(operation: str, rates: Mapping[str, float]) -> tuple[float, str]:
    """Return the limit in bytes a second, and what set it.

    All but backward read as much as they write: the best of the probes that do so, in place too,
    though only those who need not keep x can come near that. A third of what backward moves is
    another array that is only read. Moments read alone.
    """
    if operation == "moments":
        kind = max(("read", "maximum"), key=lambda kind: rates[kind])
        return rates[kind], kind
    kind = max(("copy", "streaming_copy", "in_place"), key=lambda kind: rates[kind])
    if operation == "backward":
        return 3 / (2 / rates[kind] + 1 / rates["read"]), f"{kind} and read"
    return rates[kind], kind
