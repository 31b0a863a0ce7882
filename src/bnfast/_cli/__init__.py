"""The command line: one module for each command, imported when it is called."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from bnfast import __version__, _dtypes, show_config
from bnfast._cli.bench import rivals, workloads
from bnfast._cli.bench.cell import OFFSET, OPERATIONS, PAGE
from bnfast._cli.bench.normalizations import NORMALIZATIONS
from bnfast._cli.bench.regime import REGIMES
from bnfast._threads import allowed_threads

HALVES = ("float16", "bfloat16")


def _positive(kind: type[int] | type[float], *, or_zero: bool = False) -> Callable[[str], float]:
    def convert(text: str) -> float:
        number = kind(text)
        if number > 0 or (or_zero and number == 0):
            return number
        raise argparse.ArgumentTypeError(f"must be {'at least' if or_zero else 'above'} 0")

    convert.__name__ = kind.__name__  # argparse names it in messages
    return convert


def _new_file(text: str) -> Path:
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder of {text} does not exist")
    return path


def _new_png(text: str) -> Path:
    if Path(text).suffix != ".png":
        raise argparse.ArgumentTypeError(f"{text} must end in .png")
    return _new_file(text)


def _shapes(text: str) -> str:
    try:
        workloads.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _threads(text: str) -> int:
    threads = int(_positive(int)(text))
    if threads > allowed_threads():
        raise argparse.ArgumentTypeError(f"this process may use {allowed_threads()} processors")
    return threads


def _of(choices: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def names(text: str) -> tuple[str, ...]:
        chosen = tuple(text.lower().split(","))
        for name in chosen:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"{name!r} is none of: {', '.join(choices)}")
        return chosen

    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bnfast", description="Batch normalization on the CPU."
    )
    parser.add_argument("--version", action="version", version=f"bnfast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("info", help="what was built and what runs on this machine")
    demo = commands.add_parser(
        "demo",
        help="train a small network on handwritten digits, with and without batch norm",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument(
        "--epochs", type=_positive(int), default=15, help="passes over the training set"
    )
    demo.add_argument(
        "--learning-rate", type=_positive(float), default=0.5, help="of plain SGD, for both"
    )
    demo.add_argument(
        "--seed",
        type=_positive(int, or_zero=True),
        default=0,
        help="of weights and order of batches",
    )
    demo.add_argument(
        "--dtype",
        choices=(*HALVES, "float32"),
        default="float32",
        help="of the activations and their gradients; parameters are float32",
    )
    demo.set_defaults(fused=None)
    fused = demo.add_mutually_exclusive_group()
    fused.add_argument(
        "--fused",
        action="store_const",
        const="fused",
        default=argparse.SUPPRESS,  # which the help does not show
        help="batch norm and ReLU in one pass, forward and backward",
    )
    fused.add_argument(
        "--in-place",
        dest="fused",
        action="store_const",
        const="inplace",
        default=argparse.SUPPRESS,
        help="batch norm and a leaky ReLU in the memory of their input, which is not kept",
    )
    demo.add_argument(
        "--output", type=_new_png, default="bnfast_demo.png", metavar="FILE", help="the plot"
    )
    _add_stats(commands)
    _add_fold(commands)
    _add_inspect(commands)
    _add_recalibrate(commands)
    _add_bench(commands)
    return parser


def _axes(text: str) -> tuple[int, ...]:
    return () if text == "none" else tuple(int(number) for number in text.split(","))


def _new_npz(text: str) -> Path:
    if Path(text).suffix != ".npz":
        raise argparse.ArgumentTypeError(f"{text} must end in .npz")
    return _new_file(text)


def _add_stats(commands: Any) -> None:
    stats = commands.add_parser(
        "stats",
        help="count, mean, std and extremes of each channel of arrays and images, as one data set",
        description="Print count, mean, standard deviation, extremes and the number of values "
        "that are not finite, of each channel of a data set of any size: of all files together.",
    )
    stats.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help=".npy, .npz, zarr, an image, a folder of images, or what --save wrote",
    )
    stats.add_argument(
        "--axis",
        type=_axes,
        metavar="AXIS,...|none",
        help="the axes that are kept: that of the channels, several (-2,-1), or none for one value "
        "of all (default: 1, or none for arrays of one axis; of images, the colours)",
    )
    # What argparse takes for a negative number, and not for an option; Python 3.14 does it so.
    stats._negative_number_matcher = re.compile(r"-\d")
    stats.add_argument(
        "--member",
        action="append",
        default=[],
        metavar="NAME",
        help="an array in .npz or in a group of zarr; may be repeated (default: all)",
    )
    stats.add_argument(
        "--finite", action="store_true", help="leave out values that are NaN or infinite"
    )
    stats.add_argument(
        "--convert", choices=("L", "RGB", "RGBA"), help="convert images to this mode first"
    )
    stats.add_argument(
        "--skip",
        action="store_true",
        help="leave out what cannot be read, or differs from the first in mode or channels",
    )
    stats.add_argument(
        "--save", type=_new_npz, metavar="FILE.npz", help="write the statistics, to be merged later"
    )
    forms = stats.add_mutually_exclusive_group()
    for form, text in (
        ("json", "print JSON, with all digits"),
        ("normalize", "print the lines that normalize such data in torchvision and in Keras"),
    ):
        forms.add_argument(
            f"--{form}", dest="form", action="store_const", const=form, default="table", help=text
        )
    stats.add_argument(
        "--divide-by",
        type=_positive(float),
        metavar="NUMBER",
        help="for --normalize, the value that counts as 1 (default: 255 and 65535 for unsigned "
        "integers of 8 and 16 bits, 1 for others)",
    )


def _add_fold(commands: Any) -> None:
    fold = commands.add_parser(
        "fold",
        help="fold the batch norms of an ONNX model into the layers beside them",
        description="Fold each batch norm of an ONNX model into the convolution or matrix product "
        "before it, or after it where that is exact; say what became of each, and why; write the "
        "model if onnxruntime gets the same outputs from it.",
    )
    fold.add_argument("model", type=Path, metavar="MODEL.onnx", help="which is left as it is")
    fold.add_argument(
        "-o",
        "--output",
        type=_new_file,
        required=True,
        metavar="FILE.onnx",
        help="where to write the folded model",
    )
    fold.add_argument(
        "--data",
        type=Path,
        metavar="FILE.npz",
        help="arrays named as the inputs, to compare outputs of (default: random numbers)",
    )
    fold.add_argument(
        "--tolerance",
        type=_positive(float, or_zero=True),
        metavar="NUMBER",
        help="by how much outputs may differ, relative to the largest value of each (default: the "
        "square root of the type's eps, 0.0003 for float32)",
    )


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="the normalization layers of an ONNX model, and whether their statistics are sound",
        description="List the normalization layers of an ONNX model: what is unusual in the "
        "statistics of batch norm, and which layers could be folded into their neighbours.",
    )
    inspect.add_argument("model", type=Path, metavar="MODEL.onnx")
    inspect.add_argument("--json", action="store_true", help="print JSON, with all channels")
    inspect.add_argument(
        "--plot", type=_new_png, metavar="FILE.png", help="draw the deviations of all batch norm"
    )


def _add_recalibrate(commands: Any) -> None:
    recalibrate = commands.add_parser(
        "recalibrate",
        help="give batch norm in an ONNX model the statistics of your data",
        description="Make the statistics of all batch norm layers of an ONNX model anew: those of "
        "what arrives at each layer when the model runs on your data.",
    )
    recalibrate.add_argument("model", type=Path, metavar="MODEL.onnx")
    recalibrate.add_argument(
        "--data",
        nargs="+",
        type=Path,
        required=True,
        metavar="PATH",
        help=".npy, .npz and folders of such: samples along the first axis, as the model takes "
        "them; of several inputs, .npz files with their names",
    )
    recalibrate.add_argument(
        "-o", "--output", type=_new_file, required=True, metavar="OUT.onnx", help="the new model"
    )
    recalibrate.add_argument(
        "--batch",
        type=_positive(int),
        default=32,
        metavar="NUMBER",
        help="samples at once, unless the model says how many; the result is the same "
        "(default: 32)",
    )
    recalibrate.add_argument("--json", action="store_true", help="print JSON, with all channels")


def _default_shapes() -> Iterator[str]:
    for name, norm in NORMALIZATIONS.items():
        yield f"{norm.shapes} for {name}"
    for regime, about in REGIMES.items():
        for name, shapes in about.shapes.items():
            yield f"{shapes} for {name} in regime {regime}"


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure bnfast and every rival that is installed, in one run",
        description="Measure bnfast and every rival that is installed, in turn, call by call.",
    )
    bench.add_argument(
        "--norm",
        nargs="+",
        type=_of(tuple(NORMALIZATIONS)),
        default=[("batch",)],
        metavar="NAME",
        help=f"of {', '.join(NORMALIZATIONS)} (default: batch)",
    )
    bench.add_argument(
        "--op",
        nargs="+",
        type=_of(OPERATIONS),
        default=[OPERATIONS],
        metavar="NAME",
        help="inference, training and backward of batch norm, moments of tables, forward and "
        "backward of the others (default: all)",
    )
    bench.add_argument(
        "--layout",
        nargs="+",
        type=_of(workloads.LAYOUTS),
        default=[workloads.LAYOUTS],
        metavar="NAME",
        help=f"of {', '.join(workloads.LAYOUTS)} (default: both); rows, weights and "
        "tables have but one",
    )
    bench.add_argument(
        "--dtype",
        choices=(*HALVES, "float32", "float64"),
        default="float32",
        help="of the data; parameters of data of 16 bits are float32 (default: float32)",
    )
    bench.add_argument(
        "--shapes",
        type=_shapes,
        metavar="NAME|NxCxHxW,...",
        help=f"sets of shapes and shapes, of {', '.join(workloads.SETS)} "
        f"(default: {'; '.join(_default_shapes())})",
    )
    bench.add_argument(
        "--threads", type=_threads, default=1, help="of every contender (default: 1)"
    )
    bench.add_argument(
        "--regime",
        choices=tuple(REGIMES),
        default="out",
        help=f"{'; '.join(f'{name}: {regime.help}' for name, regime in REGIMES.items())} "
        "(default: out)",
    )
    bench.add_argument(
        "--peers",
        type=_of(tuple(rivals.PEERS)),
        metavar="NAME,...",
        help=f"rivals, of {', '.join(rivals.PEERS)} (default: all that are installed)",
    )
    bench.add_argument(
        "--mean", type=float, default=0.0, help="of the data, whose deviation is 1 (default: 0)"
    )
    bench.add_argument(
        "--offset",
        type=int,
        default=OFFSET,
        metavar="BYTES",
        help="how far past a page of memory, and so past a cache line, all arrays begin: "
        f"{OFFSET}, as NumPy's large arrays do (the default); 0, aligned, as memory made for "
        f"oneDNN; or any multiple of the element's size below {PAGE}",
    )
    bench.add_argument(
        "--quick", action="store_true", help="few shapes, unless --shapes says which; short turns"
    )
    bench.add_argument("--json", type=_new_file, metavar="FILE", help="write all numbers")
    bench.add_argument(
        "--markdown",
        nargs="?",
        type=_new_file,
        const=Path("-"),
        metavar="FILE",
        help="write the tables as Markdown, or print them so",
    )
    bench.add_argument("--plot", type=_new_png, metavar="FILE.png", help="draw the ratios")
    bench.set_defaults(refuse=bench.error)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = _parser().parse_args(arguments)
    if options.command == "info":
        show_config()
        return 0
    if getattr(options, "dtype", None) == "bfloat16":
        try:
            _dtypes.named("bfloat16")
        except ImportError as error:
            print(
                f"--dtype bfloat16 needs ml_dtypes ({error}).\n"
                "Install it with: python -m pip install ml_dtypes",
                file=sys.stderr,
            )
            return 1
    if options.command == "bench":
        return _bench(options)
    if options.command == "stats":
        from bnfast._cli.stats import run as stats

        return stats.run(options)
    if options.command in ("fold", "inspect", "recalibrate"):
        return _onnx(options)
    try:
        from bnfast._cli import demo
    except ImportError as error:
        print(
            f"python -m bnfast demo needs scikit-learn, matplotlib and rich ({error}).\n"
            "Install them with: python -m pip install scikit-learn matplotlib rich",
            file=sys.stderr,
        )
        return 1
    return demo.run(
        *(options.epochs, options.learning_rate, options.seed, options.output),
        *(options.dtype, options.fused),
    )


def _onnx(options: argparse.Namespace) -> int:
    try:
        if options.command == "fold":
            from bnfast._cli.onnx.fold import run
        elif options.command == "inspect":
            from bnfast._cli.onnx.inspection import run
        else:
            from bnfast._cli.onnx.recalibration import run
    except ImportError as error:
        print(
            f"python -m bnfast {options.command} needs onnx, onnxruntime and rich ({error}).\n"
            "Install them with: python -m pip install onnx onnxruntime rich",
            file=sys.stderr,
        )
        return 1
    return run(options)


def _bench(options: argparse.Namespace) -> int:
    step = _dtypes.named(options.dtype).itemsize
    if options.offset not in range(0, PAGE, step):
        options.refuse(
            f"argument --offset: {options.offset} is no multiple of {step}, the bytes of a "
            f"{options.dtype}, from 0 to {PAGE - step}"
        )
    try:
        from bnfast._cli.bench import run
    except ImportError as error:
        print(
            f"python -m bnfast bench needs matplotlib, rich and threadpoolctl ({error}).\n"
            "Install them with: python -m pip install matplotlib rich threadpoolctl\n"
            'or, with every rival, in a clone: python -m pip install ".[bench]"',
            file=sys.stderr,
        )
        return 1
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
