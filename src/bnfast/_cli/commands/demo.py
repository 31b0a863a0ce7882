"""The arguments of ``python -m bnfast demo``."""

from __future__ import annotations

import argparse

from bnfast._cli.arguments import HALVES, Parser, dtype_of, number
from bnfast._cli.failure import missing


def add_arguments(parser: Parser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "Train a small convolutional network on handwritten digits, with and without batch norm."
    )
    parser.add_argument(
        "--epochs",
        type=number(int, above=0),
        default=15,
        metavar="NUMBER",
        help="passes over the training set (default: 15)",
    )
    parser.add_argument(
        "--learning-rate",
        type=number(float, above=0),
        default=0.5,
        metavar="NUMBER",
        help="of plain SGD, for both (default: 0.5)",
    )
    parser.add_argument(
        "--seed",
        type=number(int, at_least=0),
        default=0,
        metavar="NUMBER",
        help="of weights and order of batches (default: 0)",
    )
    dtypes = (*HALVES, "float32")
    parser.add_argument(
        "--dtype",
        type=dtype_of(dtypes),
        default="float32",
        metavar="NAME",
        help=f"of the activations and their gradients, of {', '.join(dtypes)}; parameters are "
        "float32 (default: float32)",
    )
    fused = parser.add_mutually_exclusive_group()
    fused.add_argument(
        "--fused",
        action="store_const",
        const="fused",
        help="batch norm and ReLU in one pass, forward and backward",
    )
    fused.add_argument(
        "--in-place",
        dest="fused",
        action="store_const",
        const="inplace",
        help="batch norm and a leaky ReLU in the memory of their input, which is not kept",
    )
    parser.add_output(
        "--output",
        suffix=".png",
        metavar="FILE.png",
        help="the plot (default: bnfast_demo.png, or bnfast_demo_2.png and so on, the first that "
        "no file in the current folder has)",
    )


def run(options: argparse.Namespace) -> int:
    """Train, print and plot; return the exit status."""
    try:
        from bnfast._cli import demo
    except ImportError as error:
        raise missing("scikit-learn, matplotlib and rich", "demo", error) from error
    return demo.run(options)
