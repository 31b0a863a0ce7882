"""What synchronizing costs: a step of two ranks beside a local one, and the exchange alone.

    python -m pip install mpi4py mpich
    python benchmarks/bench_distributed.py              prints the tables, in about a minute
    python benchmarks/bench_distributed.py --write      puts them into docs/scaling.md
    python benchmarks/bench_distributed.py --quick      whether it runs

Starts ``mpiexec`` itself, with 2 and with 4 ranks. A rank has one thread. Tables of more ranks are
those of the formula in docs/scaling.md, with the constants that this program finds.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np

import bnfast
from bnfast import _primitives
from bnfast.distributed import MPICommunicator, sync_batch_norm_backward, sync_batch_norm_forward
from bnfast.distributed.exchange import exchanged

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
MPIEXEC = shutil.which("mpiexec", path=Path(sys.executable).parent) or "mpiexec"

SHAPE = (32, 64, 56, 56)
CHANNELS = (1, 16, 64, 256, 1024, 4096)
RANKS = (2, 4)
PREDICTED = (2, 4, 16, 64, 256, 1024, 4096)
LAYERS = ((32, 64, 56, 56), (32, 256, 28, 28), (32, 2048, 7, 7))
VALUES = 3  # of a channel, in the larger of the two exchanges: mean, its rest, m2
TURNS = 100

MESSAGE_SECONDS = 2e-6  # from one machine to another, for the predictions

Calls = dict[str, Callable[[], object]]


def in_turns(calls: Calls, turns: int, wait: Callable[[], object]) -> dict[str, float]:
    """Seconds of the fastest call of each, in turn; all ranks begin each call together."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 3):
        for name, call in calls.items():
            wait()
            began = perf_counter()
            call()
            if turn >= 3:
                times[name].append(perf_counter() - began)
    return {name: min(each) for name, each in times.items()}


def steps(shape: tuple[int, ...], axis: int, communicator=None) -> Calls:
    """A local step and, of ranks, the synchronized one."""
    channels = shape[axis]
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, *shape)).astype(np.float32)
    weight, bias, out = (
        np.ones(channels, np.float32),
        np.zeros(channels, np.float32),
        np.empty_like(x),
    )
    saved = bnfast.batch_norm_forward(x, axis=axis)[1:]
    given = {"axis": axis, "out": out}
    calls: Calls = {
        "forward": lambda: bnfast.batch_norm_forward(x, weight, bias, **given),
        "backward": lambda: bnfast.batch_norm_backward(dy, x, *saved, weight, **given),
    }
    if communicator is not None:
        _, of_all = sync_batch_norm_forward(x, communicator, axis=axis)
        calls["synchronized forward"] = lambda: sync_batch_norm_forward(
            x, communicator, weight, bias, **given
        )
        calls["synchronized backward"] = lambda: sync_batch_norm_backward(
            dy, x, of_all, communicator, weight, **given
        )
    return calls


def exchange_of(channels: int, communicator) -> Callable[[], object]:
    """What comes between the two passes of a synchronized forward call."""
    values, terms = np.ones((VALUES, channels)), {"channels": channels}

    def exchange():
        counts, moments = exchanged(communicator, terms, 100, values)
        return _primitives.merge_moments(counts, moments)

    return exchange


def measure_as_rank(path: Path, turns: int) -> None:
    """Measure what takes ranks; the slowest counts."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    communicator = MPICommunicator(world)
    found: dict[str, dict] = {"steps": {}, "exchange": {}}
    if communicator.size == 2:
        for name, shape, axis in (("NCHW", SHAPE, 1), ("NHWC", (32, 56, 56, 64), -1)):
            calls = steps(shape, axis, communicator)
            found["steps"][name] = in_turns(calls, turns, world.Barrier)
    calls = {str(c): exchange_of(c, communicator) for c in CHANNELS}
    found["exchange"] = in_turns(calls, 5 * turns, world.Barrier)
    every = world.gather(found)
    if every is not None:
        slowest = {
            kind: {
                name: {k: max(each[kind][name][k] for each in every) for k in value}
                if isinstance(value, dict)
                else max(each[kind][name] for each in every)
                for name, value in found[kind].items()
            }
            for kind in found
        }
        path.write_text(json.dumps(slowest))


def measured(ranks: int, turns: int) -> dict:
    """What so many ranks measure."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        subprocess.run(
            [
                *(MPIEXEC, "-n", str(ranks), sys.executable, __file__),
                *("--as-rank", path, "--turns", str(turns)),
            ],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "BNFAST_NUM_THREADS": "1"},
        )
        return json.loads(path.read_text())


def constants_of(exchange: dict[str, float], ranks: int) -> tuple[float, float]:
    """Seconds, and seconds for each byte that another rank sends: the best fit, by proportion."""
    channels = np.array([int(name) for name in exchange])
    times = np.array(list(exchange.values()))
    sent = channels * VALUES * 8.0 * (ranks - 1)
    columns = np.stack([np.ones_like(sent), sent], axis=1) / times[:, None]
    fixed, each = np.linalg.lstsq(columns, np.ones_like(times), rcond=None)[0]
    return float(fixed), float(each)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def microseconds(seconds: float) -> str:
    digits = 0 if seconds >= 99.5e-6 else 1
    return f"{seconds * 1e6:,.{digits}f}"


def tables(turns: int) -> dict[str, str]:
    """Measure everything; the tables by the names of their markers in the page."""
    found = {ranks: measured(ranks, turns) for ranks in RANKS}
    rows = []
    for name, times in found[2]["steps"].items():
        for call in ("forward", "backward"):
            local, synchronized = times[call], times[f"synchronized {call}"]
            more = synchronized / local - 1
            rows.append(
                (name, call, f"{local * 1e3:.2f}", f"{synchronized * 1e3:.2f}", f"{more:+.0%}")
            )
    head = ("layout", "call", "local, ms", "synchronized, ms", "more")
    written = {"steps": table(head, rows)}

    fits = {ranks: constants_of(found[ranks]["exchange"], ranks) for ranks in RANKS}
    rows = []
    for channels in CHANNELS:
        row = [str(channels)]
        for ranks in RANKS:
            fixed, each = fits[ranks]
            time = found[ranks]["exchange"][str(channels)]
            fitted = fixed + each * channels * VALUES * 8 * (ranks - 1)
            row += [microseconds(time), microseconds(fitted)]
        rows.append(tuple(row))
    head = ("channels", *[f"{n} ranks, {what}" for n in RANKS for what in ("µs", "fitted")])
    written["exchange"] = table(head, rows)
    written["constants"] = table(
        ("ranks", "fixed, µs", "bandwidth, GB/s"),
        [(str(n), microseconds(fixed), f"{1e-9 / each:.2f}") for n, (fixed, each) in fits.items()],
    )

    begin, byte = fits[2]  # of one step between two ranks
    bnfast.set_num_threads(1)
    rows = []
    for shape in LAYERS:
        local = in_turns(steps(shape, 1), 15, lambda: None)
        work, channels = local["forward"] + local["backward"], shape[1]
        row = ["x".join(map(str, shape)), microseconds(work)]
        for ranks in PREDICTED:
            time = 2 * (begin + MESSAGE_SECONDS * (np.log2(ranks) - 1))
            time += byte * channels * 8 * (VALUES + 2) * (ranks - 1)
            row.append(f"{time / work:.1%}" if time < work / 10 else f"{time / work:.0%}")
        rows.append(tuple(row))
    head = ("part of a rank", "local step, µs", *[f"{n:,}" for n in PREDICTED])
    written["predicted"] = table(head, rows)
    return written


def put_into(page: str, name: str, text: str) -> str:
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, rest = page.split(begin)
    return before + begin + text + "\n" + end + rest.split(end, 1)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    parser.add_argument("--turns", type=int, default=TURNS, help="calls of each")
    parser.add_argument("--quick", action="store_true", help="few turns: a trial")
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_rank:
        measure_as_rank(arguments.as_rank, arguments.turns)
        return
    page = PAGE.read_text() if arguments.write else ""
    for name, text in tables(3 if arguments.quick else arguments.turns).items():
        print(f"{name}\n\n{text}\n")
        if arguments.write:
            page = put_into(page, name, text)
    if arguments.write:
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
