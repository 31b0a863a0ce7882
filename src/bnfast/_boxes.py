"""An array cut into boxes, for what walks one piece by piece outside the core."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

Box = tuple[slice, ...]


def boxes(shape: Sequence[int], grain: Sequence[int], most: int) -> Iterator[Box]:
    """Cut an array, in C order, into boxes of at most `most` elements, or of a single grain.

    A grain is a box that is never cut. Where grains are single elements, each box is one run of
    memory, and the next box follows it.
    """
    sides = [min(*pair) for pair in zip(shape, grain, strict=True)]
    size = prod(sides)
    for d in reversed(range(len(shape))):
        grains = max(1, most // size)
        side = min(shape[d], grain[d] * grains)
        size = size // sides[d] * side
        sides[d] = side
        if side < shape[d]:
            break
    starts = (range(0, n, side) for n, side in zip(shape, sides, strict=True))
    for corner in product(*starts):
        yield tuple(
            slice(start, min(start + side, n))
            for start, side, n in zip(corner, sides, shape, strict=True)
        )
