"""Measure, and write what the README and docs/ show of it.

    python benchmarks/make_tables.py              about twenty minutes
    python benchmarks/make_tables.py batch        batch norm alone; or family, or weights
    python benchmarks/make_tables.py --quick      a trial

The geometric means, and for batch norm the picture and what a call costs, go between the markers of
README.md, all cells with every loss into docs/benchmark.md and its neighbours of the family and of
the weights. Everything is measured by `python -m bnfast bench`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import bnfast
from bnfast import _reference as reference
from bnfast._cli.bench import report
from bnfast._cli.bench.rivals import numpy_formulas
from bnfast._cli.bench.timing import take_turns

ALT = "Ratios in every cell, and bandwidth with its limit"
ROOT = Path(__file__).parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"


def bench(*arguments):
    """Return what the command writes as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        command = [sys.executable, "-m", "bnfast", "bench", *arguments, "--json", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(path.read_text(encoding="utf-8"))


def call_table():
    """What a call costs: against the formulas, and against one multiplication and addition."""
    x = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
    out = np.empty_like(x)
    mean, var, weight, bias = np.random.default_rng(0).uniform(0.5, 1, (4, 64)).astype(np.float32)
    scale = weight / np.sqrt(var + np.float32(1e-5))
    shift = bias - mean * scale
    statistics = mean, var, weight, bias
    calls = {
        "bnfast": lambda: bnfast.batch_norm(x, *statistics),
        "bnfast, `out=`": lambda: bnfast.batch_norm(x, *statistics, out=out),
        "NumPy": lambda: numpy_formulas.batch_norm_inference(x, *statistics),
        "NumPy, x*a+b": lambda: x * scale + shift,
    }
    exact = reference.scale_shift(x, *statistics)
    timings = take_turns(calls, 2.0)
    sheet = report.Sheet(
        "",
        1,
        ["one call, inference on 2x64", *calls],
        [
            [
                report.Text("time"),
                *(report.Text(report.duration(t.median)) for t in timings.values()),
            ],
            [
                report.Text("error"),
                *(report.Text(f"{np.abs(call() - exact).max():.0e}") for call in calls.values()),
            ],
        ],
    )
    return report.markdown_table(sheet)


def write_into_readme(marker, *parts):
    """Replace what is between the markers of this name."""
    begin, end = (f"<!-- {marker}: {side} -->" for side in ("begin", "end"))
    before, _, rest = README.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"README.md has no {begin} ... {end}")
    body = "\n\n".join(parts)
    README.write_text(f"{before}{begin}\n{body}\n{end}{after}", encoding="utf-8")


def make_batch_tables(*quick):
    picture = DOCS / "benchmark.png"
    results = bench("--plot", str(picture), *quick)
    far = bench("--op", "training", "--shapes", "32x64x56x56", "--mean", "1e4", *quick)
    bnfast.set_num_threads(1)
    write_into_readme(
        "table",
        "Times of the rivals as multiples of bnfast's, geometric means (and largest errors):",
        report.markdown_table(report.all_means(results)),
        f"{report.all_losses(results).title}; [all cells](docs/benchmark.md).",
        f"![{ALT}](docs/benchmark.png)",
        "The same with data whose mean is 10,000 times its standard deviation:",
        report.markdown_table(report.all_cells(far)),
        call_table(),
        *report.notes(results),
        "All of it is made by `python benchmarks/make_tables.py`.",
    )
    text = f"# Every cell\n\n{report.markdown(results)}\n\n![{ALT}]({picture.name})\n"
    (DOCS / "benchmark.md").write_text(text, encoding="utf-8")


def make_tables_of(kind, title, *arguments):
    """The geometric means go into README.md, and all cells into a page of their own."""
    page, picture = DOCS / f"{kind}_benchmark.md", DOCS / f"{kind}_benchmark.png"
    results = bench(*arguments, "--plot", str(picture))
    write_into_readme(
        f"{kind} table",
        "Times of the rivals as multiples of bnfast's, geometric means (and largest errors):",
        report.markdown_table(report.all_means(results)),
        f"{report.all_losses(results).title}; [all cells](docs/{page.name}), with the rest "
        "of what is to be known.",
    )
    text = f"# {title}\n\n{report.markdown(results)}\n\n![{ALT}]({picture.name})\n"
    page.write_text(text, encoding="utf-8")


def make_family_tables(*quick):
    family = ("layer", "rms", "group", "instance")
    make_tables_of("family", "Every cell of the family", "--norm", *family, *quick)


def make_weights_tables(*quick):
    names = ("weight", "spectral")
    make_tables_of("weights", "Every cell of the weights", "--norm", *names, *quick)


TABLES = {
    "batch": make_batch_tables,
    "family": make_family_tables,
    "weights": make_weights_tables,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(TABLES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="few shapes, short turns")
    options = parser.parse_args()
    unknown = set(options.tables) - set(TABLES)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: none of {', '.join(TABLES)}")
    DOCS.mkdir(exist_ok=True)
    for name in options.tables or TABLES:
        TABLES[name](*["--quick"] * options.quick)


if __name__ == "__main__":
    main()
