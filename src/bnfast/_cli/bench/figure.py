"""The picture: the ratio to each rival in every cell, and bandwidth over size with its limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bnfast._cli.bench.cell import OPERATIONS
from bnfast._cli.bench.normalizations import NORMALIZATIONS
from bnfast._cli.bench.regime import REGIMES
from bnfast._cli.bench.report import name, names

Row = dict[str, Any]

MARKERS = {"nchw": "o", "nhwc": "s", "rows": "o", "filters": "D", "table": "s"}


def draw(results: dict[str, Any], path: Path) -> None:
    """Write a PNG: one row for each operation of each normalization."""
    keys = names(results, "normalization", "operation")
    panels: dict[str, list[Row]] = {}
    for row in sorted(results["rows"], key=_place):
        panels.setdefault(" ".join(name(row, key) for key in keys), []).append(row)
    most = max(map(len, panels.values()))
    size = (max(11.0, 6 + 0.28 * most), 3.6 * len(panels) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    widths = [max(1.2, 0.05 * most), 1]
    grid = figure.subplots(len(panels), 2, squeeze=False, width_ratios=widths)
    for (title, rows), (left, right) in zip(panels.items(), grid, strict=True):
        _ratios(left, rows, list(results["rivals"]))
        left.set_title(f"{title}: times as multiples of bnfast's", fontsize=10)
        _bandwidths(right, rows)
        right.set_title(f"{title}: bandwidth", fontsize=10)
    handles: dict[str, Any] = {}
    for axes in grid[:, 0]:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if handles:
        labels = list(handles)
        figure.legend(
            handles.values(), labels, loc="outside upper center", ncols=len(labels), fontsize=9
        )
    threads = "one thread" if results["threads"] == 1 else f"{results['threads']} threads"
    machine = results["machine"]
    about = f"{machine['cpu']}, {machine['instruction set']}; {results['dtype']}, {threads}, "
    about += f"{results['offset']} bytes past a page"
    about += f"; {results['command']}"
    if REGIMES[results["regime"]].note:
        about += f"\nregime {results['regime']}: {REGIMES[results['regime']].help}"
    figure.supxlabel(about, fontsize=8)
    figure.savefig(path, dpi=120)


def _place(row: Row) -> tuple[int, int]:
    return list(NORMALIZATIONS).index(row["normalization"]), OPERATIONS.index(row["operation"])


def _ratios(axes: Axes, rows: list[Row], titles: list[str]) -> None:
    for number, title in enumerate(titles):
        found = [(i, row["rivals"][title].get("ratio")) for i, row in enumerate(rows)]
        points = [(i, ratio) for i, ratio in found if ratio is not None]
        if points:
            x, y = zip(*points, strict=True)
            marker = "osD^vPX"[number % 7]
            axes.scatter(x, y, s=24, c=f"C{number}", marker=marker, alpha=0.8, label=title)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("above 1: bnfast is faster")
    labels = [f"{name(row, 'shape')} {row['layout']}" for row in rows]
    axes.set_xticks(range(len(rows)), labels, rotation=90, fontsize=7)
    axes.grid(axis="y", alpha=0.3)


def _bandwidths(axes: Axes, rows: list[Row]) -> None:
    for layout in dict.fromkeys(row["layout"] for row in rows):
        these = sorted((r for r in rows if r["layout"] == layout), key=lambda r: int(r["traffic"]))
        if these:
            sizes = [row["traffic"] / 2**20 for row in these]
            achieved = [row["bnfast"]["GB/s"] for row in these]
            axes.plot(sizes, achieved, MARKERS[layout], markersize=4, label=layout.upper())
    limits: dict[float, float] = {}
    for row in sorted(rows, key=lambda r: int(r["traffic"])):
        if "limit" in row:
            size, rate = row["traffic"] / 2**20, row["limit"]["GB/s"]
            limits[size] = max(rate, limits.get(size, 0))
    if limits:
        axes.plot(
            list(limits), list(limits.values()), color="black", linewidth=1, label="limit", zorder=1
        )
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set(xlabel="MiB that must be read and written", ylabel="GB/s")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
