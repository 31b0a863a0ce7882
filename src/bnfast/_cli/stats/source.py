"""What a run of ``stats`` reads: sources that have channels, and are summarized in blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from bnfast import summary
from bnfast._boxes import Box
from bnfast._cli.failure import Failure, Unreadable
from bnfast._typing import Array
from bnfast.statistics import Summary

# Bytes that are read at once. What is read is then still in the last level of cache when it is
# summed, and a call and a merge cost little beside the sums. Of many channels merging costs more,
# and memory has room for larger blocks.
_BLOCK, _PER_CHANNEL, _MOST = 4 << 20, 512, 48 << 20

# Of types in which images are stored, the value that counts as 1.
UNITS = {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0}

Axis = tuple[int, ...] | None  # None where the user names none
Advance = Callable[[int, str], None]  # bytes that were read, of what


class LeftOut:
    """What is left out of the data set, where the user lets it be: otherwise it ends the run."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.reasons: list[str] = []

    def add(self, failure: Failure) -> None:
        """Leave out what failed, or say how it could be."""
        if not self.skip:
            raise Failure(f"{failure}; see --skip") if isinstance(failure, Unreadable) else failure
        self.reasons.append(str(failure))


class Source(ABC):
    """A part of the data set: its channels are known before it is read.

    Parameters
    ----------
    name : str
        As messages call it.
    size : int
        The bytes that are to be read.
    channels : tuple of int
        The shape of the axes that are kept.
    kind : str
        What it consists of, for messages and reports.
    unit : float or None
        The value that counts as 1, or None where nobody knows.
    axis : tuple of int or None
        The axes that are kept, counted from the last one; None where nobody knows.
    labels : sequence of str, optional
        What the channels are called.
    """

    def __init__(
        self,
        name: str,
        size: int,
        channels: tuple[int, ...],
        kind: str,
        unit: float | None,
        axis: tuple[int, ...] | None,
        labels: Sequence[str] | None = None,
    ) -> None:
        self.name, self.size, self.channels, self.kind = name, size, channels, kind
        self.unit, self.axis, self.labels = unit, axis, labels

    @property
    def title(self) -> str:
        """What a report calls it."""
        return f"{self.name}: {self.kind}"

    @abstractmethod
    def summarize(self, finite: bool, advance: Advance) -> Summary:
        """Read it all, block by block, and tell `advance` how much was read."""


class DataSet(NamedTuple):
    """The statistics, what they are of, and what they are not of, with reasons."""

    statistics: Summary
    sources: list[Source]
    left_out: list[str]


Open = Callable[[], Source]  # reads headers alone


class Saved(Source):
    """A file that ``--save`` wrote."""

    def __init__(self, name: str, saved: Summary) -> None:
        channels = np.shape(saved.mean)
        super().__init__(name, 0, channels, "saved statistics", None, None)
        self._saved = saved

    def summarize(self, finite: bool, advance: Advance) -> Summary:
        """Return what was saved."""
        return self._saved


def readable(name: str, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type that values are summed as, or refuse those of another kind."""
    if dtype.kind in "biu" or dtype.char in "efd":
        return dtype.newbyteorder("=")
    got = "Python objects" if dtype.hasobject else str(dtype)
    raise Failure(f"{name}: expected integers or floats of at most 64 bits, got {got}")


def bytes_of_block(channels: Sequence[int]) -> int:
    """Return how much to read at once."""
    return min(max(_BLOCK, _PER_CHANNEL * prod(channels)), _MOST)


def summary_of_boxes(
    parts: Iterable[tuple[Box, Array]], shape: Sequence[int], kept: Sequence[int], finite: bool
) -> Summary:
    """Return the statistics of an array that comes box by box."""
    totals: dict[tuple[int, ...], tuple[Box, Summary]] = {}  # by where their channels begin
    for box, values in parts:
        part = summary(values, tuple(kept) or None, finite=finite)
        place = tuple(box[d] for d in kept)
        begin = tuple(channels.start for channels in place)
        totals[begin] = place, totals[begin][1].merge(part) if begin in totals else part
    if len(totals) == 1:
        return next(iter(totals.values()))[1]
    return _side_by_side(totals.values(), tuple(shape[d] for d in kept))


def _side_by_side(parts: Collection[tuple[Box, Summary]], channels: tuple[int, ...]) -> Summary:
    """Return the statistics of all channels, of which each part has some."""
    saved = [(place, part._saved()) for place, part in parts]
    whole: dict[str, Array] = {}
    for name in saved[0][1]:
        whole[name] = np.empty(channels, np.result_type(*(arrays[name] for _, arrays in saved)))
        for place, arrays in saved:
            whole[name][place] = arrays[name]
    return Summary._loaded(whole)
