"""The arguments of ``python -m bnfast recalibrate``."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from bnfast._cli.arguments import Parser, number
from bnfast._cli.failure import missing


def add_arguments(parser: Parser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "Make the statistics of all batch norm layers of an ONNX model anew: those of what arrives "
        "at each layer when the model runs on your data."
    )
    parser.add_argument("model", type=Path, metavar="MODEL.onnx")
    parser.add_argument(
        "--data",
        nargs="+",
        type=Path,
        required=True,
        metavar="PATH",
        help=".npy, .npz and folders of such: samples along the first axis, as the model takes "
        "them; of several inputs, .npz files with their names",
    )
    parser.add_output(
        *("-o", "--output"), required=True, metavar="OUT.onnx", help="where to write the new model"
    )
    parser.add_argument(
        "--batch",
        type=number(int, above=0),
        default=32,
        metavar="NUMBER",
        help="samples at once, unless the model says how many; the result is the same "
        "(default: 32)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with all channels")


def run(options: Namespace) -> int:
    """Recalibrate, write and print; return the exit status."""
    try:
        from bnfast._cli.onnx import recalibration
    except ImportError as error:
        raise missing("onnx, onnxruntime and rich", "onnx", error) from error
    return recalibration.run(options)
