"""Measure what statistics of arrays cost and how exact they are, in NumPy and in bnfast.

    python benchmarks/statistics_of_arrays.py             about two minutes
    python benchmarks/statistics_of_arrays.py --write     the tables of docs/statistics.md
    python benchmarks/statistics_of_arrays.py --quick     a trial

All are measured in one run, in turn. NumPy's time is that of `np.mean` and `np.std`; errors are of
the standard deviation, relative to float64. The time of one thread is that of the processor, which
other programs on the machine hardly lengthen; the time of two is the clock's.
"""

import argparse
import time

import numpy as np

import bnfast
from bnfast._cli.bench.run import machine
from make_tables import DOCS, write_between

NORMAL = np.random.default_rng(0)
ARRAYS = (  # layout, shape, type, axis of the channels
    ("NHWC", (128, 224, 224, 3), np.float32, -1),
    ("NHWC", (32, 112, 112, 64), np.float32, -1),
    ("NCHW", (32, 64, 112, 112), np.float32, 1),
    ("NHWC", (256, 224, 224, 3), np.uint8, -1),
)
ROWS = 16_000_000  # of three channels, for the errors


def data(shape, dtype, mean=0.0):
    if dtype == np.uint8:
        return NORMAL.integers(0, 256, shape).astype(dtype)
    x = NORMAL.standard_normal(shape, dtype)
    x += np.float32(mean)
    return x


def exact_std(x, axis):
    """Of two passes in float64, channel by channel."""
    channels = (channel.astype(np.float64) for channel in np.moveaxis(x, axis, 0))
    return np.array([channel.std() for channel in channels])


def error(std, exact):
    return f"{np.max(np.abs(std - exact) / exact):.0e}"


def medians(calls, budget, clock):
    """Seconds of each call, in turn; the first turn does not count."""
    turns = []
    end = time.perf_counter() + budget
    while len(turns) < 6 or time.perf_counter() < end:
        turns.append([])
        for call in calls:
            began = clock()
            call()
            turns[-1].append(clock() - began)
    return np.median(turns[1:], axis=0)


def speeds(layout, shape, dtype, axis, counts, budget):
    """One line for each number of threads."""
    x = data(shape, dtype)
    others = tuple(d for d in range(x.ndim) if d != axis % x.ndim)
    exact = exact_std(x, axis)
    errors = error(x.std(others), exact), error(bnfast.moments(x, axis).std, exact)
    calls = (
        lambda: (x.mean(others), x.std(others)),
        lambda: bnfast.moments(x, axis),
        lambda: bnfast.summary(x, axis),
    )
    for threads in counts:
        bnfast.set_num_threads(threads)
        clock = time.process_time if threads == 1 else time.perf_counter
        numpy, moments, summary = medians(calls, budget, clock)
        yield [
            *(layout, "x".join(map(str, shape)), np.dtype(dtype).name, str(threads)),
            *(f"{numpy * 1e3:.4g} ({errors[0]})", f"{moments * 1e3:.3g} ({errors[1]})"),
            *(f"{numpy / moments:.1f}", f"{summary / moments:.2f}"),
            f"{x.nbytes / moments / 1e9:.1f}",
        ]


def deviations(rows):
    """What is found of a standard deviation of 1."""
    for mean in (0, 100, 10_000):
        x = data((rows, 3), np.float32, mean)
        exact = exact_std(x, -1)
        found = x.std(0), bnfast.moments(x).std
        yield [f"{mean:,}", *(f"{std[0]:.4f} ({error(std, exact)})" for std in found)]


def table(headings, names, lines):
    rules = ["---" if number < names else "---:" for number in range(len(headings))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, rules, *lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small arrays, short turns")
    parser.add_argument("--write", action="store_true", help="write docs/statistics.md")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    options = parser.parse_args()
    rows = 100_000 if options.quick else ROWS
    exactness = table(["mean", "`np.std`", "`bnfast.moments(x).std`"], 1, deviations(rows))
    headings = ["layout", "shape", "type", "threads", "`np.mean`, `np.std`: ms", "`moments`: ms"]
    headings += ["times as fast", "`summary` / `moments`", "`moments`: GB/s"]
    lines = []
    for layout, shape, dtype, axis in ARRAYS:
        shape = (2, *shape[1:]) if options.quick else shape
        budget = 0.1 if options.quick else 10.0
        lines += speeds(layout, shape, dtype, axis, options.threads, budget)
    here = machine()
    about = f"{here['cpu']}, {here['instruction set']}; NumPy {np.__version__}."
    parts = {"exactness": [exactness], "speed": [table(headings, 3, lines), about]}
    for name, texts in parts.items():
        if options.write:
            write_between(DOCS / "statistics.md", name, texts)
        else:
            print(*texts, "", sep="\n\n")


if __name__ == "__main__":
    main()
