"""Measure, and write what README.md and docs/ show of the measured times and errors.

    python benchmarks/make_tables.py              about twenty minutes
    python benchmarks/make_tables.py batch        batch norm alone; or family, or weights
    python benchmarks/make_tables.py --quick      a trial
    python benchmarks/make_tables.py --from FILE  without measuring, of what was measured before

All tables and pictures go into docs/benchmark.md and its neighbours for the family and for weights;
README.md gets the geometric means of batch norm, docs/notes.md one sentence for the others: where a
rival is faster. Each text is written between the two markers of its name. Everything is measured by
`python -m bnfast bench`, but for the cost of a call, which is measured here. All that was measured
is kept in benchmarks/measured.json, of which tables and pictures are made.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import textwrap
from functools import partial
from pathlib import Path

import numpy as np

import bnfast
from bnfast import _reference as reference
from bnfast._cli.bench import figure, report
from bnfast._cli.bench.rivals import numpy_formulas
from bnfast._cli.bench.timing import take_turns

# The pictures of a page: the part of the figure, how the file is called besides the page, and what
# a reader without pictures is told.
PICTURES = (
    ("ratios", "", "Times of other libraries as multiples of bnfast's, a dot for each cell"),
    ("bandwidth", "_bandwidth", "Bandwidth of bnfast, and the limit of the memory, by size"),
)
RATIOS = "Times of the rivals as multiples of bnfast's time, ± (and largest errors):"
ROOT = Path(__file__).parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
NOTES = DOCS / "notes.md"
MEASURED = ROOT / "benchmarks" / "measured.json"

# The rivals that README.md has room for.
IN_README = "NumPy", "PyTorch", "oneDNN", "oneDNN blocked", "ONNX Runtime", "JAX"
LARGE_ERROR = 10  # times bnfast's


def bench(*arguments):
    """Return what the command writes as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        command = [
            sys.executable,
            "-m",
            "bnfast",
            "bench",
            *arguments,
            "--json",
            str(path),
            "--force",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(path.read_text(encoding="utf-8"))


def measure_calls():
    """What a call costs: against the formulas, and against one multiplication and addition."""
    bnfast.set_num_threads(1)
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
    return {
        name: {"seconds": timing.median, "error": float(np.abs(calls[name]() - exact).max())}
        for name, timing in take_turns(calls, 2.0).items()
    }


def call_table(calls):
    times = [report.Text(report.duration(call["seconds"])) for call in calls.values()]
    errors = [report.Text(f"{call['error']:.0e}") for call in calls.values()]
    headings = ["one call, inference on 2x64", *calls]
    rows = [[report.Text("time"), *times], [report.Text("error"), *errors]]
    return report.markdown_table(report.Sheet("", 1, headings, rows))


def write_between(page, marker, parts):
    """Replace what a page has between the two markers of this name."""
    begin, end = (f"<!-- {marker}: {side} -->" for side in ("begin", "end"))
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{page} has no {begin} ... {end}")
    body = "\n\n".join(parts)
    page.write_text(f"{before}{begin}\n{body}\n{end}{after}", encoding="utf-8")


def is_faster(ratio):
    return round(ratio, 2) < 1


def small_table(results):
    """The geometric means for README.md: how many times as long as bnfast others take.

    What is a loss says so: a rival that is faster, and in the last column how often one was.
    Errors are shown where they are large.
    """
    lines = []
    for mean in results["geometric means"]:
        line = [mean["operation"], mean["layout"].upper()]
        for title in IN_README:
            if title not in mean["rivals"]:
                line.append("—")
                continue
            rival = mean["rivals"][title]
            text = f"{rival['ratio']:.2f}{'†' * rival['fresh']}"
            text = f"**{text}: bnfast is slower**" if is_faster(rival["ratio"]) else text
            is_off = rival["error"] > LARGE_ERROR * mean["error of bnfast"]
            line.append(f"{text} (off by {rival['error']:.0e})" if is_off else text)
        lines.append([*line, lost(results, mean["operation"], mean["layout"])])
    rules = ["---", "---", *["---:"] * (1 + len(IN_README))]
    lines = [["operation", "layout", *IN_README, "bnfast is slower in"], rules, *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def lost(results, operation, layout):
    """Return "3 of 40": in how many comparisons of one kind any library is faster."""
    rows, losses = (
        [row for row in of if (row["operation"], row["layout"]) == (operation, layout)]
        for of in (results["rows"], results["losses"])
    )
    outcomes = [outcome for row in rows for outcome in row["rivals"].values()]
    compared = sum("ratio" in outcome and not outcome.get("itself") for outcome in outcomes)
    return f"{len(losses)} of {compared}"


def filled(text, indent=""):
    return textwrap.fill(text, 110, subsequent_indent=indent, break_on_hyphens=False)


def where_faster(means, page):
    """One sentence for docs/notes.md: in which geometric means a rival is faster."""
    found = []
    for mean in means:
        rivals = [
            f"{title} {rival['ratio']:.2f}"
            for title, rival in mean["rivals"].items()
            if is_faster(rival["ratio"])
        ]
        layout = mean["layout"].upper()
        where = f" in {layout}" if layout in ("NCHW", "NHWC") else ""
        what = f"{mean['normalization']} norm {mean['operation']}{where}"
        found += [f"{what}, {', '.join(rivals)}"] if rivals else []
    text = "; ".join(found) or "in no geometric mean"
    link = f"[times as fractions of bnfast's time]({page.name})"
    return filled(f"- Other libraries are faster ({link}): {text}.", "  ")


def tables(means, pictures, count, losses, cells, notes, between=()):
    """What is measured of one kind, as the parts of its page."""
    return [
        "## Geometric means",
        RATIOS,
        means,
        *pictures,
        *between,
        "## Where a rival is faster",
        f"In {count} comparisons, the worst first:",
        losses,
        "## All cells",
        RATIOS,
        cells,
        "## The measurement",
        *notes,
    ]


def draw(results, page):
    """Draw the pictures of a page beside it; return the lines that show them."""
    lines = []
    for part, suffix, alt in PICTURES:
        path = page.with_name(f"{page.stem}{suffix}.png")
        figure.draw(results, path, (part,))
        lines.append(f"![{alt}]({path.name})")
    return lines


def tables_of(results, page, between=()):
    means, losses, cells = (
        report.markdown_table(sheet)
        for sheet in (
            report.all_means(results),
            report.all_losses(results),
            report.all_cells(results),
        )
    )
    count = counted(report.all_losses(results))
    return tables(means, draw(results, page), count, losses, cells, report.notes(results), between)


def small_tables(results, losses, machine):
    """What README.md shows of batch norm."""
    means = results["geometric means"]
    error = max(mean["error of bnfast"] for mean in means)
    text = (
        f"Geometric means over {means[0]['cells']} shapes of convolutional networks; {machine}, "
        f"one thread, float32. Another library is faster in "
        f"[{losses} comparisons](docs/benchmark.md#where-a-rival-is-faster). bnfast is off by "
        f"{error:.0e} at most; an error is shown where it is over {LARGE_ERROR} times bnfast's."
    )
    return [small_table(results), filled(text)]


def counted(losses):
    """Return "3 of 40" from the title of the losses."""
    return losses.title.partition(": ")[2].removesuffix(" comparisons")


def far_and_call(far, call):
    """What docs/benchmark.md shows besides: a mean that is far off, and small calls."""
    return [
        "## A mean far from zero",
        "Data whose mean is 10,000 times its standard deviation:",
        far,
        "## What one call costs",
        "The median time of one call, with arrays that stay in the caches:",
        call,
    ]


def measure_batch(*quick):
    far = bench("--op", "training", "--shapes", "32x64x56x56", "--mean", "1e4", *quick)
    return {"cells": bench(*quick), "far": far, "calls": measure_calls()}


def write_batch(measured):
    page, results = DOCS / "benchmark.md", measured["cells"]
    far = report.markdown_table(report.all_cells(measured["far"]))
    between = far_and_call(far, call_table(measured["calls"]))
    write_between(page, "tables", tables_of(results, page, between))
    here = results["machine"]
    machine = f"{here['cpu']}, {here['instruction set']}"
    losses = counted(report.all_losses(results))
    write_between(README, "table", small_tables(results, losses, machine))


def measure_family(*quick):
    return {"cells": bench("--norm", "layer", "rms", "group", "instance", *quick)}


def measure_weights(*quick):
    return {"cells": bench("--norm", "weight", "spectral", *quick)}


def write_kind(kind, measured):
    """All cells go into a page of their own, and where a rival is faster into docs/notes.md."""
    page, results = DOCS / f"{kind}_benchmark.md", measured["cells"]
    write_between(page, "tables", tables_of(results, page))
    write_between(NOTES, kind, [where_faster(results["geometric means"], page)])


# What measures each kind, and what writes what was measured.
TABLES = {
    "batch": (measure_batch, write_batch),
    "family": (measure_family, partial(write_kind, "family")),
    "weights": (measure_weights, partial(write_kind, "weights")),
}


def keep(measured):
    """Write it beside what was measured of other kinds, with a line for each cell."""
    kept = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {}
    text = json.dumps(kept | measured, ensure_ascii=False, separators=(",", ":"))
    text = text.replace('{"normalization":', '\n{"normalization":')
    MEASURED.write_text(text + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(TABLES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="few shapes, short turns")
    parser.add_argument(
        "--from",
        dest="kept",
        type=Path,
        metavar="FILE",
        help=f"measure nothing: this was measured before, such as {MEASURED.name}",
    )
    options = parser.parse_args()
    unknown = set(options.tables) - set(TABLES)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: none of {', '.join(TABLES)}")
    if options.kept is None:
        for name in options.tables or TABLES:
            measure, _ = TABLES[name]
            keep({name: measure(*["--quick"] * options.quick)})
    measured = json.loads((options.kept or MEASURED).read_text(encoding="utf-8"))
    for name in options.tables or measured:
        if name not in measured:
            parser.error(f"{options.kept} has nothing of {name}, but of {', '.join(measured)}")
        _, write = TABLES[name]
        write(measured[name])


if __name__ == "__main__":
    main()
