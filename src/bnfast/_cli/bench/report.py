"""What was measured, as a table for the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from bnfast._cli.bench.cell import OPERATIONS
from bnfast._cli.bench.normalizations import NORMALIZATIONS, called
from bnfast._cli.bench.regime import REGIMES
from bnfast._cli.bench.workloads import ALL_LAYOUTS, name_of

Results = dict[str, Any]
Row = dict[str, Any]

# A contender whose quartiles are further apart than twice this part of its median was disturbed.
WIDE_SPREAD = 0.2


class Text(NamedTuple):
    """A cell of a table."""

    text: str
    best: bool = False


class Sheet(NamedTuple):
    """A table, whoever prints it; the first columns are names, the others numbers."""

    title: str
    names: int
    headings: list[str]
    rows: list[list[Text]]


def _worst(outcomes: list[Row], whose: str = "") -> Row:
    """Return the largest error, and that of each part of the results, where they have some."""
    worst: Row = {f"error{whose}": max(outcome["error"] for outcome in outcomes)}
    if "errors" in outcomes[0]:
        parts = outcomes[0]["errors"]
        worst[f"errors{whose}"] = {part: max(o["errors"][part] for o in outcomes) for part in parts}
    return worst


def _error(row: Row, whose: str = "") -> str:
    errors = row.get(f"errors{whose}", {"": row[f"error{whose}"]})
    return ", ".join(f"{error:.0e}" for error in errors.values())


def _to_beat(outcome: Row) -> float:
    """Return the ratio, or infinity where there is none, or no rival whose it is."""
    return math.inf if outcome.get("itself") else float(outcome.get("ratio", math.inf))


def geometric_means(rows: list[Row]) -> list[Row]:
    """Return the mean ratio and largest error for each normalization, operation, layout, rival."""
    means = []
    keys = "normalization", "operation", "layout"
    for values in product(NORMALIZATIONS, OPERATIONS, ALL_LAYOUTS):
        group = [row for row in rows if tuple(row[key] for key in keys) == values]
        if not group:
            continue
        mean: Row = {**dict(zip(keys, values, strict=True)), "cells": len(group), "rivals": {}}
        mean |= _worst([row["bnfast"] for row in group], " of bnfast")
        for title in group[0]["rivals"]:
            offered = [r["rivals"][title] for r in group if "ratio" in r["rivals"][title]]
            if offered:
                logarithms = [math.log(outcome["ratio"]) for outcome in offered]
                mean["rivals"][title] = {
                    "ratio": math.exp(sum(logarithms) / len(offered)),
                    **_worst(offered),
                    "cells": len(offered),
                    "fresh": any(outcome.get("fresh") for outcome in offered),
                }
                if offered[0].get("itself"):
                    mean["rivals"][title]["itself"] = True
        means.append(mean)
    return means


def losses(rows: list[Row]) -> list[Row]:
    """Return the cells in which a rival was faster, the worst first."""
    lost = [
        {
            **{key: row[key] for key in ("normalization", "operation", "shape", "layout")},
            "rival": title,
            "ratio": outcome["ratio"],
            **_worst([outcome]),
            **_worst([row["bnfast"]], " of bnfast"),
        }
        for row in rows
        for title, outcome in row["rivals"].items()
        if _to_beat(outcome) < 1
    ]
    return sorted(lost, key=lambda loss: float(loss["ratio"]))


def duration(seconds: float) -> str:
    """Return it with a unit."""
    unit, name = (1e-3, "ms") if seconds > 1e-4 else (1e-6, "µs")
    return f"{seconds / unit:.3g} {name}"


def ratio_text(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def _outcome(outcome: Row) -> str:
    if "failed" in outcome:
        return "failed"
    if "not offered" in outcome:
        return "—"
    mark = "†" if outcome.get("fresh") else ""
    return f"{ratio_text(outcome['ratio'])}{mark} ±{outcome['spread']:.0%} ({_error(outcome)})"


def names(results: Results, *keys: str) -> list[str]:
    """Return by which of these a row is told: by its normalization if others than batch norm are.

    Without any other, the tables are those of batch norm, and need not say so in each line.
    """
    several = results["normalizations"] != ["batch"]
    return [key for key in keys if several or key != "normalization"]


def name(row: Row, key: str) -> str:
    """Return what a table says of it: ``batch``, ``training``, ``2x3x4x5``, ``NCHW``."""
    if key == "shape":
        return name_of(tuple(row["shape"]))
    value = str(row[key])
    return value.upper() if key == "layout" else value


def _offering(results: Results) -> list[str]:
    """Return the rivals that have a column: all but those that offer nothing of the table."""
    return [
        title
        for title in results["rivals"]
        if any("not offered" not in row["rivals"][title] for row in results["rows"])
    ]


def all_cells(results: Results) -> Sheet:
    """Return the table of all cells."""
    keys = names(results, "normalization", "operation", "shape", "layout")
    titles = _offering(results)
    limit = ["of limit"] * REGIMES[results["regime"]].limit
    headings = [*keys, "bnfast", "±", "GB/s", *limit, "error", *titles]
    lines = []
    for row in results["rows"]:
        mine = row["bnfast"]
        outcomes = [row["rivals"][title] for title in titles]
        ratios = [_to_beat(outcome) for outcome in outcomes]
        best = min(ratios, default=math.inf)
        lines.append(
            [
                *(Text(name(row, key)) for key in keys),
                Text(duration(mine["seconds"])),
                Text(f"{mine['spread']:.0%}"),
                Text(f"{mine['GB/s']:.1f}"),
                *(Text(f"{mine['fraction of limit']:.0%}") for _ in limit),
                Text(_error(mine)),
                *(
                    Text(_outcome(outcome), math.isfinite(ratio) and ratio == best)
                    for outcome, ratio in zip(outcomes, ratios, strict=True)
                ),
            ]
        )
    title = "Times of the rivals as multiples of bnfast's, ± (and largest errors)"
    return Sheet(title, len(keys), headings, lines)


def all_tails(results: Results) -> Sheet:
    """Return the table of how long single calls take, where the regime is one of long tails."""
    keys = names(results, "normalization", "operation", "shape", "layout")
    titles = _offering(results)
    lines = []
    for row in results["rows"] if REGIMES[results["regime"]].tail else ():
        outcomes = [row["bnfast"], *(row["rivals"][title] for title in titles)]
        shortest = min(outcome.get("p95", math.inf) for outcome in outcomes)
        lines.append(
            [
                *(Text(name(row, key)) for key in keys),
                *(
                    Text(f"{duration(o['seconds'])}, {duration(o['p95'])}", o["p95"] == shortest)
                    if "p95" in o
                    else Text(_outcome(o))
                    for o in outcomes
                ),
            ]
        )
    title = "Single calls: the median, and the 95th percentile (the shortest is marked)"
    return Sheet(title, len(keys), [*keys, "bnfast", *titles], lines)


def all_means(results: Results) -> Sheet:
    """Return the table of geometric means."""
    keys = names(results, "normalization", "operation", "layout")
    titles = _offering(results)
    lines = []
    for mean in results["geometric means"]:
        rivals = mean["rivals"]
        best = min(map(_to_beat, rivals.values()), default=math.inf)
        line = [Text(name(mean, key)) for key in keys]
        line += [Text(str(mean["cells"])), Text(_error(mean, " of bnfast"))]
        for title in titles:
            if title not in rivals:
                line.append(Text("—"))
                continue
            rival = rivals[title]
            some = "" if rival["cells"] == mean["cells"] else f", {rival['cells']} cells"
            mark = "†" if rival["fresh"] else ""
            text = f"{ratio_text(rival['ratio'])}{mark} ({_error(rival)}{some})"
            line.append(Text(text, _to_beat(rival) == best < math.inf))
        lines.append(line)
    headings = [*keys, "cells", "error", *titles]
    title = "Geometric means of the ratios (and largest errors)"
    return Sheet(title, len(keys), headings, lines)


def all_losses(results: Results) -> Sheet:
    """Return the table of cells where a rival is faster."""
    keys = names(results, "normalization", "operation", "shape", "layout", "rival")
    lines = [
        [
            *(Text(name(loss, key)) for key in keys),
            *(Text(ratio_text(loss["ratio"])), Text(_error(loss))),
            Text(_error(loss, " of bnfast")),
        ]
        for loss in results["losses"]
    ]
    outcomes = [outcome for row in results["rows"] for outcome in row["rivals"].values()]
    compared = sum(math.isfinite(_to_beat(outcome)) for outcome in outcomes)
    title = f"Where a rival is faster: {len(lines)} of {compared} comparisons"
    return Sheet(title, len(keys), [*keys, "ratio", "its error", "of bnfast"], lines)


def _not_offered(results: Results) -> list[str]:
    """Return which normalizations a rival has nothing of, and why."""
    lines = []
    for title in results["rivals"]:
        without: dict[str, list[str]] = {}  # which, by the reasons
        for normalization in results["normalizations"]:
            outcomes = [
                row["rivals"][title]
                for row in results["rows"]
                if row["normalization"] == normalization
            ]
            if all("not offered" in outcome for outcome in outcomes):
                why = dict.fromkeys(outcome["not offered"] for outcome in outcomes)
                without.setdefault("; ".join(why), []).append(normalization)
        for reasons, normalizations in without.items():
            lines.append(f"{title} has nothing of {called(normalizations)}: {reasons}.")
    return lines


def _begin(results: Results) -> list[str]:
    """Return where arrays begin, and whose begin elsewhere."""
    offset = results["offset"]
    where = f"{offset} bytes past a page" if offset else "at a page"
    lines = [f"Arrays begin {where}, and so do those that are made for a rival."]
    owners: dict[str, list[str]] = {}  # by what is theirs
    for title in ("bnfast", *results["rivals"]):
        outcomes = [{"bnfast": row["bnfast"], **row["rivals"]}[title] for row in results["rows"]]
        own = {buffer for outcome in outcomes for buffer in outcome.get("own buffers", ())}
        if own:
            owners.setdefault(" and ".join(sorted(own)), []).append(title)
    if owners:
        whose = "; ".join(f"{what} of {', '.join(titles)}" for what, titles in owners.items())
        lines.append(f"Memory of their own, which begins where they like: {whose}.")
    return lines


def overload(load: Row | None) -> str:
    """Return in words that more work waits than the processors can do, or nothing."""
    if load is None or load["average"] <= load["processors"]:
        return ""
    return f"a load average of {load['average']:.1f} on {load['processors']} processors"


def _disturbed(results: Results) -> list[str]:
    """Return what shows that other work went on, unless that was the intention."""
    if REGIMES[results["regime"]].busy:
        return []
    spreads = [
        outcome["spread"]
        for row in results["rows"]
        for outcome in (row["bnfast"], *row["rivals"].values())
        if "spread" in outcome
    ]
    wide = sum(spread > WIDE_SPREAD for spread in spreads)
    signs = []
    if waiting := overload(results["load"]):
        signs.append(f"{waiting} before the run")
    if wide:
        signs.append(f"± above {WIDE_SPREAD:.0%} in {wide} of {len(spreads)} measurements")
    if not signs:
        return []
    return [
        f"The machine was busy with other work, so that times are uncertain: {'; '.join(signs)}."
    ]


def notes(results: Results) -> list[str]:
    """Return what must be known to read the tables: the machine, the versions, the failures."""
    machine, versions = results["machine"], dict(results["versions"])
    failed: dict[str, None] = {}  # in order, each once
    for title, rival in results["rivals"].items():
        if "failed" in rival:
            failed[f"{title} failed: {rival['failed']}"] = None
        else:
            versions[title] = rival["version"]
    for row in results["rows"]:
        for title, outcome in row["rivals"].items():
            if "failed" in outcome and "failed" not in results["rivals"][title]:
                keys = names(results, "normalization", "operation", "shape", "layout")
                where = ", ".join(name(row, key) for key in keys)
                failed[f"{title} failed ({where}): {outcome['failed']}"] = None
    threads = "one thread" if results["threads"] == 1 else f"{results['threads']} threads"
    regime = REGIMES[results["regime"]]
    writes = regime.outputs
    if results["normalizations"] == ["moments"]:
        writes = "statistics alone, which are new"
    caches = ", ".join(f"{level} {size}" for level, size in machine["caches"].items())
    lines = [
        f"{machine['cpu']}, {machine['instruction set']}"
        + (f", {caches}" if caches else "")
        + f"; {results['dtype']}, {threads}, {writes}.",
        ", ".join(f"{title} {version}" for title, version in versions.items()) + ".",
        f"Made by `{results['command']}`.",
        "Medians of calls in turn; ± is half the distance of their quartiles, as a part of the "
        "median; above 1 bnfast is faster; errors are the largest against float64; the best rival "
        "is marked.",
    ]
    lines += _disturbed(results)
    if regime.note:
        lines.insert(0, regime.note)
    if regime.limit and set(results["normalizations"]) - {"moments"}:
        lines.append(
            "The limit is the best that plain and streaming copies, reads and writes in place "
            "reach on as much memory, which begins at a page, measured in the same turns."
        )
    if "moments" in results["normalizations"]:
        limit = (
            "; their limit is the faster of a loop that only reads as much memory, which begins at "
            "a page, and of NumPy's maximum of the table, which is serial, measured in the same "
            "turns"
        )
        lines.append(
            "Moments are those of columns. Their errors are that of the mean and that of the "
            f"standard deviation, against sums in long double{limit * regime.limit}."
        )
    if any(o.get("fresh") for row in results["rows"] for o in row["rivals"].values()):
        lines.append("† writes to new memory at each call: it has no better way.")
    return lines + _begin(results) + _not_offered(results) + list(failed)


def _sheets(results: Results) -> list[Sheet]:
    sheets = [all_cells(results), all_tails(results), all_means(results), all_losses(results)]
    return [sheet for sheet in sheets if sheet.rows]


def _marked(text: Text) -> str:
    return f"[bold]{text.text}[/bold]" if text.best else text.text


def _table(sheet: Sheet) -> Table:
    table = Table(title=sheet.title, title_justify="left")
    for number, heading in enumerate(sheet.headings):
        justify: Literal["left", "right"] = "left" if number < sheet.names else "right"
        table.add_column(heading, justify=justify, no_wrap=True)
    for line in sheet.rows:
        table.add_row(*map(_marked, line))
    return table


def _print_as_list(sheet: Sheet, console: Console) -> None:
    """Print a table that is wider than the terminal: every row as a paragraph."""
    console.print(f"[italic]{sheet.title}[/italic]", highlight=False)
    for line in sheet.rows:
        console.print(" ".join(map(_marked, line[: sheet.names])), highlight=False)
        numbers = zip(sheet.headings[sheet.names :], line[sheet.names :], strict=True)
        items = [f"{heading} {_marked(text)}" for heading, text in numbers]
        console.print(Padding(Columns(items), (0, 0, 0, 4)), highlight=False)


def show(results: Results) -> None:
    """Print it all; where there is no terminal to fit in, in wide lines."""
    console = Console(width=None if sys.stdout.isatty() else 220)
    for sheet in _sheets(results):
        table = _table(sheet)
        wide = console.options.update(max_width=10_000)
        if Measurement.get(console, wide, table).maximum <= console.width:
            console.print(table)
        else:
            _print_as_list(sheet, console)
    for note in notes(results):
        console.print(escape(note), highlight=False)


def markdown_table(sheet: Sheet) -> str:
    """Return one table."""
    rules = ["---" if number < sheet.names else "---:" for number in range(len(sheet.headings))]
    lines = [sheet.headings, rules]
    lines += [[f"**{t.text}**" if t.best else t.text for t in line] for line in sheet.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(results: Results) -> str:
    """Return all tables and notes."""
    parts = []
    for sheet in _sheets(results):
        parts += [f"{sheet.title}:", markdown_table(sheet)]
    return "\n\n".join(parts + notes(results))


def write_json(results: Results, path: Path) -> None:
    """Write everything, also what the tables leave out."""
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str], None]]:
    """Show how far it is; yields what is called with each cell as it begins."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("cells,"),
        TimeElapsedColumn(),
        TextColumn("gone,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    # It draws at a step alone, never from a thread of its own in the middle of a measurement.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as bar:
        task = bar.add_task("", total=total)
        begun = 0

        def begin(cell: str) -> None:
            nonlocal begun
            bar.update(task, completed=begun, description=cell, refresh=True)
            begun += 1

        yield begin
        bar.update(task, completed=total, refresh=True)
