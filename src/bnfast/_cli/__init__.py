"""The command line: one module for each command, imported when it is called."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bnfast import __version__, show_config


def _positive(kind: type[int] | type[float], *, or_zero: bool = False) -> Callable[[str], float]:
    def convert(text: str) -> float:
        number = kind(text)
        if number > 0 or (or_zero and number == 0):
            return number
        raise argparse.ArgumentTypeError(f"must be {'at least' if or_zero else 'above'} 0")

    convert.__name__ = kind.__name__  # argparse names it in messages
    return convert


def _new_png(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".png":
        raise argparse.ArgumentTypeError(f"{text} must end in .png")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder of {text} does not exist")
    return path


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
        "--output", type=_new_png, default="bnfast_demo.png", metavar="FILE", help="the plot"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = _parser().parse_args(arguments)
    if options.command == "info":
        show_config()
        return 0
    try:
        from bnfast._cli import demo
    except ImportError as error:
        print(
            f"python -m bnfast demo needs scikit-learn, matplotlib and rich ({error}).\n"
            "Install them with: python -m pip install scikit-learn matplotlib rich",
            file=sys.stderr,
        )
        return 1
    return demo.run(options.epochs, options.learning_rate, options.seed, options.output)
