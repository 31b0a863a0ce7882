"""What `accelerate` of a framework's model did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple


class Entry(NamedTuple):
    """A normalization layer of a model.

    Attributes
    ----------
    path : str
        What the framework calls the layer within the model.
    kind : str
        The name of its class.
    reason : str
        Why it was left to the framework; empty where it was swapped.
    """

    path: str
    kind: str
    reason: str = ""


@dataclass(frozen=True, repr=False)
class Report:
    """What `accelerate` did; printed, or as the value of a cell, it is a summary.

    Attributes
    ----------
    framework : str
        The name of the framework.
    swapped : tuple of Entry
        The layers that bnfast computes from now on, or did before.
    left : tuple of Entry
        The normalization layers that the framework goes on to compute, each with the reason.
    """

    framework: str
    swapped: tuple[Entry, ...]
    left: tuple[Entry, ...]

    def __str__(self) -> str:
        kinds = Counter(entry.kind for entry in self.swapped)
        total = len(self.swapped) + len(self.left)
        lines = [f"bnfast computes {len(self.swapped)} of {total} normalization layers"]
        lines += [f"  {count} {kind}" for kind, count in kinds.items()]
        lines += [f"left to {self.framework}"] if self.left else []
        lines += [f"  {entry.path} ({entry.kind}): {entry.reason}" for entry in self.left]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)
