"""What ``stats`` prints: a table, JSON, or lines of code; and how far it is, on a terminal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from bnfast._cli.failure import Failure, missing
from bnfast._cli.stats.source import Advance, DataSet, Source
from bnfast.statistics import Summary

_MOST_ROWS = 200  # of a table; JSON has all
_MOST_REASONS = 10
_COLUMNS = ("count", "mean", "std", "minimum", "maximum", "non finite")


@contextmanager
def progress_bar(total: int) -> Iterator[Advance]:
    """Show how far it is, on a terminal alone."""
    if not sys.stderr.isatty():
        yield _quiet
        return
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
    except ImportError:  # which JSON and code do without
        yield _quiet
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
    rest = (TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, *rest, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda number, what: bar.update(task, advance=number, description=what)


def _quiet(number: int, what: str) -> None:
    pass


def print_left_out(reasons: list[str]) -> None:
    """Say what was left out: the first ones, and how many there are."""
    for reason in reasons[:_MOST_REASONS]:
        print(f"left out: {reason}", file=sys.stderr)
    if len(reasons) > _MOST_REASONS:
        print(f"left out: {len(reasons):,} in all", file=sys.stderr)


def showing(form: str, divide_by: float | None) -> Callable[[DataSet], str]:
    """Return what makes the text of a data set, or refuse before anything is read."""
    if form == "json":
        return as_json
    if form == "normalize":
        return lambda data: as_code(data, divide_by)
    try:
        import rich  # noqa: F401
    except ImportError as error:
        raise missing("rich for tables, unlike --json", "stats", error) from error
    return as_table


def as_json(data: DataSet) -> str:
    """Return all digits; null stands for what is not finite."""
    statistics = data.statistics
    channels = np.shape(statistics.mean)
    values = {
        "sources": [source.title for source in data.sources],
        "left_out": data.left_out,
        "channels": list(channels),
        "labels": _labels(data),
    }
    for name in ("count", "mean", "var", "std", "minimum", "maximum", "nonfinite"):
        values[name] = _finite(np.broadcast_to(getattr(statistics, name), channels).tolist())
    lines = (f" {json.dumps(name)}: {json.dumps(value)}" for name, value in values.items())
    return "{\n" + ",\n".join(lines) + "\n}"


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if math.isfinite(value) else None


def _labels(data: DataSet) -> list[str] | None:
    """Return what the channels are called: of images, colours."""
    labels = (source.labels for source in data.sources if source.labels is not None)
    return list(next(labels, ())) or None


def _channel_labels(data: DataSet) -> list[str]:
    indices = np.ndindex(np.shape(data.statistics.mean))
    return _labels(data) or [", ".join(map(str, index)) or "all" for index in indices]


def as_table(data: DataSet) -> str:
    """Return a row for every channel, or for the first and last ones."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    statistics = data.statistics
    channels = np.shape(statistics.mean)
    rows = list(zip(*(_column(statistics, name, channels) for name in _COLUMNS), strict=True))
    labels = _channel_labels(data)
    title, *more = (source.title for source in data.sources)
    table = Table(
        title=Text(f"{title} (first of {1 + len(more):,} inputs)" if more else title),
        box=SIMPLE_HEAD,  # all digits of a large data set in 80 columns
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("channel")
    for heading in _COLUMNS:
        table.add_column(heading, justify="right", overflow="fold")
    shown: Sequence[int] = range(len(rows))
    if len(rows) > _MOST_ROWS:
        shown = [*shown[: _MOST_ROWS // 2], *shown[-_MOST_ROWS // 2 :]]
        table.caption = Text(f"{len(rows) - _MOST_ROWS:,} channels between are in --json alone")
    for number in shown:
        table.add_row(Text(labels[number]), *rows[number])
    console = Console(width=None if sys.stdout.isatty() else 120)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip("\n")


def _column(statistics: Summary, name: str, channels: tuple[int, ...]) -> list[str]:
    values = np.broadcast_to(getattr(statistics, name.replace(" ", "")), channels)
    form = "," if values.dtype.kind == "i" else ".7g"
    return [format(value, form) for value in values.ravel().tolist()]


def as_code(data: DataSet, divide_by: float | None) -> str:
    """Return the lines that normalize such data in torchvision and in Keras."""
    statistics = data.statistics
    unit = _unit(data.sources) if divide_by is None else divide_by
    if not np.all(np.isfinite(statistics.mean) & np.isfinite(statistics.m2)):
        raise Failure("--normalize expects finite values: --finite leaves the others out")
    for label, m2 in zip(_channel_labels(data), np.ravel(statistics.m2), strict=True):
        if not m2:
            raise Failure(f"--normalize expects deviations above 0, got 0 in channel {label}")
    scaled = statistics.mean / unit, statistics.std / unit, statistics.var / unit**2
    mean, std, variance = (_rounded(values.tolist()) for values in scaled)
    lines = [f"# values divided by {unit:g}"] if unit != 1 else []
    if np.ndim(statistics.mean) < 2:
        for_torch = (numbers if isinstance(numbers, list) else [numbers] for numbers in (mean, std))
        lines.append("torchvision.transforms.Normalize(mean={}, std={})".format(*for_torch))
    axis = data.sources[0].axis or None
    if axis is None and np.ndim(statistics.mean):
        axis = tuple(range(-np.ndim(statistics.mean), 0))  # of saved statistics: the last ones
    kept = axis[0] if axis is not None and len(axis) == 1 else axis
    where = "" if kept == -1 else f"axis={kept}, "
    lines.append(f"keras.layers.Normalization({where}mean={mean}, variance={variance})")
    return "\n".join(lines)


def _unit(sources: list[Source]) -> float:
    """Return the value that counts as 1, on which all sources must agree."""
    first = sources[0]
    for source in sources:
        if source.unit is None:
            raise Failure(f"{source.name}: --normalize expects --divide-by for saved statistics")
        if source.unit != first.unit:
            raise Failure(
                f"{source.name}: --normalize expects values of which {first.unit:g} counts as 1 as "
                f"in {first.name}, got {source.unit:g}: see --divide-by"
            )
    assert first.unit is not None
    return first.unit


def _rounded(value: Any) -> Any:
    return [_rounded(item) for item in value] if isinstance(value, list) else float(f"{value:.7g}")
