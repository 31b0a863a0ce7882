"""The order of a run: the rivals, the cells, and for each cell data, contenders, errors, times."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

import bnfast
from bnfast import _dtypes
from bnfast._cli.bench import figure, limit, report
from bnfast._cli.bench.cell import OFFSET, OPERATIONS, Cell, Data, largest_error
from bnfast._cli.bench.normalizations import NORMALIZATIONS, called, exact_result, make_data
from bnfast._cli.bench.regime import REGIMES
from bnfast._cli.bench.rivals import (
    Contender,
    NotOffered,
    Rival,
    choose,
    enter,
    missing,
)
from bnfast._cli.bench.timing import Timing, take_turns
from bnfast._cli.bench.workloads import LAYOUTS, Shape, name_of, parse
from bnfast._cli.failure import Failure

# Seconds of taking turns for each cell, beside the making of its data and its exact result.
BUDGET, QUICK_BUDGET = 2.5, 0.3


class NothingToMeasure(Failure):
    """A normalization that was asked for is left without a cell; the message says why."""


@dataclass(frozen=True)
class Selection:
    """What the command line asked for."""

    normalizations: tuple[str, ...] = ("batch",)
    operations: tuple[str, ...] = OPERATIONS
    layouts: tuple[str, ...] = LAYOUTS
    dtype: str = "float32"
    shapes: str | None = None
    threads: int = 1
    regime: str = "out"
    peers: tuple[str, ...] | None = None
    mean: float = 0.0
    quick: bool = False
    offset: int = OFFSET

    def command(self) -> str:
        """Return the command that measures this again."""
        words = ["python", "-m", "bnfast", "bench"]
        default = Selection()
        if self.normalizations != default.normalizations:
            words += ["--norm", *self.normalizations]
        if self.operations != default.operations:
            words += ["--op", *self.operations]
        if self.layouts != default.layouts:
            words += ["--layout", *self.layouts]
        for name in ("dtype", "shapes", "threads", "regime", "mean", "offset"):
            value = getattr(self, name)
            if value != getattr(default, name):
                words += [f"--{name}", f"{value:g}" if name == "mean" else str(value)]
        if self.peers is not None:
            words += ["--peers", ",".join(self.peers)]
        return shlex.join(words + ["--quick"] * self.quick)

    def cells_of(self, name: str) -> Iterator[tuple[Shape, str, tuple[str, ...]]]:
        """Return every shape in every layout, with the operations on it, of one normalization."""
        norm = NORMALIZATIONS[name]
        usual = norm.quick_shapes if self.quick else norm.shapes
        shapes = self.shapes or REGIMES[self.regime].shapes.get(name, usual)
        for shape in parse(shapes):
            possible = norm.operations_on(shape)
            operations = tuple(op for op in self.operations if op in possible)
            for layout in norm.layouts_of(shape, self.layouts):
                yield shape, layout, operations

    def count_cells(self) -> int:
        """Return how many cells there are; raise where a normalization has none."""
        cells = 0
        for name in self.normalizations:
            offered = NORMALIZATIONS[name].operations
            if not set(offered) & set(self.operations):
                asked = " or ".join(self.operations)
                raise NothingToMeasure(f"{called([name])} has no {asked}, but {', '.join(offered)}")
            half = _dtypes.is_half(_dtypes.named(self.dtype))
            if half and not NORMALIZATIONS[name].takes_halves:
                raise NothingToMeasure(f"{called([name])} is not measured in {self.dtype}")
            of_it = sum(len(operations) for _, _, operations in self.cells_of(name))
            if not of_it:
                raise NothingToMeasure(
                    f"{called([name])} of {self.shapes}: nothing to measure, its statistics would "
                    "be those of single values"
                )
            cells += of_it
        return cells


def ours(cell: Cell[Data], fresh: bool) -> Contender:
    """Return bnfast's call on a cell."""
    norm = NORMALIZATIONS[cell.normalization]
    out = None if fresh else cell.data.output()
    return Contender(norm.ours(cell.operation, cell.data, out), norm.read)


def _reason(error: Exception) -> str:
    """Return one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def machine() -> dict[str, Any]:
    """Return what the measurements are of."""
    config = bnfast.show_config(mode="dicts")
    assert config is not None
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {
        "cpu": name,
        "processors": config["threads"]["allowed by affinity"],
        "instruction set": config["instruction sets"]["active"],
        "caches": config["caches"],
        "system": config["bnfast"]["platform"],
    }


def load() -> dict[str, Any] | None:
    """Return how much work of all programs waited in the last minute, where the system tells."""
    try:
        return {"average": os.getloadavg()[0], "processors": os.cpu_count() or 1}
    except (AttributeError, OSError):  # AttributeError: Windows
        return None


def measure(
    selection: Selection,
    rivals: dict[str, Rival | str],
    progress: Callable[[str], None] = lambda cell: None,
    budget: float | None = None,
) -> dict[str, Any]:
    """Return all that was measured, as it goes into the JSON file.

    `rivals` are those that are ready, by the title of their columns, or why they are not;
    `progress` is told of each cell before it is measured.
    """
    before = load()
    bnfast.set_num_threads(selection.threads)
    seconds = budget or (QUICK_BUDGET if selection.quick else BUDGET)
    rows = []
    # NumPy's matrix products, of which spectral norm is made, would have threads of their own.
    with threadpool_limits(selection.threads, user_api="blas"):
        for cell in cells(selection):
            what = cell.normalization, cell.operation, name_of(cell.data.shape), cell.data.layout
            progress(" ".join(what))
            rows.append(_measure_cell(cell, selection, rivals, seconds))
            del cell  # or its arrays would stay while the next ones are made
    versions = {
        title: {"version": rival.version} if isinstance(rival, Rival) else {"failed": rival}
        for title, rival in rivals.items()
    }
    return {
        "command": selection.command(),
        "machine": machine(),
        "load": before,
        "versions": {"Python": platform.python_version(), "bnfast": bnfast.__version__},
        "rivals": versions,
        "normalizations": list(selection.normalizations),
        "dtype": selection.dtype,
        "threads": selection.threads,
        "regime": selection.regime,
        **REGIMES[selection.regime].about(),
        "mean": selection.mean,
        "offset": selection.offset,
        "rows": rows,
        "geometric means": report.geometric_means(rows),
        "losses": report.losses(rows),
    }


def cells(selection: Selection) -> Iterator[Cell[Data]]:
    """Make the data of one shape and layout after the other, and yield its operations."""
    dtype = _dtypes.named(selection.dtype)
    for name in selection.normalizations:
        for shape, layout, operations in selection.cells_of(name):
            data: Data | None = None
            for operation in operations:
                data = data or make_data(
                    name, shape, layout, dtype, selection.mean, selection.offset
                )
                yield Cell(name, operation, data)


def _enter_all(
    cell: Cell[Data], fresh: bool, rivals: dict[str, Rival | str]
) -> tuple[dict[str, Contender], dict[str, dict[str, Any]]]:
    """Prepare everyone, and judge each one's first result before the next one overwrites it."""
    exact = exact_result(cell)
    parts, output = NORMALIZATIONS[cell.normalization].parts, cell.data.output()
    contenders: dict[str, Contender] = {}
    outcomes: dict[str, dict[str, Any]] = {}
    for name, rival in {"bnfast": None, **rivals}.items():
        if isinstance(rival, str):
            outcomes[name] = {"failed": rival}
            continue
        try:
            contender = ours(cell, fresh) if rival is None else enter(rival, cell, fresh)
            if output is not None:
                output.fill(np.nan)  # whoever writes nothing is found out
            result = contender.read(contender.call())
            outcome: dict[str, Any] = {"error": largest_error(result, exact)}
            if parts:
                errors = map(largest_error, result, exact)
                outcome["errors"] = dict(zip(parts, errors, strict=True))
        except NotOffered as reason:
            outcomes[name] = {"not offered": str(reason)}
            continue
        except Exception as error:
            if rival is None:
                raise
            outcomes[name] = {"failed": _reason(error)}
            continue
        if contender.note:
            outcome["implementation"] = contender.note
        if contender.itself:
            outcome["itself"] = True
        if contender.fresh:
            outcome["fresh"] = True
        own = contender.own_buffers(fresh and output is not None)
        if own:
            outcome["own buffers"] = own
        contenders[name], outcomes[name] = contender, outcome
    return contenders, outcomes


def _measure_cell(
    cell: Cell[Data],
    selection: Selection,
    rivals: dict[str, Rival | str],
    seconds: float,
) -> dict[str, Any]:
    regime = REGIMES[selection.regime]
    contenders, outcomes = _enter_all(cell, regime.fresh, rivals)
    probes = limit.Probes(cell, selection.threads) if regime.limit else None
    calls = {name: contender.call for name, contender in contenders.items()}
    if probes is not None:
        calls |= {f"memory: {kind}": call for kind, call in probes.calls.items()}
    with regime.meanwhile(selection.threads) as before:
        results = take_turns(
            calls,
            seconds,
            settle=selection.threads > 1,
            turn=regime.turn,
            before=before,
        )
    for name, result in results.items():
        if isinstance(result, Timing):
            outcomes.setdefault(name, {}).update(
                seconds=result.median,
                quartiles=[result.lower_quartile, result.upper_quartile],
                spread=result.spread,
                rounds=result.rounds,
            )
            if result.p95 is not None:
                outcomes[name]["p95"] = result.p95
        elif name in rivals:
            outcomes[name] = {"failed": _reason(result)}
        else:
            raise result
    mine = outcomes.pop("bnfast")
    achieved = cell.traffic / mine["seconds"]
    mine["GB/s"] = achieved / 1e9
    row = {
        "normalization": cell.normalization,
        "operation": cell.operation,
        "shape": list(cell.data.shape),
        "layout": cell.data.layout,
        "traffic": cell.traffic,
        "bnfast": mine,
    }
    if probes is not None:
        probed = probes.rates(
            {kind: outcomes.pop(f"memory: {kind}")["seconds"] for kind in probes.calls}
        )
        rate, set_by = limit.best(cell.operation, probed)
        mine["fraction of limit"] = achieved / rate
        row["limit"] = {
            "GB/s": rate / 1e9,
            "set by": set_by,
            "probes in GB/s": {kind: rate / 1e9 for kind, rate in probed.items()},
        }
    for outcome in outcomes.values():
        for of, ratio in (("seconds", "ratio"), ("p95", "p95 ratio")):
            if of in outcome:
                outcome[ratio] = outcome[of] / mine[of]
    return {**row, "rivals": outcomes}


def ready(selection: Selection) -> dict[str, Rival | str]:
    """Import the rivals; one that is installed and does not work stays in the table as failed."""
    # Where OpenMP is LLVM's, as on macOS, idle threads would spin ten times as long as the turns
    # allow for. Read at its first parallel region, which is to come.
    os.environ.setdefault("KMP_BLOCKTIME", "10")
    rivals: dict[str, Rival | str] = {}
    chosen = choose(selection.peers, selection.normalizations)
    for peer in (*REGIMES[selection.regime].beside, *chosen.values()):
        try:
            rivals[peer.title] = peer.load(selection.threads)
        except Exception as error:
            rivals[peer.title] = _reason(error)
    return rivals


def run(selection: Selection, json: Path | None, markdown: Path | None, plot: Path | None) -> int:
    """Measure, print the table and write the files; return the exit status."""
    total = selection.count_cells()
    if waiting := report.overload(load()):
        print(f"this machine is busy: {waiting}; times will be uncertain", file=sys.stderr)
    rivals = ready(selection)
    with report.progress_bar(total) as progress:
        results = measure(selection, rivals, progress)
    if json is not None:
        report.write_json(results, json)
    to_terminal = markdown == Path("-")
    if markdown is not None and not to_terminal:
        markdown.write_text(report.markdown(results) + "\n", encoding="utf-8")
    if plot is not None:
        figure.draw(results, plot)
    if to_terminal:
        print(report.markdown(results))
    else:
        report.show(results)
    if selection.peers is None and (absent := missing(selection.normalizations)):
        packages = dict.fromkeys(name for peer in absent for name in peer.missing())
        print(
            f"Not compared with {', '.join(peer.title for peer in absent)}, for want of: "
            f'{", ".join(packages)}. All come with: python -m pip install "bnfast[bench]"',
            file=sys.stderr,
        )
    return 0
