"""Masks, lengths and paddings, and what lies in the padding."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fuzz import draws
from fuzz.judge import limits_of

Array = np.ndarray
Random = np.random.Generator

PADDINGS = ("zeros", "input")
OF_LENGTHS = tuple(np.dtype(kind) for kind in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"))


def _random(rng: Random, mask: Array) -> None:
    mask[...] = rng.random(mask.shape) < draws.pick(rng, (0.05, 0.5, 0.9))


def _prefixes(rng: Random, mask: Array) -> None:
    rows = mask.reshape(len(mask), int(np.prod(mask.shape[1:])))
    width = rows.shape[1]
    rows[...] = np.arange(width) < rng.integers(0, width + 1, (len(rows), 1))


def _runs(rng: Random, mask: Array) -> None:
    """Which begin and end anywhere."""
    changes = rng.random(mask.size) < draws.pick(rng, (0.3, 0.03))
    mask.reshape(-1)[...] = changes.cumsum() % 2 == 0


def _samples(rng: Random, mask: Array) -> None:
    mask[...] = (rng.random(len(mask)) < 0.5).reshape(-1, *(1,) * (mask.ndim - 1))


def _single(rng: Random, mask: Array) -> None:
    if mask.size:
        mask.reshape(-1)[int(rng.integers(mask.size))] = True


def _all_but_one(rng: Random, mask: Array) -> None:
    _single(rng, mask)
    mask[...] = ~mask


def _all(rng: Random, mask: Array) -> None:
    mask[...] = True


def _none(rng: Random, mask: Array) -> None:
    mask[...] = False


KINDS = (
    *(_random, _random, _random, _prefixes, _prefixes, _runs, _samples),
    *(_single, _all_but_one, _all, _none),
)


class Drawn(NamedTuple):
    """Arguments, and what they say: the positions that count, with the axes of x but `axis`."""

    arguments: dict[str, Any]
    counts: Array


def draw(rng: Random, shape: tuple[int, ...], axis: int) -> Drawn:
    """A mask of some shape that broadcasts, or lengths where there may be any."""
    axis %= len(shape)
    others = tuple(size for d, size in enumerate(shape) if d != axis)
    more = {} if draws.chance(rng, 0.4) else {"padding": draws.pick(rng, PADDINGS)}
    if len(shape) == 3 and axis and draws.chance(rng, 0.5):
        found, counts = _lengths(rng, *others)
        return Drawn({"lengths": found} | more, counts)
    kept = [1 if draws.chance(rng, 0.15) else size for size in others]
    mask = np.zeros(kept, bool)
    draws.pick(rng, KINDS)(rng, mask)
    counts = np.ascontiguousarray(np.broadcast_to(mask, others))
    return Drawn({"mask": in_another_shape(rng, mask, axis)} | more, counts)


def _lengths(rng: Random, samples: int, most: int) -> tuple[Array, Array]:
    kind = draws.pick(rng, [kind for kind in OF_LENGTHS if np.iinfo(kind).max >= most])
    lengths = rng.integers(0, most + 1, samples)
    which = rng.random()
    if which < 0.1:
        lengths[...] = most
    elif which < 0.15:
        lengths[...] = 0
    elif which < 0.6:
        lengths[rng.random(samples) < 0.3] = draws.pick(rng, (0, most))
    given = lengths.astype(kind.newbyteorder() if draws.chance(rng, 0.1) else kind)
    return given, np.arange(most) < lengths[:, None]


def in_another_shape(rng: Random, mask: Array, axis: int) -> Array:
    """The same mask, with an axis for the channels, or without axes of one element before it."""
    if draws.chance(rng, 0.4):
        return np.expand_dims(mask, axis)
    while mask.ndim > 1 and len(mask) == 1 and draws.chance(rng, 0.5):
        mask = mask[0]
    return mask


def filled(rng: Random, array: Array, counts: Array) -> Array:
    """A copy with anything where values do not count."""
    largest = float(limits_of(array.dtype).max)
    junk = np.array([np.nan, np.inf, -np.inf, largest, -largest, 0.0, 1.0])
    some = rng.choice(junk[: int(rng.integers(1, len(junk) + 1))], array.shape)
    return np.ascontiguousarray(np.where(counts, array, some.astype(array.dtype)))
