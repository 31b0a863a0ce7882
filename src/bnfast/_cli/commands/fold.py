"""The arguments of ``python -m bnfast fold``."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from bnfast._cli.arguments import Parser, number
from bnfast._cli.failure import missing


def add_arguments(parser: Parser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "Fold each batch norm of an ONNX model into the convolution or matrix product before it, "
        "or after it where that is exact; say what became of each, and why; write the model if "
        "onnxruntime gets the same outputs from it."
    )
    parser.add_argument("model", type=Path, metavar="MODEL.onnx", help="which is left as it is")
    parser.add_output(
        *("-o", "--output"),
        required=True,
        metavar="FILE.onnx",
        help="where to write the folded model",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help=".npy or .npz, of several inputs with their names: what to compare outputs of "
        "(default: random numbers)",
    )
    parser.add_argument(
        "--tolerance",
        type=number(float, at_least=0),
        metavar="NUMBER",
        help="by how much outputs may differ, relative to the largest value of each (default: the "
        "square root of the type's eps, 0.0003 for float32)",
    )


def run(options: Namespace) -> int:
    """Fold, compare, write and print; return the exit status."""
    try:
        from bnfast._cli.onnx import fold
    except ImportError as error:
        raise missing("onnx, onnxruntime and rich", "onnx", error) from error
    return fold.run(options)
