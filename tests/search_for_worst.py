"""Searches for the data on which results are furthest from what is promised.

    python tests/search_for_worst.py --seconds 600 --seed 0 --member batch --layout channels_last

prints the worst of each member, layout, direction, dtype and quantity, as a fraction of what
README.md promises (above 1 it is broken), and below each a line that judges that input again.
Without options it goes on for a minute over all of them; an interrupt ends it early.

It draws from the distributions of any_data.py, keeps what is worst in any quantity, changes that
(blocks, tiles, mantissas, places) and judges again. On the way it compares the bits of instruction
sets, numbers of threads and orders of the trials.
"""

from __future__ import annotations

import argparse
import time
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

import bnfast
from any_data import (
    STRIDES,
    Site,
    all_sites,
    draw,
    draw_upstream,
    evaluated,
    exact,
    expression,
    judge,
    length,
    normal,
    palette,
    pick,
    promised,
    run,
)
from bnfast import _core, _threads

# The most values that are judged at a time, unless a call needs more; fewer where what is exact
# takes long double. And the fewest trials, and the most.
VALUES = {np.dtype(np.float32): 400_000, np.dtype(np.float64): 100_000}
FEWEST, MOST = 16, 768

# After so many generations comes one of normal values, whose outputs have a promise of their own.
NORMAL_EVERY = 8

# Trials of one structure.
LITTER = 8

# The worst that are kept of each quantity, without outliers and with.
KEPT = 6

# Generations without anything worse, after which a hunt begins anew.
PATIENCE = 25

Trial = tuple[np.ndarray, ...]  # x, or x and dy


class Case(NamedTuple):
    """One trial, and how far off a result of it is."""

    fraction: float  # of what is promised
    error: float
    quantity: str
    outliers: bool
    site: Site
    trial: Trial

    @property
    def direction(self) -> str:
        return "forward" if len(self.trial) == 1 else "backward"

    @property
    def kind(self) -> tuple[str, ...]:
        dtype = self.trial[0].dtype.name
        outliers = "outliers" if self.outliers else ""
        return (self.site.member, self.site.layout, self.direction, dtype, self.quantity, outliers)

    def __str__(self) -> str:
        allowed = promised(self.quantity, self.outliers, self.trial[0].dtype)
        return (
            f"{self.fraction:5.2f} {' '.join(filter(None, self.kind))}: "
            f"{self.error:.2e} off, promised {allowed:.1e}, in {self.site.name!r}"
        )

    def again(self) -> str:
        operands = zip(("--x", "--dy"), self.trial, strict=False)
        written = " ".join(f'{option} "{expression(values)}"' for option, values in operands)
        return f"python tests/search_for_worst.py --judge '{self.site.name}' {written}"


# How a trial is changed. All operands change at the same places, or one of them does.


def _place(rng: np.random.Generator, size: int) -> slice:
    """A stretch, of whole strides if it is long enough."""
    stride = int(pick(rng, STRIDES))
    if stride >= size:
        stride = 1
    long = min(length(rng, 256) * stride, size)
    begin = int(rng.integers(0, (size - long) // stride + 1)) * stride
    if rng.random() < 0.2:
        begin = 0
    return slice(begin, begin + long)


def _set_block(rng: np.random.Generator, x: np.ndarray) -> None:
    kept = rng.random() < 0.8
    x[_place(rng, len(x))] = pick(rng, x) if kept else palette(rng, 1)[0]


def _set_comb(rng: np.random.Generator, x: np.ndarray) -> None:
    """Every so many values."""
    place, step = _place(rng, len(x)), length(rng, min(len(x), 256))
    x[place.start : place.stop : step] = pick(rng, x)


def _tile(rng: np.random.Generator, x: np.ndarray) -> None:
    place, source = _place(rng, len(x)), _place(rng, len(x))
    if rng.random() < 0.5:
        place = slice(0, len(x))
    x[place] = np.resize(x[source], place.stop - place.start)


def _stretch(rng: np.random.Generator, x: np.ndarray) -> None:
    stride = length(rng, min(len(x), 256))
    x[:] = np.repeat(x[: -(-len(x) // stride)], stride)[: len(x)]


def _change_values(rng: np.random.Generator, x: np.ndarray) -> None:
    """Another mantissa for all that are equal."""
    value = pick(rng, x)
    kind = rng.integers(5)
    if kind == 0:
        other = value + np.spacing(value) * rng.integers(-4, 5)
    elif kind == 1:
        other = value + np.spacing(value) * rng.integers(-(1 << 20), 1 << 20)
    elif kind == 2:
        other = value * rng.uniform(0.5, 2)
    elif kind == 3:
        other = palette(rng, 1)[0]
    else:
        other = np.nextafter(pick(rng, x), rng.normal()) * pick(rng, (1, 2, 0.5, -1))
    x[x == value] = other


def _scale(rng: np.random.Generator, x: np.ndarray) -> None:
    x *= x.dtype.type(rng.uniform(1, 2))


def _shift(rng: np.random.Generator, x: np.ndarray) -> None:
    x += x.dtype.type(rng.normal() * 10 ** rng.uniform(-3, 5) * np.ptp(x))


def _spread(rng: np.random.Generator, x: np.ndarray) -> None:
    x += x.dtype.type(rng.normal() * np.ptp(x)) * (x == pick(rng, x))


def _roll(rng: np.random.Generator, x: np.ndarray) -> None:
    x[:] = np.roll(x, length(rng, len(x)) * pick(rng, (-1, 1)))


def _swap(rng: np.random.Generator, x: np.ndarray) -> None:
    a, b = _place(rng, len(x)), _place(rng, len(x))
    long = min(a.stop - a.start, b.stop - b.start)
    of_a, of_b = x[a][:long].copy(), x[b][:long].copy()
    x[a.start : a.start + long] = of_b
    x[b.start : b.start + long] = of_a


def _set_few(rng: np.random.Generator, x: np.ndarray) -> None:
    few = rng.integers(0, len(x), length(rng, 8))
    x[few] = pick(rng, x)


def _set_first(rng: np.random.Generator, x: np.ndarray) -> None:
    x[: length(rng, min(len(x), 300))] = pick(rng, x)


def _reorder(rng: np.random.Generator, x: np.ndarray) -> None:
    place = _place(rng, len(x))
    if rng.random() < 0.5:
        x[place] = np.sort(x[place])
    else:
        x[place] = x[place][::-1].copy()


def _transpose(rng: np.random.Generator, x: np.ndarray) -> None:
    """What was one after the other is one after the other in a lane."""
    stride = int(pick(rng, STRIDES))
    whole = len(x) // stride * stride
    x[:whole] = x[:whole].reshape(stride, -1).T.ravel()


AT_PLACES = (
    *(_set_block, _set_block, _set_block, _set_comb, _tile, _tile, _stretch, _roll, _swap),
    *(_set_few, _set_few, _set_first, _set_first, _reorder, _transpose),
)
OF_VALUES = (_change_values, _change_values, _change_values, _scale, _scale, _shift, _spread)


def child(rng: np.random.Generator, parents: Sequence[Trial]) -> Trial:
    trial = tuple(values.copy() for values in pick(rng, parents))
    other = pick(rng, parents)
    if rng.random() < 0.2:
        place = _place(rng, len(trial[0]))
        for values, more in zip(trial, other, strict=True):
            values[place] = more[place]
    for _ in range(rng.geometric(0.5)):
        of_values = rng.random() < 0.3
        change = pick(rng, OF_VALUES if of_values else AT_PLACES)
        if len(trial) == 1 or of_values or rng.random() < 0.5:
            change(rng, pick(rng, trial))
        else:
            again = int(rng.integers(1 << 32))
            for values in trial:
                change(np.random.default_rng(again), values)
    return trial


def litter(rng: np.random.Generator, trial: Trial) -> Trial:
    """A trial and others of the same structure: how values round hangs on their last bits."""
    many = [np.tile(values, (LITTER, 1)) for values in trial]
    changed = pick(rng, many)
    dtype = changed.dtype
    if rng.random() < 0.5:
        changed[1:] *= rng.uniform(1, 2, (LITTER - 1, 1)).astype(dtype)
    else:
        value = pick(rng, changed[0])
        size = np.ptp(changed[0]) * 10 ** -rng.uniform(0, 7)
        others = value + size * rng.normal(0, 1, (LITTER - 1, 1)).astype(dtype)
        changed[1:] = np.where(changed[1:] == value, others, changed[1:])
    return tuple(many)


# The search


class Hunt:
    """One site, direction and dtype: what is worst there so far, and the next generation."""

    def __init__(
        self, site: Site, direction: str, dtype: str, seed: int, values: int | None = None
    ) -> None:
        self.site, self.backward = site, direction == "backward"
        self.dtype = np.dtype(dtype)
        self.name = f"{site.name} {direction} {dtype}"
        self.rng = np.random.default_rng([seed, zlib.crc32(self.name.encode())])
        most = VALUES[self.dtype] if values is None else values
        wanted = min(max(most // site.size, FEWEST), MOST)
        self.trials = max(wanted // site.trials, 1) * site.trials
        self.kept: dict[tuple[str, bool], list[Case]] = {}
        self.worst: dict[tuple[str, bool], Case] = {}
        self.generations, self.waited = 0, 0

    @property
    def fraction(self) -> float:
        return max((case.fraction for case in self.worst.values()), default=0.0)

    def _fresh(self, elsewhere: Sequence[Trial]) -> Trial:
        fitting = [trial for trial in elsewhere if len(trial) == 1 + self.backward]
        if fitting and self.rng.random() < 0.3:
            found = fitting[self.rng.integers(len(fitting))]
            size = self.site.size
            resized = tuple(np.resize(values, size).astype(self.dtype) for values in found)
            return child(self.rng, [resized])
        x = draw(self.rng, self.site.size).astype(self.dtype)
        if not self.backward:
            return (x,)
        return x, draw_upstream(self.rng, x).astype(self.dtype)

    def generation(self, elsewhere: Sequence[Trial] = ()) -> tuple[np.ndarray, ...]:
        """Judge a new generation, and return its operands."""
        self.generations += 1
        if self.generations % NORMAL_EVERY == 1 and not self.backward:
            shape = (self.trials, self.site.size)
            self._select((normal(self.rng, shape).astype(self.dtype),), of_normal=True)
        parents = [
            case.trial
            for (quantity, _), cases in self.kept.items()
            if "normal" not in quantity
            for case in cases
        ]
        with np.errstate(all="ignore"):
            litters = [
                litter(
                    self.rng,
                    child(self.rng, parents)
                    if parents and self.rng.random() < 0.8
                    else self._fresh(elsewhere),
                )
                for _ in range(-(-self.trials // LITTER))
            ]
        operands = tuple(
            np.concatenate(values)[: self.trials] for values in zip(*litters, strict=True)
        )
        operands = tuple(np.where(tame(values), values, 0) for values in operands)
        self._select(operands)
        return operands

    def _select(self, operands: tuple[np.ndarray, ...], of_normal: bool = False) -> None:
        worse = False
        for quantity, errors in judge(self.site, *operands, normal=of_normal).items():
            fractions = errors.of_promised(quantity, self.dtype)
            for outliers in (False, True):
                own = np.where(errors.outliers == outliers, fractions, np.nan)
                key = (quantity, outliers)
                kept = self.kept.get(key, [])
                floor = kept[-1].fraction if len(kept) == KEPT else 0.0
                better = np.flatnonzero(own > floor)
                better = better[np.argsort(-own[better])][: 2 * KEPT]
                cases = [
                    Case(
                        *(float(own[t]), float(errors.error[t]), quantity, outliers, self.site),
                        tuple(values[t].copy() for values in operands),
                    )
                    for t in better
                ]
                # Of those that are as far off one is enough: the others are the same, moved.
                unlike = {case.fraction: case for case in [*cases, *kept]}
                if not unlike:
                    continue
                self.kept[key] = sorted(unlike.values(), key=lambda case: -case.fraction)[:KEPT]
                first = self.kept[key][0]
                worse |= not kept or first.fraction > kept[0].fraction
                if key not in self.worst or first.fraction > self.worst[key].fraction:
                    self.worst[key] = first
        self.waited = 0 if worse else self.waited + (not of_normal)
        if self.waited >= PATIENCE:
            self.kept, self.waited = {}, 0


def tame(values: np.ndarray) -> np.ndarray:
    """Neither infinite nor so large that the differences of such values may be."""
    return np.abs(values) < np.finfo(values.dtype).max / 8


def differing_bits(site: Site, operands: tuple[np.ndarray, ...]) -> str | None:
    """What changes the bits of a result, where nothing should."""
    expected = run(site, *operands)
    before, wanted, allowed = _core.active_isa(), _threads._wanted, _threads.allowed_threads
    serial = _threads.SERIAL_BYTES, _threads.BYTES_PER_THREAD
    caches = _core.cache_sizes()
    order = np.arange(len(operands[0]))[::-1]

    def as_expected(found: dict[str, np.ndarray], back: slice | np.ndarray) -> bool:
        with np.errstate(invalid="ignore"):
            return all(
                np.array_equal(found[name][back], expected[name], equal_nan=True) for name in found
            )

    try:
        for isa in bnfast.available_isas():
            _core.activate(isa)
            if not as_expected(run(site, *operands), slice(None)):
                return f"instruction set {isa}"
        if not as_expected(run(site, *(values[order] for values in operands)), order):
            return "its neighbours"
        for sizes in ((0, 0), (0, 1 << 40), (1 << 40, 1 << 40)):
            _core.assume_cache_sizes(*sizes)
            if not as_expected(run(site, *operands), slice(None)):
                return f"sizes of the caches: {sizes}"
        _threads.SERIAL_BYTES, _threads.BYTES_PER_THREAD = 0, 1
        _threads.allowed_threads = lambda: 64  # also on one processor
        bnfast.set_num_threads(2)
        if not as_expected(run(site, *operands), slice(None)):
            return "two threads"
    finally:
        _core.activate(before)
        _core.assume_cache_sizes(*caches)
        _threads.allowed_threads = allowed
        _threads.SERIAL_BYTES, _threads.BYTES_PER_THREAD = serial
        bnfast.set_num_threads(wanted)
    return None


def hunts(
    seed: int,
    member: str | None = None,
    layout: str | None = None,
    direction: str | None = None,
    dtype: str | None = None,
    shape: str | None = None,
) -> list[Hunt]:
    """All that are wanted."""
    wide_enough = np.finfo(np.longdouble).eps < np.finfo(np.float64).eps
    return [
        Hunt(site, way, kind, seed)
        for kind in ("float32", "float64")
        for site in all_sites().values()
        for way in ("forward", "backward")
        if member in (None, site.member)
        and layout in (None, site.layout)
        and direction in (None, way)
        and dtype in (None, kind)
        and shape in (None, "x".join(map(str, site.shape)))
        and not (way == "forward" and site.columns)
        and not (way == "backward" and site.member == "moments")
        and (kind == "float32" or wide_enough)
    ]


def worst_of(found: Iterable[Hunt]) -> list[Case]:
    """The worst of each kind, the worst first."""
    worst: dict[tuple[str, ...], Case] = {}
    for hunt in found:
        for case in hunt.worst.values():
            if case.kind not in worst or case.fraction > worst[case.kind].fraction:
                worst[case.kind] = case
    return sorted(worst.values(), key=lambda case: -case.fraction)


def search(wanted: list[Hunt], seconds: float, seed: int, generations: int = 8) -> None:
    """All in turn, and between them those again that are nearest to breaking the promise."""
    rng, ends, shown = np.random.default_rng(seed), time.monotonic() + seconds, 0.0
    wanted = [wanted[k] for k in rng.permutation(len(wanted))]
    for turn in range(10**9):
        first = turn < len(wanted)
        hunt = wanted[(turn if first else turn // 2) % len(wanted)]
        if turn % 2 and not first:
            ranked = sorted(wanted, key=lambda one: -one.fraction)
            hunt = ranked[min(int(rng.exponential(len(ranked) / 8)), len(ranked) - 1)]
        elsewhere = [
            case.trial
            for other in rng.choice(wanted, min(8, len(wanted)), replace=False)
            for case in other.worst.values()
        ]
        operands: tuple[np.ndarray, ...] = ()
        for _ in range(1 if first else generations):
            operands = hunt.generation(elsewhere)
            if time.monotonic() > ends:
                return
        differing = differing_bits(hunt.site, operands)
        if differing:
            print(f"{hunt.name}: bits depend on {differing}", flush=True)
        if hunt.fraction > shown:
            shown = hunt.fraction
            print(max(hunt.worst.values(), key=lambda case: case.fraction), flush=True)


def judge_again(name: str, x: str, dy: str | None) -> None:
    site = all_sites()[name]
    operands = [np.tile(evaluated(text), (site.trials, 1)) for text in (x, dy) if text is not None]
    true = exact(operands[0][:1], site.centred)
    mean, std = float(true.mean[0]), float(true.variance[0]) ** 0.5
    print(f"{name}: mean {mean:.6g}, standard deviation {std:.6g}")
    for quantity, errors in judge(site, *operands).items():
        fraction = errors.of_promised(quantity, operands[0].dtype)[0]
        print(f"{quantity}: {errors.error[0]:.2e} off, {fraction:.2f} of what is promised")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    members = sorted({site.member for site in all_sites().values()})
    parser.add_argument("--member", choices=members)
    parser.add_argument("--layout", choices=sorted({s.layout for s in all_sites().values()}))
    parser.add_argument("--direction", choices=["forward", "backward"])
    parser.add_argument("--dtype", choices=["float32", "float64"])
    parser.add_argument("--shape", help="one shape alone, such as 128x256")
    parser.add_argument(
        "--judge", metavar="SITE", help="judge one input: --x and, for backward, --dy"
    )
    parser.add_argument("--x", help="an expression of NumPy")
    parser.add_argument("--dy", help="an expression of NumPy")
    given = parser.parse_args()
    bnfast.set_num_threads(1)
    if given.judge:
        judge_again(given.judge, given.x, given.dy)
        return
    of = (given.member, given.layout, given.direction, given.dtype, given.shape)
    wanted = hunts(given.seed, *of)
    if not wanted:
        parser.error("no such site")
    print(f"seed {given.seed}, {len(wanted)} hunts, {given.seconds:g} s", flush=True)
    try:
        search(wanted, given.seconds, given.seed)
    except KeyboardInterrupt:
        print("interrupted")
    print()
    for case in worst_of(wanted):
        print(case)
        print("   ", case.again())


if __name__ == "__main__":
    main()
