"""Contenders measured in turn, call by call."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter, sleep

import numpy as np

# A turn lasts at least this long: the clock is read after so many calls.
TURN = 200e-6

# And begins with calls that are not timed, for as long as this, one at least: after the others'
# turns, a contender of 10 MiB took up to seven calls until the last-level cache was its own again.
WARM_UP = 2e-3

# Where even the fastest takes longer than this, a call leaves nothing in a cache for the next.
LONG = 10e-3

# An idle team of OpenMP threads spins for some milliseconds before it sleeps, on processors that
# the next contender needs. With every runtime left to its default, as its users have it, each one
# waits until the team before it sleeps, and its untimed calls wake its own.
SETTLE = 20e-3

FEWEST_ROUNDS, MOST_ROUNDS = 5, 40


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median of the rounds and their quartiles, or those of single calls."""

    median: float
    lower_quartile: float
    upper_quartile: float
    rounds: int
    p95: float | None = None  # the 95th percentile, of single calls alone

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, as a part of the median."""
        return (self.upper_quartile - self.lower_quartile) / 2 / self.median


def _seconds(call: Callable[[], object], many: int) -> float:
    """Time so many calls; what they return is dropped, and its memory given back, within."""
    start = perf_counter()
    for _ in range(many):
        call()
    return (perf_counter() - start) / many


def _one_by_one(
    call: Callable[[], object], turn: float, before: Callable[[], object]
) -> list[float]:
    """Time each call of a turn; by the clock, for one call says little of how long others take."""
    times: list[float] = []
    end = perf_counter() + turn
    while not times or perf_counter() < end:
        before()
        times.append(_seconds(call, 1))
    return times


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    budget: float,
    *,
    settle: bool = False,
    turn: float | None = None,
    before: Callable[[], object] | None = None,
) -> dict[str, Timing | Exception]:
    """Time all calls in turn until the budget of seconds is spent.

    Every contender once a round, and each round begins one further, so that none always follows the
    same neighbour's work in time. A turn begins with calls that are not timed: what is in the
    caches, and which threads are awake, is then the contender's own doing, as in a loop of its
    calls. A contender that raises leaves the rounds, and its exception is its result.

    A turn lasts for `turn` seconds, or `TURN`. With `before`, which is called before each call that
    is timed and takes no part in its time, every call is timed by itself.
    """
    failures: dict[str, Exception] = {}
    estimates: dict[str, float] = {}
    for name, call in calls.items():
        try:
            call()  # compiles, connects, allocates
            estimates[name] = _seconds(call, 1)
        except Exception as error:
            failures[name] = error
    turn = TURN if turn is None else turn
    many = {name: _calls_in(turn, t) for name, t in estimates.items()}
    cached = bool(estimates) and min(estimates.values()) < LONG
    untimed = {name: _calls_in(WARM_UP, t) if cached else 0 for name, t in estimates.items()}
    times: dict[str, list[list[float]]] = {name: [] for name in estimates}
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = perf_counter() + budget
        for number in range(MOST_ROUNDS):
            if number >= FEWEST_ROUNDS and perf_counter() > end:
                break
            for name in _rotated(list(times), number):
                try:
                    if settle:
                        sleep(SETTLE)
                    for _ in range(untimed[name]):
                        calls[name]()
                    times[name].append(
                        _one_by_one(calls[name], turn, before)
                        if before
                        else [_seconds(calls[name], many[name])]
                    )
                except Exception as error:
                    failures[name] = error
                    del times[name]
    finally:
        if collecting:
            gc.enable()
    results: dict[str, Timing | Exception] = dict(failures)
    for name, turns in times.items():
        lower, median, upper, p95 = np.percentile(np.concatenate(turns), (25, 50, 75, 95)).tolist()
        results[name] = Timing(median, lower, upper, len(turns), p95 if before else None)
    return {name: results[name] for name in calls}


def _calls_in(seconds: float, estimate: float) -> int:
    return max(1, math.ceil(seconds / max(estimate, 1e-9)))


def _rotated(names: list[str], number: int) -> list[str]:
    first = number % max(1, len(names))
    return names[first:] + names[:first]
