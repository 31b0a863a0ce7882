"""The arguments of ``python -m bnfast bench``."""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from bnfast import _dtypes
from bnfast._cli.arguments import HALVES, Parser, dtype_of, number, one_of, several_of
from bnfast._cli.bench import rivals, workloads
from bnfast._cli.bench.cell import OFFSET, OPERATIONS, PAGE
from bnfast._cli.bench.normalizations import NORMALIZATIONS
from bnfast._cli.bench.regime import REGIMES
from bnfast._cli.failure import Misuse, missing
from bnfast._threads import allowed_threads


def _shapes(text: str) -> str:
    try:
        workloads.parse(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None
    return text


def _threads(text: str) -> int:
    threads = int(number(int, above=0)(text))
    if threads > allowed_threads():
        raise ArgumentTypeError(
            f"expected at most {allowed_threads()}, the processors of this process, got {text}"
        )
    return threads


def _default_shapes() -> Iterator[str]:
    for name, norm in NORMALIZATIONS.items():
        yield f"{norm.shapes} for {name}"
    for regime, about in REGIMES.items():
        for name, shapes in about.shapes.items():
            yield f"{shapes} for {name} in regime {regime}"


def add_arguments(parser: Parser) -> None:
    """Add the arguments of the command."""
    parser.description = "Measure bnfast and every rival that is installed, in turn, call by call."
    parser.add_argument(
        "--norm",
        nargs="+",
        type=several_of(tuple(NORMALIZATIONS)),
        default=[("batch",)],
        metavar="NAME",
        help=f"of {', '.join(NORMALIZATIONS)} (default: batch)",
    )
    parser.add_argument(
        "--op",
        nargs="+",
        type=several_of(OPERATIONS),
        default=[OPERATIONS],
        metavar="NAME",
        help="inference, training and backward of batch norm, moments of tables, forward and "
        "backward of the others (default: all)",
    )
    parser.add_argument(
        "--layout",
        nargs="+",
        type=several_of(workloads.LAYOUTS),
        default=[workloads.LAYOUTS],
        metavar="NAME",
        help=f"of {', '.join(workloads.LAYOUTS)} (default: both); rows, weights and "
        "tables have but one",
    )
    dtypes = (*HALVES, "float32", "float64")
    parser.add_argument(
        "--dtype",
        type=dtype_of(dtypes),
        default="float32",
        metavar="NAME",
        help=f"of the data, of {', '.join(dtypes)}; parameters of data of 16 bits are float32 "
        "(default: float32)",
    )
    parser.add_argument(
        "--shapes",
        type=_shapes,
        metavar="NAME|NxCxHxW,...",
        help=f"sets of shapes and shapes, of {', '.join(workloads.SETS)} "
        f"(default: {'; '.join(_default_shapes())})",
    )
    parser.add_argument(
        "--threads",
        type=_threads,
        default=1,
        metavar="NUMBER",
        help="of every contender (default: 1)",
    )
    parser.add_argument(
        "--regime",
        type=one_of(tuple(REGIMES)),
        default="out",
        metavar="NAME",
        help=f"{'; '.join(f'{name}: {regime.help}' for name, regime in REGIMES.items())} "
        "(default: out)",
    )
    parser.add_argument(
        "--peers",
        type=several_of(tuple(rivals.PEERS)),
        metavar="NAME,...",
        help=f"rivals, of {', '.join(rivals.PEERS)} (default: all that are installed)",
    )
    parser.add_argument(
        "--mean",
        type=number(float),
        default=0.0,
        metavar="NUMBER",
        help="of the data, whose deviation is 1 (default: 0)",
    )
    parser.add_argument(
        "--offset",
        type=number(int),
        default=OFFSET,
        metavar="BYTES",
        help="how far past a page of memory, and so past a cache line, all arrays begin: "
        f"{OFFSET}, as NumPy's large arrays do (the default); 0, aligned, as memory made for "
        f"oneDNN; or any multiple of the element's size below {PAGE}",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few shapes, unless --shapes says which; short turns"
    )
    parser.add_output("--json", metavar="FILE", help="write all numbers")
    parser.add_output(
        "--markdown",
        nargs="?",
        const=Path("-"),
        metavar="FILE",
        help="write the tables as Markdown, or print them so",
    )
    parser.add_output("--plot", suffix=".png", metavar="FILE.png", help="draw the ratios")


def run(options: Namespace) -> int:
    """Measure, print and write; return the exit status."""
    step = _dtypes.named(options.dtype).itemsize
    if options.offset not in range(0, PAGE, step):
        raise Misuse(
            f"argument --offset: expected a multiple of {step}, the bytes of a {options.dtype}, "
            f"from 0 to {PAGE - step}, got {options.offset}"
        )
    try:
        from bnfast._cli.bench import run
    except ImportError as error:
        raise missing("matplotlib, rich and threadpoolctl", "bench", error) from error
    selection = run.Selection(
        tuple(dict.fromkeys(chain.from_iterable(options.norm))),
        tuple(chain.from_iterable(options.op)),
        tuple(chain.from_iterable(options.layout)),
        options.dtype,
        options.shapes,
        options.threads,
        options.regime,
        options.peers,
        options.mean,
        options.quick,
        options.offset,
    )
    return run.run(selection, options.json, options.markdown, options.plot)
