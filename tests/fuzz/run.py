"""Fuzzes every public function and layer of bnfast, and says what is wrong.

    python tests/fuzz --seconds 3600 --seed 0 --only layer_norm_backward

draws calls with values, shapes, memory and arguments that are awkward, and sequences of what users
do to layers, and holds what comes back against definitions of its own (``oracle*.py``) and against
itself, on other instruction sets, numbers of threads, sizes of caches and float modes. Where
something is wrong it prints the line that repeats the case,

    python tests/fuzz --case 123

It ends with how many calls were made of each function and layer; with 1 if something was wrong.
After a crash, the file that it names in the beginning has the number of the case.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fuzz import bad_arguments, layer_sequences, other_cases, value_cases
from fuzz.calls import CALLS
from fuzz.case import Outcome
from fuzz.layers import LAYERS
from fuzz.other_cases import OTHERS

Kind = Callable[[str, np.random.Generator], Outcome]

# What a case is, by its number: each subject in turn.
KINDS: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "values": (value_cases.run, tuple(CALLS)),
    "wrong arguments": (bad_arguments.run, tuple(CALLS)),
    "sequences": (layer_sequences.run, tuple(LAYERS)),
    "others": (other_cases.run, tuple(OTHERS)),
}
SUBJECTS = [(kind, name) for kind, (_, names) in KINDS.items() for name in names]

# Between the cases of two seeds.
CASES_OF_SEED = 10**9


def subject(number: int) -> tuple[str, str]:
    return SUBJECTS[number % len(SUBJECTS)]


def run_case(number: int) -> Outcome:
    """One case; what the fuzzer itself raises is a complaint, too."""
    kind, name = subject(number)
    try:
        return KINDS[kind][0](name, np.random.default_rng(number))
    except Exception:
        outcome = Outcome()
        outcome.complain(traceback.format_exc())
        return outcome


def numbers(seed: int, only: str | None) -> Iterator[int]:
    """Of all cases, or of those of a function, a layer, or a kind."""
    number = seed * CASES_OF_SEED
    while True:
        if only is None or only in subject(number):
            yield number
        number += 1


def report(number: int, outcome: Outcome) -> str:
    """What is wrong, and how to see it again."""
    kind, name = subject(number)
    complaints = "\n".join(f"  {text}" for text in outcome.complaints)
    again = f"python tests/fuzz --case {number}"
    return f"WRONG: {name}, {kind}: {again}\n  {outcome.description}\n{complaints}"


class Totals:
    """What was done so far."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.cases = self.refused = self.wrong = 0
        self.began = time.monotonic()

    def add(self, outcome: Outcome) -> None:
        self.calls.update(outcome.calls)
        self.cases += 1
        self.refused += outcome.refused
        self.wrong += bool(outcome.complaints)

    def __str__(self) -> str:
        seconds = max(time.monotonic() - self.began, 1e-9)
        total = sum(self.calls.values())
        return (
            f"{total} calls in {self.cases} cases, {self.refused} refused as they should be, "
            f"{self.wrong} cases wrong, {total / seconds:.0f} calls per second"
        )


def fuzz(totals: Totals, given: argparse.Namespace) -> None:
    """Case after case, until the time is over, or too much is wrong."""
    with tempfile.NamedTemporaryFile("w", prefix="bnfast-fuzz-", delete=False) as current:
        print(f"the case in hand stands in {current.name}", flush=True)
        for number in numbers(given.seed, given.only):
            seconds = time.monotonic() - totals.began
            if seconds > given.seconds or totals.wrong >= given.failures:
                break
            os.pwrite(current.fileno(), f"{number:<24}\n".encode(), 0)
            outcome = run_case(number)
            totals.add(outcome)
            if outcome.complaints:
                print(report(number, outcome), flush=True)
    os.unlink(current.name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz as the command line says; 1 if something is wrong."""
    parser = argparse.ArgumentParser(
        prog="python tests/fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="a function, a layer, or: " + ", ".join(KINDS))
    parser.add_argument("--case", type=int, help="the number of one case")
    parser.add_argument("--failures", type=int, default=20, help="so many, and it ends")
    given = parser.parse_args(arguments)
    if given.only is not None and not any(given.only in each for each in SUBJECTS):
        parser.error(f"--only: there is no {given.only}")
    warnings.simplefilter("ignore")  # cases look at those of the calls themselves
    totals = Totals()
    if given.case is not None:
        outcome = run_case(given.case)
        totals.add(outcome)
        print(report(given.case, outcome) if outcome.complaints else outcome.description)
        print(totals)
        return min(totals.wrong, 1)
    with contextlib.suppress(KeyboardInterrupt):  # which ends it early
        fuzz(totals, given)
    for name, count in sorted(totals.calls.items()):
        print(f"{count:9} {name}")
    print(totals)
    return min(totals.wrong, 1)
