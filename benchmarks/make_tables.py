"""Measure bnfast against the NumPy formulas and write the table of the README.

    python benchmarks/make_tables.py            print the table
    python benchmarks/make_tables.py --write    put it between the markers in README.md

All take turns, call by call: bnfast with a fresh output, bnfast with out=, NumPy with its fresh
output; medians. The error is the largest of the output against float64.
"""

import argparse
import platform
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

import bnfast
from bnfast import _reference as reference
from bnfast._cli import numpy_formulas
from workloads import Workload, in_layout

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

IMAGES = Workload("", (32, 64, 56, 56))
SMALL_PLANES = Workload("", (50, 512, 7, 7))


def cpu():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def take_turns(calls, seconds=2.0):
    """Median times in seconds; tiny calls are timed a hundred at a time."""
    for call in calls:
        call()
    start = perf_counter()
    calls[0]()
    many = 1 if perf_counter() - start > 1e-4 else 100
    times = [[] for _ in calls]
    end = perf_counter() + seconds
    while perf_counter() < end or len(times[0]) < 5:
        for call, record in zip(calls, times, strict=True):
            start = perf_counter()
            for _ in range(many):
                call()
            record.append((perf_counter() - start) / many)
    return [median(record) for record in times]


def rows(workload, layout, offset=0.0):
    shape, axis = in_layout(workload, layout)
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, np.float32) + np.float32(offset)
    dy = rng.standard_normal(shape, np.float32)
    weight, bias = rng.uniform(0.5, 1, (2, shape[axis])).astype(np.float32)
    exact = bnfast.moments(x, axis)
    mean, var = exact.mean.astype(np.float32), exact.var.astype(np.float32)
    invstd = 1 / np.sqrt(exact.var + 1e-5)
    affine = weight, bias
    statistics = mean, var, weight, bias
    wide, narrow = (exact.mean, invstd, weight), (mean, invstd.astype(np.float32), weight)
    yield (
        "training",
        lambda out=None: bnfast.batch_norm_forward(x, *affine, axis=axis, out=out)[0],
        lambda: numpy_formulas.batch_norm_forward(x, *affine, axis=axis)[0],
        lambda: reference.batch_norm_forward(x, *affine, axis=axis)[0],
    )
    if offset:
        return
    yield (
        "inference",
        lambda out=None: bnfast.batch_norm(x, *statistics, axis=axis, out=out),
        lambda: numpy_formulas.batch_norm_inference(x, *statistics, axis=axis),
        lambda: reference.scale_shift(x, *statistics, axis=axis),
    )
    yield (
        "backward",
        lambda out=None: bnfast.batch_norm_backward(dy, x, *wide, axis=axis, out=out)[0],
        lambda: numpy_formulas.batch_norm_backward(dy, x, *narrow, axis=axis)[0],
        lambda: reference.batch_norm_backward(dy, x, *wide, axis=axis)[0],
    )


def tiny_rows():
    """What a call costs: against the formulas, and against one multiplication and addition."""
    x = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
    statistics = np.random.default_rng(0).uniform(0.5, 1, (4, 64)).astype(np.float32)
    mean, var, weight, bias = statistics
    scale = weight / np.sqrt(var + np.float32(1e-5))
    shift = bias - mean * scale

    def expected():
        return reference.scale_shift(x, *statistics)

    def ours(out=None):
        return bnfast.batch_norm(x, *statistics, out=out)

    def formulas():
        return numpy_formulas.batch_norm_inference(x, *statistics)

    yield "inference", ours, formulas, expected
    yield "inference, against x*a+b", ours, lambda: x * scale + shift, expected


def in_units(seconds):
    return f"{seconds * 1e3:.2f} ms" if seconds > 1e-4 else f"{seconds * 1e6:.1f} µs"


def table():
    lines = [
        "| float32, one thread | bnfast | bnfast, `out=` | NumPy | ratio "
        "| error of bnfast | of NumPy |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    cases = [
        *[
            (f"{'x'.join(map(str, in_layout(w, layout)[0]))}, {layout.upper()}{note}", row)
            for w, layout, offset, note in (
                (IMAGES, "nchw", 0.0, ""),
                (IMAGES, "nhwc", 0.0, ""),
                (IMAGES, "nchw", 1e4, ", mean 1e4"),
                (IMAGES, "nhwc", 1e4, ", mean 1e4"),
                (SMALL_PLANES, "nchw", 0.0, ""),
            )
            for row in rows(w, layout, offset)
        ],
        *[("2x64", row) for row in tiny_rows()],
    ]
    for where, (operation, ours, theirs, expected) in cases:
        exact = expected()
        errors = [float(np.abs(call() - exact).max()) for call in (ours, theirs)]
        out = ours()
        seconds = take_turns((ours, lambda out=out, ours=ours: ours(out), theirs))
        cells = [
            f"{operation}, {where}",
            *map(in_units, seconds),
            f"{seconds[2] / seconds[0]:.1f}",
            *(f"{error:.0e}" for error in errors),
        ]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr)
    isa = bnfast.show_config(mode="dicts")["instruction sets"]["active"]
    lines += [
        "",
        f"{cpu()}, {isa}; Python {platform.python_version()}, NumPy {np.__version__}, bnfast "
        f"{bnfast.__version__}. Medians of calls in turn, so that each finds the caches and the "
        "memory that another left; the ratio is of fresh outputs on both sides; the error is the "
        "largest of the output against float64. Made by "
        "`python benchmarks/make_tables.py --write`.",
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into README.md")
    options = parser.parse_args()
    bnfast.set_num_threads(1)
    made = table()
    if not options.write:
        print(made)
        return
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}")


if __name__ == "__main__":
    main()
