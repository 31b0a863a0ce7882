"""The pictures: the ratios of every rival as a strip of dots; bandwidth beside its limit.

Letters are so large that a picture 8 inches wide can still be read on a screen of 390 pixels, and
the colours are those of Okabe and Ito, which people tell apart whatever colours they see.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from PIL import Image  # which matplotlib needs, too

from bnfast._cli.bench.cell import OPERATIONS
from bnfast._cli.bench.normalizations import NORMALIZATIONS, called
from bnfast._cli.bench.regime import REGIMES
from bnfast._cli.bench.report import ratio_text

Results = dict[str, Any]
Row = dict[str, Any]

WIDTH, DOTS_PER_INCH = 8, 150
TEXT, SMALL = 13, 8.5  # points
LANE, GAP = 0.13, 0.12  # inches: the dots of an operation, and what is between two strips
RIVALS_SIDE = "#CC79A7"
COLOURS = {
    "inference": "#0072B2",
    "training": "#E69F00",
    "forward": "#E69F00",
    "backward": "#009E73",
    "moments": "#0072B2",
}


class Strip(NamedTuple):
    """The ratios of a rival in all cells of one normalization, by operation."""

    title: str
    ratios: dict[str, list[float]]
    median: float


class Part(NamedTuple):
    """A part of a picture: its height in inches, and what draws it."""

    height: Callable[[Results], float]
    draw: Callable[[SubFigure, Results], None]


def draw(results: Results, path: Path, parts: tuple[str, ...] = ("ratios", "bandwidth")) -> None:
    """Write a PNG of these parts, one below the other; the same results make the same bytes."""
    chosen = [PARTS[name] for name in parts if name != "ratios" or strips(results)]
    heights = [part.height(results) for part in chosen]
    with rc_context({"font.size": TEXT, "axes.titlesize": TEXT, "figure.labelsize": TEXT}):
        size = WIDTH, sum(heights) + 0.4
        figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained", facecolor="white")
        rows = figure.subfigures(len(chosen), squeeze=False, height_ratios=heights)
        for part, (subfigure,) in zip(chosen, rows, strict=True):
            part.draw(subfigure, results)
        figure.supxlabel(_circumstances(results), fontsize=SMALL, color="0.35")
        _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """Write a PNG with a palette, which is a third as large.

    The palette covers all colours alike: one by numbers of pixels loses the colours of few dots.
    """
    drawn = BytesIO()
    figure.savefig(drawn, format="png")
    picture = Image.open(drawn).convert("RGB")
    picture = picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    picture.save(path, format="png", optimize=True)


def strips(results: Results) -> dict[str, list[Strip]]:
    """Return the strips of each normalization, those of the fastest rivals first."""
    found: dict[str, list[Strip]] = {}
    for normalization in _normalizations(results):
        for title in results["rivals"]:
            ratios: dict[str, list[float]] = {}
            for row in _rows(results, normalization):
                if "ratio" in row["rivals"][title]:
                    ratios.setdefault(row["operation"], []).append(row["rivals"][title]["ratio"])
            if ratios:
                middle = median(itertools.chain(*ratios.values()))
                found.setdefault(normalization, []).append(Strip(title, ratios, middle))
    return {name: sorted(some, key=lambda strip: strip.median) for name, some in found.items()}


def _normalizations(results: Results) -> list[str]:
    return sorted(results["normalizations"], key=list(NORMALIZATIONS).index)


def _rows(results: Results, normalization: str, operation: str | None = None) -> list[Row]:
    return [
        row
        for row in results["rows"]
        if row["normalization"] == normalization and operation in (None, row["operation"])
    ]


def _operations(results: Results) -> list[str]:
    measured = {row["operation"] for row in results["rows"]}
    return [operation for operation in OPERATIONS if operation in measured]


def _circumstances(results: Results) -> str:
    threads = "one thread" if results["threads"] == 1 else f"{results['threads']} threads"
    machine = results["machine"]
    about = f"{machine['cpu']}, {machine['instruction set']}; {results['dtype']}, {threads}"
    if REGIMES[results["regime"]].note:
        about += f"; regime {results['regime']}"
    return f"{about}\n{results['command']}"


def _head(figure: SubFigure, title: str, handles: list[Line2D]) -> None:
    """Write a title, and below it what the colours and marks are."""
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=len(handles),
        frameon=False,
        handletextpad=0.3,
        title=title,
        title_fontproperties={"weight": "bold", "size": 1.1 * TEXT},
    )


def _dot(colour: str, label: str) -> Line2D:
    return Line2D([], [], color=colour, marker="o", linestyle="", markersize=8, label=label)


def _height_of_ratios(results: Results) -> float:
    found = strips(results)
    lines = sum(map(len, found.values())) + len(found) * (len(found) > 1)
    return lines * _height_of_strip(results) + 1.9


def _height_of_strip(results: Results) -> float:
    return max(2, len(_operations(results))) * LANE + GAP


def _draw_ratios(figure: SubFigure, results: Results) -> None:
    found, operations = strips(results), _operations(results)
    axes = figure.subplots()
    height = _height_of_strip(results)
    middle = (len(operations) - 1) / 2
    lanes = {name: (i - middle) * LANE / height for i, name in enumerate(operations)}
    labels: list[str] = []
    headings: list[int] = []
    for normalization, some in found.items():
        if len(found) > 1:
            headings.append(len(labels))
            labels.append(called([normalization]))
        for strip in some:
            y = len(labels)
            for operation, ratios in strip.ratios.items():
                places = [y + lanes[operation]] * len(ratios)
                colour = COLOURS[operation]
                axes.scatter(ratios, places, s=26, c=colour, alpha=0.65, linewidths=0, zorder=3)
            axes.plot(
                [strip.median] * 2, [y - 0.42, y + 0.42], color="black", linewidth=3, zorder=4
            )
            axes.text(
                1.02, y, ratio_text(strip.median), va="center", transform=axes.get_yaxis_transform()
            )
            axes.axhline(y + 0.5, color="0.85", linewidth=0.8, zorder=1)
            labels.append(strip.title)
    axes.set_yticks(range(len(labels)), labels)
    for heading in headings:
        axes.get_yticklabels()[heading].set_fontweight("bold")
    axes.set_ylim(len(labels) - 0.5, -0.5)
    outcomes = [outcome for row in results["rows"] for outcome in row["rivals"].values()]
    ratios = [outcome["ratio"] for outcome in outcomes if "ratio" in outcome]
    _scale_of_ratios(axes, min(ratios), max(ratios))
    _say_whose_side(axes, height * len(labels))
    handles = [_dot(COLOURS[operation], operation) for operation in operations]
    handles.append(
        Line2D([], [], color="black", marker="|", linestyle="", ms=14, mew=3, label="median")
    )
    _head(figure, "Time of other libraries, as a multiple of bnfast's", handles)


def _scale_of_ratios(axes: Axes, least: float, most: float) -> None:
    """Give the axis of ratios powers of two."""
    lowest, highest = min(0.6, least / 1.15), max(2.2, 1.15 * most)
    axes.set_xscale("log", base=2)
    axes.set_xlim(lowest, highest)
    powers = range(math.ceil(math.log2(lowest)), math.floor(math.log2(highest)) + 1)
    _ticks(axes, [2.0**power for power in powers])
    axes.set_xlabel("times bnfast's time; each dot is one shape in one layout")


def _ticks(axes: Axes, places: list[float]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _say_whose_side(axes: Axes, height: float) -> None:
    """Say which side of 1 is whose, above axes of so many inches."""
    axes.axvspan(axes.get_xlim()[0], 1, color=RIVALS_SIDE, alpha=0.2, linewidth=0, zorder=0)
    axes.axvline(1, color="black", linewidth=1.2, zorder=2)
    above, y = axes.get_xaxis_transform(), 1 + 0.08 / height
    axes.text(1, y, "\N{LEFTWARDS ARROW} rival is faster  ", ha="right", transform=above)
    axes.text(1, y, "  bnfast is faster \N{RIGHTWARDS ARROW}", ha="left", transform=above)
    axes.text(1.02, y, "median", transform=axes.transAxes)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _height_of_bandwidths(results: Results) -> float:
    return 2.3 * len(results["normalizations"]) + 1.1


def _draw_bandwidths(figure: SubFigure, results: Results) -> None:
    normalizations, operations = _normalizations(results), _operations(results)
    grid = figure.subplots(len(normalizations), len(operations), squeeze=False, sharey="row")
    for i, normalization in enumerate(normalizations):
        for j, operation in enumerate(operations):
            rows = _rows(results, normalization, operation)
            if not rows:
                grid[i, j].set_axis_off()
                continue
            _bandwidths(grid[i, j], rows)
            several = len(normalizations) > 1
            grid[i, j].set_title(f"{normalization}, {operation}" if several else operation)
        rows = _rows(results, normalization)
        rates = [row[of]["GB/s"] for row in rows for of in ("bnfast", "limit") if of in row]
        grid[i, 0].set_ylim(0, 1.1 * max(rates))  # and so the others of the line
    figure.supxlabel("MiB read and written")
    figure.supylabel("GB/s")
    handles = [_dot("0.5", "bnfast")]
    if any("limit" in row for row in results["rows"]):
        handles.append(Line2D([], [], label="limit", **LIMIT))
    _head(figure, "bnfast's bandwidth, and the limit of the memory", handles)


LIMIT: dict[str, Any] = {
    "color": "black",
    "marker": "_",
    "linestyle": "",
    "markersize": 9,
    "markeredgewidth": 2,
}


def _bandwidths(axes: Axes, rows: list[Row]) -> None:
    sizes = [row["traffic"] / 2**20 for row in rows]
    limits = [row["limit"]["GB/s"] if "limit" in row else math.nan for row in rows]
    axes.plot(sizes, limits, **LIMIT)
    colour = COLOURS[rows[0]["operation"]]
    achieved = [row["bnfast"]["GB/s"] for row in rows]
    axes.scatter(sizes, achieved, s=32, c=colour, alpha=0.75, linewidths=0, zorder=3)
    axes.set_xscale("log")
    lowest, highest = min(sizes) / 1.5, 1.5 * max(sizes)
    first, last = math.ceil(math.log10(lowest)), math.floor(math.log10(highest))
    if first >= last:  # two ticks at least
        first, last = math.floor(math.log10(lowest)), math.ceil(math.log10(highest))
        lowest, highest = 10.0**first, 10.0**last
    axes.set_xlim(lowest, highest)
    _ticks(axes, [10.0**power for power in range(first, last + 1, math.ceil((last - first) / 3))])
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)


PARTS = {
    "ratios": Part(_height_of_ratios, _draw_ratios),
    "bandwidth": Part(_height_of_bandwidths, _draw_bandwidths),
}
