"""Train a small network in many ways; write the pictures and tables of docs/choosing.md.

    python -m pip install ".[demo]"
    python docs/make_choosing.py              about eight minutes on two cores
    python docs/make_choosing.py --quick      a trial, under a minute, into choosing-quick/

The network is that of `python -m bnfast demo`: three convolutions for handwritten digits of 8x8
pixels, plain SGD. Everything is seeded: the same machine gives the same accuracies.
"""

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from threadpoolctl import threadpool_limits

import bnfast
from bnfast._cli import digits
from bnfast._cli.bench.report import duration
from bnfast._cli.bench.run import machine
from bnfast._cli.bench.timing import take_turns
from bnfast._cli.digits import Network, Normalization

PAGE = Path(__file__).parent / "choosing.md"

GHOST, GROUPS = 16, 8
RATE_PER_IMAGE = 0.1 / 32  # the learning rate goes with the size of the batch
ENOUGH = 0.95  # the accuracy from which on a training counts as a success

NONE = "none"


def schedule(steps: int) -> bnfast.RenormSchedule:
    """Return the paper's, as if its training had been of 100,000 steps and ours were as long."""
    return bnfast.RenormSchedule(3.0, 5.0, *(round(steps * part) for part in (0.05, 0.4, 0.25)))


# Called with the number of channels (NHWC) and of training steps; returns a layer.
MEMBERS: dict[str, Callable[[int, int], Any]] = {
    "batch": lambda c, steps: bnfast.BatchNorm(c, axis=-1),
    "ghost": lambda c, steps: bnfast.GhostBatchNorm(c, GHOST, axis=-1),
    "renormalized": lambda c, steps: bnfast.BatchRenorm(
        c, momentum=0.1, schedule=schedule(steps), axis=-1
    ),
    "group": lambda c, steps: bnfast.GroupNorm(GROUPS, c, axis=-1),
    "layer": lambda c, steps: bnfast.LayerNorm(c),
    "instance": lambda c, steps: bnfast.InstanceNorm(c, affine=True, axis=-1),
}


class Training(NamedTuple):
    """One network to train."""

    member: str
    batch_size: int
    learning_rate: float
    epochs: int
    seed: int
    weight_scale: float = 1.0
    after_activation: bool = False
    every_epoch: bool = False


class Outcome(NamedTuple):
    """The mean loss of each epoch, and the test accuracy after it, or after the last alone."""

    losses: list[float]
    accuracies: list[float]


class Size(NamedTuple):
    """How much is trained and measured."""

    batch_sizes: tuple[int, ...]
    epochs: int
    seeds: int
    scales: tuple[float, ...]
    rates: tuple[float, ...]
    map_epochs: int
    map_seeds: int
    order_epochs: int
    order_seeds: int
    shape: tuple[int, int, int, int]
    kernel: tuple[int, int, int, int]
    seconds: float


FULL = Size(
    batch_sizes=(2, 4, 8, 16, 32, 64, 128, 256),
    epochs=15,
    seeds=5,
    scales=(1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8),
    rates=(0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10),
    map_epochs=8,
    map_seeds=3,
    order_epochs=20,
    order_seeds=10,
    shape=(32, 64, 28, 28),
    kernel=(256, 256, 3, 3),
    seconds=5.0,
)
QUICK = Size(
    batch_sizes=(2, 64),
    epochs=1,
    seeds=1,
    scales=(1 / 4, 1),
    rates=(0.03, 0.3),
    map_epochs=1,
    map_seeds=1,
    order_epochs=2,
    order_seeds=2,
    shape=(4, 64, 8, 8),
    kernel=(16, 16, 3, 3),
    seconds=0.1,
)

load = cache(digits.load)


def alone() -> None:
    """Use one thread in this process: the others have the other processors."""
    bnfast.set_num_threads(1)
    threadpool_limits(1)


def train(training: Training) -> Outcome:
    """Train one network."""
    data = load()
    steps = len(data.images) // training.batch_size
    make = MEMBERS.get(training.member)
    network = Network(
        training.seed,
        make and (lambda channels: Normalization(make(channels, training.epochs * steps))),
        after_activation=training.after_activation,
        weight_scale=training.weight_scale,
    )
    outcome = Outcome([], [])
    losses: list[float] = []
    with np.errstate(all="ignore"):  # some learning rates end in overflow
        for loss in network.train(
            data, training.epochs, training.batch_size, training.learning_rate, training.seed
        ):
            losses.append(loss)
            if len(losses) == steps:
                outcome.losses.append(float(np.mean(losses)))
                losses.clear()
                if training.every_epoch or len(outcome.losses) == training.epochs:
                    outcome.accuracies.append(network.accuracy(data))
    return outcome


def train_all(trainings: Iterable[Training], jobs: int) -> dict[Training, Outcome]:
    """Train all networks, so many at once."""
    trainings = list(trainings)
    if jobs == 1:
        return {training: train(training) for training in trainings}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, alone) as pool:
        return dict(zip(trainings, pool.map(train, trainings, chunksize=2), strict=True))


def in_the_end(outcomes: dict[Training, Outcome], **wanted: object) -> np.ndarray:
    """Return the last accuracies of those trainings that have these fields."""
    return np.array(
        [
            outcome.accuracies[-1]
            for training, outcome in outcomes.items()
            if wanted.items() <= training._asdict().items()
        ]
    )


def percent(values: np.ndarray) -> str:
    """Return the median and, where there are several values, the worst of them, in percent."""
    middle, worst = (f"{100 * f(values):.1f}" for f in (np.median, np.min))
    return middle if len(values) == 1 else f"{middle} ({worst})"


def markdown(heading: list[str], rows: list[list[str]]) -> str:
    """Return a table whose first column is text, the others numbers."""
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def new_figure(columns: int, width: float) -> tuple[Figure, list[Axes]]:
    """Return a figure that needs no screen, and its axes."""
    figure = Figure(figsize=(width, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def save(figure: Figure, path: Path) -> None:
    """Write a small PNG."""
    figure.savefig(path, dpi=80, metadata={"Software": None})


def of_batch_sizes(size: Size, jobs: int, folder: Path) -> tuple[str, Any]:
    """Train every member with every size of batch."""
    trainings = [
        Training(member, batch_size, RATE_PER_IMAGE * batch_size, size.epochs, seed)
        for batch_size in size.batch_sizes  # the longest first
        for member in (*MEMBERS, NONE)
        for seed in range(size.seeds)
    ]
    outcomes = train_all(trainings, jobs)
    figure, both = new_figure(2, 11)
    rows, numbers = [], {}
    for number, member in enumerate((*MEMBERS, NONE)):
        accuracies = [
            in_the_end(outcomes, member=member, batch_size=batch) for batch in size.batch_sizes
        ]
        numbers[member] = [list(a) for a in accuracies]
        rows.append([member, *(percent(a) for a in accuracies)])
        colour = "black" if member == NONE else f"C{number}"
        low, middle, high = ([100 * f(a) for a in accuracies] for f in (np.min, np.median, np.max))
        for axes in both:
            axes.plot(
                size.batch_sizes,
                middle,
                marker="osD^vPX"[number],
                markersize=4,
                color=colour,
                linestyle=":" if member == NONE else "-",
                label=member,
            )
            axes.fill_between(size.batch_sizes, low, high, color=colour, alpha=0.1, linewidth=0)
    for axes, lowest, highest in zip(both, (30, 95), (102, 100.2), strict=True):
        axes.set_xscale("log", base=2)
        axes.set_xticks(size.batch_sizes, [str(batch) for batch in size.batch_sizes])
        axes.set(xlabel="batch size (learning rate in proportion)", ylim=(lowest, highest))
        axes.grid(alpha=0.3)
    both[0].set(ylabel="test accuracy in %")
    both[0].legend(fontsize=8, ncols=2)
    both[1].set_title("the same, above 95 %", fontsize=10)
    figure.suptitle(f"After {size.epochs} epochs: median and range of {size.seeds} seeds")
    save(figure, folder / "batch-size.png")
    return markdown(["test accuracy in %", *map(str, size.batch_sizes)], rows), numbers


def of_scales_and_rates(size: Size, jobs: int, folder: Path) -> tuple[str, Any]:
    """Train with and without batch norm from all scales of weights with all learning rates."""
    trainings = [
        Training(member, 64, rate, size.map_epochs, seed, scale)
        for member in ("batch", NONE)
        for scale in size.scales
        for rate in size.rates
        for seed in range(size.map_seeds)
    ]
    outcomes = train_all(trainings, jobs)
    figure, both = new_figure(2, 10)
    rows, numbers = [], {}
    for axes, member in zip(both, ("batch", NONE), strict=True):
        grid = np.array(
            [
                [
                    np.median(
                        in_the_end(outcomes, member=member, weight_scale=scale, learning_rate=rate)
                    )
                    for rate in size.rates
                ]
                for scale in size.scales
            ]
        )
        numbers[member] = grid.tolist()
        good = grid >= ENOUGH
        rows.append(
            [
                "with batch norm" if member == "batch" else "without",
                f"{good.sum()} of {good.size}",
                f"{good.any(1).sum()} of {len(size.scales)}",
                str(good.sum(1).max()),
                f"{100 * grid.max():.1f}",
            ]
        )
        image = axes.imshow(100 * grid, vmin=10, vmax=100, origin="lower", aspect="auto")
        for (i, j), accuracy in np.ndenumerate(grid):
            colour = "black" if accuracy > 0.6 else "white"
            axes.text(j, i, f"{100 * accuracy:.0f}", ha="center", va="center", color=colour)
        axes.set_xticks(range(len(size.rates)), [f"{rate:g}" for rate in size.rates])
        axes.set_yticks(range(len(size.scales)), [f"{scale:g}" for scale in size.scales])
        axes.set(
            xlabel="learning rate",
            ylabel="initial weights, times He's",
            title=rows[-1][0],
        )
    figure.colorbar(image, ax=both, label="test accuracy in %")
    save(figure, folder / "scale-and-rate.png")
    heading = [
        *("network", f"reach {ENOUGH:.0%}", "scales from which a rate does"),
        *("most rates that do from a scale", "best, %"),
    ]
    return markdown(heading, rows), numbers


def of_orders(size: Size, jobs: int, folder: Path) -> tuple[str, Any]:
    """Train with batch norm before the activation, after it, and without."""
    orders = {
        "before the activation": ("batch", False),
        "after the activation": ("batch", True),
        "none": (NONE, False),
    }
    trainings = {
        name: [
            Training(member, 64, RATE_PER_IMAGE * 64, size.order_epochs, seed, 1.0, after, True)
            for seed in range(size.order_seeds)
        ]
        for name, (member, after) in orders.items()
    }
    outcomes = train_all([t for some in trainings.values() for t in some], jobs)
    figure, (left, right) = new_figure(2, 10)
    epochs = range(1, size.order_epochs + 1)
    shown = sorted({1, min(5, size.order_epochs), size.order_epochs})
    rows, numbers = [], {}
    for number, (name, some) in enumerate(trainings.items()):
        colour = "black" if name == "none" else f"C{number}"
        curves = {
            left: np.array([outcomes[t].losses for t in some]),
            right: 100 * np.array([outcomes[t].accuracies for t in some]),
        }
        for axes, curve in curves.items():
            axes.plot(epochs, np.median(curve, 0), color=colour, label=name)
            axes.fill_between(epochs, curve.min(0), curve.max(0), color=colour, alpha=0.15)
        losses, accuracies = curves[left], curves[right] / 100
        numbers[name] = {"losses": losses.tolist(), "accuracies": accuracies.tolist()}
        rows.append(
            [
                name,
                *(percent(accuracies[:, epoch - 1]) for epoch in shown),
                f"{np.median(losses[:, -1]):.2g}",
            ]
        )
    left.set(xlabel="epoch", ylabel="training loss", yscale="log")
    right.set(xlabel="epoch", ylabel="test accuracy in %", ylim=(80, 100.5))
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(f"Batches of 64: median and range of {size.order_seeds} seeds")
    save(figure, folder / "order.png")
    heading = [
        "batch norm",
        *(f"test accuracy in % after {n} {'epoch' if n == 1 else 'epochs'}" for n in shown),
        "loss in the end",
    ]
    return markdown(heading, rows), numbers


def times_apart(calls: dict[str, Any], size: Size) -> dict[str, float]:
    """Return `times` of what matrix products empty the caches for, and of the rest, apart."""
    whitening = {name: calls[name] for name in ("decorrelated", "iterative")}
    others = {name: call for name, call in calls.items() if name not in whitening}
    return times(others, size) | times(whitening, size)


def of_costs(size: Size, jobs: int, folder: Path) -> tuple[str, Any]:
    """Time every member on one shape, and the normalizations of weights on one kernel."""
    rng = np.random.default_rng(0)
    images, channels = size.shape[:2]
    columns: dict[str, dict[str, float]] = {}
    for axis, layout in ((1, "NCHW"), (-1, "NHWC")):
        x, dy = rng.normal(size=(2, *size.shape)).astype(np.float32)
        if axis == -1:
            x, dy = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, dy))
        members = {
            "batch": bnfast.BatchNorm(channels, axis=axis),
            "ghost": bnfast.GhostBatchNorm(channels, max(images // 4, 2), axis=axis),
            "renormalized": bnfast.BatchRenorm(channels, axis=axis),
            "instance": bnfast.InstanceNorm(channels, affine=True, axis=axis),
            "group": bnfast.GroupNorm(GROUPS, channels, axis=axis),
            "layer, of a pixel": bnfast.LayerNorm(channels, axis=axis),
            "layer, of an image": bnfast.LayerNorm(x.shape[1:]),
            "RMS, of a pixel": bnfast.RMSNorm(channels, axis=axis),
            "filter response, with its threshold": bnfast.FilterResponseNorm(channels, axis=axis),
            "decorrelated": bnfast.DecorrelatedBatchNorm(channels, axis=axis),
            "iterative": bnfast.IterNorm(channels, axis=axis),
        }
        y, dx = np.empty_like(x), np.empty_like(x)
        step = partial(train_once, x=x, y=y, dy=dy, dx=dx)
        steps = {name: partial(step, layer) for name, layer in members.items()}
        columns[f"{layout} training"] = times_apart(steps, size)
        calls = {name: partial(layer.eval(), x, out=y) for name, layer in members.items()}
        columns[f"{layout} inference"] = times_apart(calls, size)
    rows = [
        [member, *(relative(column, member) for column in columns.values())]
        for member in columns["NCHW training"]
    ]
    w, dw = rng.normal(size=(2, *size.kernel)).astype(np.float32)
    filters = size.kernel[0]
    weights = {
        "weight norm": bnfast.WeightNorm(w),
        "weight standardization": bnfast.WeightStandardization(filters),
        "scaled weight standardization": bnfast.ScaledWeightStandardization(filters),
        "spectral norm": bnfast.SpectralNorm(w),
    }

    def weigh(layer: Any) -> None:
        layer() if isinstance(layer, bnfast.WeightNorm) else layer(w)
        layer.backward(dw)

    of_kernel = times({name: partial(weigh, layer) for name, layer in weights.items()}, size)
    kernel = "x".join(map(str, size.kernel))
    tables = [
        markdown([f"{'x'.join(map(str, size.shape))}, float32", *columns], rows),
        markdown(
            [f"of a kernel of {kernel}", "each training step"],
            [[name, duration(seconds)] for name, seconds in of_kernel.items()],
        ),
        about(),
    ]
    return "\n\n".join(tables), columns | {"kernel": of_kernel}


def train_once(layer: Any, x: np.ndarray, y: np.ndarray, dy: np.ndarray, dx: np.ndarray) -> None:
    """Go forward and back, into given memory."""
    layer(x, out=y)
    layer.backward(dy, out=dx)


def times(calls: dict[str, Callable[[], None]], size: Size) -> dict[str, float]:
    """Return the median seconds of each call, measured in turn."""
    return {name: t.median for name, t in take_turns(calls, size.seconds).items()}


def relative(column: dict[str, float], member: str) -> str:
    """Return a time, and what multiple of batch norm's it is."""
    return f"{duration(column[member])} ({column[member] / column['batch']:.2g})"


def about() -> str:
    """Return what it was measured on."""
    here = machine()
    return (
        f"One thread, into given memory, medians of calls in turn; in brackets multiples of batch "
        f"norm's. {here['cpu']}, {here['instruction set']}; bnfast {bnfast.__version__}, NumPy "
        f"{np.__version__}."
    )


# What fills the page, by the names of its markers; the costs first, while nothing else runs.
PARTS: dict[str, Callable[[Size, int, Path], tuple[str, Any]]] = {
    "costs": of_costs,
    "batch-size": of_batch_sizes,
    "scale-and-rate": of_scales_and_rates,
    "order": of_orders,
}


def insert(page: str, name: str, table: str) -> str:
    """Return the page with a table between the two markers of this name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = page.partition(begin)
    _, also_found, after = rest.partition(end)
    if not found or not also_found:
        raise SystemExit(f"{PAGE} must have the markers {begin} and {end}")
    return f"{before}{begin}\n{table}\n{end}{after}"


def main() -> None:
    """Do everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="little of everything, as a trial")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="so many networks at once (default: one for each processor, or 1 with --quick)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="for choosing.md, and its pictures in figures/ "
        f"(default: {PAGE.parent.name}, or choosing-quick with --quick)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=[*PARTS],
        metavar="PART",
        help=f"of {', '.join(PARTS)} (default: all): the page keeps the others' tables",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    jobs = options.jobs or (1 if options.quick else bnfast.get_num_threads())
    folder = options.output or (Path("choosing-quick") if options.quick else PAGE.parent)
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    alone()
    start = perf_counter()
    page, numbers = PAGE.read_text(encoding="utf-8"), {}
    for name, measure in PARTS.items():
        if name in options.only:
            table, numbers[name] = measure(size, jobs, figures)
            page = insert(page, name, table)
            print(f"{name}, after {perf_counter() - start:.0f} s\n\n{table}\n", flush=True)
    (folder / PAGE.name).write_text(page, encoding="utf-8")
    if options.json is not None:
        options.json.write_text(json.dumps(numbers), encoding="utf-8")


if __name__ == "__main__":
    main()
