"""Data of 16 bits beside float32, and beside the libraries that take 16 bits, in turn.

``python benchmarks/bench_halves.py`` prints the tables of docs/half_precision.md, and writes them
with ``--write``, in about ten minutes; pytest keeps track of bnfast itself. Times are medians: with
one thread of the process's CPU time, which other programs on the machine hardly lengthen, with more
threads of the clock's.
"""

import argparse
import itertools
import sys
import time

import numpy as np
import pytest

import bnfast
from bnfast import _dtypes
from bnfast._cli.bench.cell import ARRAYS_MOVED, Cell, slices
from bnfast._cli.bench.normalizations import NORMALIZATIONS, exact_result, make_data
from bnfast._cli.bench.rivals import PEERS, NotOffered, enter, first
from bnfast._cli.bench.run import machine
from bnfast._cli.bench.timing import SETTLE
from bnfast._cli.bench.workloads import name_of
from make_tables import DOCS, write_between
from statistics_of_arrays import table

pytestmark = pytest.mark.benchmark(max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=2)

TYPES = ("float32", "float16", "bfloat16")
HALVES = TYPES[1:]
RIVALS = ("pytorch", "onednn", "numpy")
LAYOUTS = ("nchw", "nhwc")
IN_CACHE, PAST_CACHES = (8, 256, 14, 14), (96, 64, 112, 112)
TRACKED = IN_CACHE, (32, 64, 112, 112)
OPERATIONS = NORMALIZATIONS["batch"].operations

# A turn lasts at least so many seconds. A call that takes longer leaves nothing of its data in the
# caches, and needs no calls before it that are not timed.
TURN, LONG = 2e-3, 10e-3
FEWEST_TURNS = 3


@pytest.fixture(params=itertools.product(TYPES, TRACKED, LAYOUTS), ids=str)
def data(request):
    """Arrays for one workload, the statistics of its x, and an array to write to."""
    dtype, shape, layout = request.param
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    return make_data("batch", shape, layout, _dtypes.named(dtype), mean=1.5)


@pytest.mark.parametrize("operation", OPERATIONS)
def bench_halves(measure, data, operation):
    call = NORMALIZATIONS["batch"].ours(operation, data, data.out)
    cell = Cell("batch", operation, data)
    measure(lambda: first(call()), ARRAYS_MOVED[operation], lambda: exact_result(cell), True)


def contenders(operation, data, rivals):
    """Return what is to be called and read: bnfast for each type, and each rival of 16 bits."""
    entered = {}
    for dtype, arrays in data.items():
        cell = Cell("batch", operation, arrays)
        ours = NORMALIZATIONS["batch"].ours(operation, arrays, arrays.out)
        entered["bnfast", dtype] = ours, first
        if dtype not in HALVES:
            continue
        for name, rival in rivals.items():
            try:
                contender = enter(rival, cell, False)
            except NotOffered:
                continue
            entered[name, dtype] = contender.call, contender.read
    return entered


def medians(calls, budget, clock, settle):
    """Return the seconds of each call, in turn, each until it has taken its share of the budget.

    A turn of a short call begins with calls that are not timed. With `settle` it waits until the
    idle threads of the turn before are asleep.
    """
    estimates, turns = {}, {name: [] for name in calls}
    for name, call in calls.items():
        call()
        began = clock()
        call()
        estimates[name] = max(clock() - began, 1e-6)
    share, names = budget / len(calls), list(calls)
    left = dict.fromkeys(calls, share)
    while names:
        for name in names:
            call, many = calls[name], max(1, round(TURN / estimates[name]))
            started = time.perf_counter()
            time.sleep(SETTLE if settle else 0)
            for _ in range(many if estimates[name] < LONG else 0):
                call()
            began = clock()
            for _ in range(many):
                call()
            turns[name].append((clock() - began) / many)
            left[name] -= time.perf_counter() - started
        names.append(names.pop(0))  # so that none always follows the same neighbour
        names = [name for name in names if left[name] > 0 or len(turns[name]) < FEWEST_TURNS]
    return {name: float(np.median(seconds)) for name, seconds in turns.items()}


def rounded_otherwise(result, exact):
    """Return the share of the elements that are not the exact value, rounded once."""
    parts = slices(len(exact), exact.size)
    wrong = sum(int((result[p] != exact[p].astype(result.dtype)).sum()) for p in parts)
    return wrong / exact.size


def speeds(shapes, threads, budget):
    """One line for each operation, layout and shape, with so many threads."""
    bnfast.set_num_threads(threads)
    rivals = {name: PEERS[name].load(threads) for name in RIVALS if not PEERS[name].missing()}
    clock = time.process_time if threads == 1 else time.perf_counter
    for shape, layout in itertools.product(shapes, LAYOUTS):
        data = {dtype: make_data("batch", shape, layout, _dtypes.named(dtype)) for dtype in TYPES}
        for operation in OPERATIONS:
            print(f"{operation} {layout} {name_of(shape)}, {threads} threads", file=sys.stderr)
            entered = contenders(operation, data, rivals)
            seconds = medians(
                {key: call for key, (call, _) in entered.items()}, budget, clock, threads > 1
            )
            full = seconds["bnfast", "float32"]
            ours = {dtype: seconds["bnfast", dtype] for dtype in HALVES}
            line = [operation, layout.upper(), name_of(shape), str(threads), f"{full * 1e3:.3g}"]
            line += [f"{full / ours[dtype]:.2f}" for dtype in HALVES]
            for name, dtype in itertools.product(RIVALS, HALVES):
                theirs = seconds.get((name, dtype))
                line.append("—" if theirs is None else f"{theirs / ours[dtype]:.2f}")
            yield line


def shares(shape):
    """One line for each operation and type: who rounds how much otherwise than the exact value."""
    rivals = {name: PEERS[name].load(1) for name in RIVALS if not PEERS[name].missing()}
    for dtype in HALVES:
        data = make_data("batch", shape, "nchw", _dtypes.named(dtype), mean=3)
        for operation in OPERATIONS:
            exact = exact_result(Cell("batch", operation, data))
            entered = contenders(operation, {dtype: data}, rivals)
            line = [dtype, operation]
            for name in ("bnfast", *RIVALS):
                if (name, dtype) not in entered:
                    line.append("—")
                    continue
                call, read = entered[name, dtype]
                result = read(call())
                error = np.abs(result.astype(np.float64) - exact).max()
                line.append(f"{rounded_otherwise(result, exact):.4%} ({error:.0e})")
            yield line


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small arrays, short turns")
    parser.add_argument("--write", action="store_true", help="write docs/half_precision.md")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="default: 1")
    options = parser.parse_args()
    shapes = (IN_CACHE,) if options.quick else (IN_CACHE, PAST_CACHES)
    budget = 0.05 if options.quick else 8.0
    titles = [PEERS[name].title for name in RIVALS]
    exactness = table(["type", "operation", "bnfast", *titles], 2, shares(IN_CACHE))
    headings = ["operation", "layout", "shape", "threads", "float32: ms"]
    headings += [f"{dtype}: times as fast" for dtype in HALVES]
    headings += [f"{title}, {dtype}" for title in titles for dtype in HALVES]
    lines = [line for count in options.threads for line in speeds(shapes, count, budget)]
    told = [n for n in range(len(headings)) if any(line[n] != "—" for line in lines)]
    headings, *lines = ([line[n] for n in told] for line in (headings, *lines))
    here = machine()
    versions = [
        f"{PEERS[name].title} {PEERS[name].load(1).version}"
        for name in RIVALS
        if not PEERS[name].missing()
    ]
    about = f"{here['cpu']}, {here['instruction set']}; {', '.join(versions)}."
    parts = {"exactness": [exactness], "speed": [table(headings, 3, lines), about]}
    for name, texts in parts.items():
        if options.write:
            write_between(DOCS / "half_precision.md", name, texts)
        else:
            print(*texts, "", sep="\n\n")


if __name__ == "__main__":
    main()
