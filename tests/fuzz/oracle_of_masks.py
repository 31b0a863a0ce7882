"""Normalizations of the values that a mask lets count: those of the other oracles, of these alone.

A mask is the same for all channels. What counts is therefore a smaller batch: of positions and
channels, or, where each sample has its statistics, one for all samples of which as many count.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fuzz import oracle, oracle_of_activations
from fuzz.judge import Quantity
from fuzz.oracle import WIDE, Array, Fold


class Part(NamedTuple):
    """What is normalized together: numbers of positions, (M,), or (samples, M) of these samples."""

    fold: Fold
    positions: Array
    samples: Array | None


class Normalized(NamedTuple):
    """A forward pass, and the statistics of each part."""

    y: Quantity
    mean: Quantity
    invstd: Quantity
    of: list[oracle.Statistics]


class Masked(NamedTuple):
    """Which positions of a batch count, with the axes of x but `axis`, and its parts."""

    counts: Array
    axis: int
    padding: str
    parts: list[Part]

    def everywhere(self, channels: int) -> Array:
        """What counts, in the shape of x."""
        cells = np.repeat(self.counts[..., None], channels, -1)
        return np.moveaxis(cells, -1, self.axis)

    def values_of(self, part: Part, array: Array) -> Array:
        """What counts of a part: (M, C), or (samples, M, C)."""
        moved = np.moveaxis(array, self.axis, -1)
        return moved.reshape(self.counts.size, moved.shape[-1])[part.positions]

    def whole(self, found: list[Quantity]) -> Quantity:
        """What the parts are, where they lie in x; 0 elsewhere."""
        first = found[0]
        channels = first.value.shape[-1]

        def joined(arrays: list[Any]) -> Array:
            made = np.zeros((self.counts.size, channels), WIDE)
            for part, array in zip(self.parts, arrays, strict=True):
                made[part.positions] = array
            return np.moveaxis(made.reshape(*self.counts.shape, channels), -1, self.axis)

        kinds = {kind for quantity in found for kind in quantity.sizes}
        sizes = {kind: joined([q.sizes.get(kind, 0) for q in found]) for kind in kinds}
        return first._replace(value=joined([q.value for q in found]), sizes=sizes)

    def of_all(self, found: list[Quantity]) -> Quantity:
        """Statistics of parts, in the order of the samples."""
        if self.parts[0].samples is None:
            return found[0]
        order = np.argsort(np.concatenate([part.samples for part in self.parts]))
        return oracle.concatenated(found, lambda arrays: np.concatenate(arrays)[order])

    def padded(self, quantity: Quantity, filler: Array) -> Quantity:
        """A result like x, which is 0, or what the filler is, where values do not count."""
        counts = self.everywhere(quantity.value.shape[self.axis])
        wide = np.asarray(filler).astype(WIDE) if self.padding == "input" else WIDE(0)
        sizes = {kind: np.where(counts, size, 0) for kind, size in quantity.sizes.items()}
        return quantity._replace(value=np.where(counts, quantity.value, wide), sizes=sizes)

    def forward(self, x: Array, weight: Array | None, bias: Array | None, eps: float) -> Normalized:
        """Normalize with the statistics of what counts."""
        made = [
            oracle.forward(self.values_of(part, x), part.fold, weight, bias, eps)
            for part in self.parts
        ]
        y, mean, invstd = ([getattr(each, name) for each in made] for name in made[0]._fields[:3])
        of = [each.of for each in made]
        return Normalized(self.whole(y), self.of_all(mean), self.of_all(invstd), of)

    def backward(
        self,
        dy: Array,
        x: Array,
        mean: Array,
        invstd: Array,
        weight: Array | None,
        bias: Array | None,
        fused: dict[str, Any],
        constant: bool = False,
    ) -> dict[str, Quantity]:
        """The gradients, as `oracle_of_activations.backward` has them."""
        made = []
        for part in self.parts:
            like_x = {k: v for k, v in fused.items() if k in ("y", "residual")}
            arrays = {k: v for k, v in like_x.items() if isinstance(v, np.ndarray)}
            cut = {k: self.values_of(part, array) for k, array in arrays.items()}
            kept = [a if part.samples is None else a[part.samples] for a in (mean, invstd)]
            given = *(self.values_of(part, array) for array in (dy, x)), part.fold, *kept
            more = weight, bias, fused | cut
            found = oracle_of_activations.backward(*given, *more, constant=constant)
            if not part.fold.count:  # nothing, whatever it would be multiplied by
                none = np.zeros_like(found["dweight"].value)
                sizes = dict.fromkeys(found["dweight"].sizes, none)
                found["dweight"] = found["dweight"]._replace(value=none, sizes=sizes)
            made.append(found)
        of_parts = {name: [each[name] for each in made] for name in made[0]}
        of_x = {name: self.whole(of_parts[name]) for name in ("dx", "dresidual") if name in found}
        of_x["dx"] = self.padded(of_x["dx"], dy)
        sums = {name: oracle.added(of_parts[name]) for name in ("dweight", "dbias")}
        return {"dx": of_x.pop("dx"), **sums, **of_x}

    def tracked(
        self,
        of: list[oracle.Statistics],
        x: Array,
        running: tuple[Array, Array],
        momentum: float,
        unbiased: bool,
    ) -> list[Quantity]:
        """Running statistics after a batch: the mean of those of samples of which some count."""
        means, variances, errors, scales = [], [], [], []
        for part, found in zip(self.parts, of, strict=True):
            if not part.fold.count:
                continue
            many = part.fold.count
            correction = many / WIDE(many - 1) if unbiased else WIDE(1)
            usable = oracle.unjudged(found.var, found.usable)
            for made, kept in (
                (means, found.mean),
                (variances, found.var * correction),
                (errors, np.sqrt(usable)),
                (scales, usable * correction),
            ):
                made.append(np.atleast_2d(part.fold.statistic(kept)))
        of_samples = np.concatenate(means)
        averaged = of_samples if len(of_samples) > 1 else None
        var, error, scale = (np.concatenate(made).mean(0) for made in (variances, errors, scales))
        return [
            oracle.blended(running[0], of_samples.mean(0), momentum, error, x.dtype, averaged),
            oracle.blended(running[1], var, momentum, scale, x.dtype),
        ]

    @property
    def fewest(self) -> int:
        """How many positions count where the fewest, but some, do; 0 where none does at all."""
        return min((part.fold.count for part in self.parts if part.fold.count), default=0)


def of_batch(counts: Array, shape: tuple[int, ...], axis: int, padding: str) -> Masked:
    """All samples have their statistics together."""
    positions = np.flatnonzero(counts)
    fold = oracle.of_channels((len(positions), shape[axis]), 1)
    return Masked(counts, axis % len(shape), padding, [Part(fold, positions, None)])


def of_samples(
    counts: Array,
    shape: tuple[int, ...],
    axis: int,
    padding: str,
    groups: int | None = None,
    per_group: bool = False,
) -> Masked:
    """Each sample has its statistics: of each channel, or of each of so many groups."""
    rows = counts.reshape(len(counts), int(np.prod(counts.shape[1:])))
    of_each, parts = rows.sum(1), []
    for many in np.unique(of_each) if len(rows) else (0,):
        samples = np.flatnonzero(of_each == many)
        within = np.nonzero(rows[samples])[1].reshape(len(samples), many)
        folded = len(samples), int(many), shape[axis]
        fold = oracle.of_planes(folded, 2)
        if groups is not None:
            fold = oracle.of_groups(folded, 2, groups, per_group)
        parts.append(Part(fold, within + samples[:, None] * rows.shape[1], samples))
    return Masked(counts, axis % len(shape), padding, parts)
