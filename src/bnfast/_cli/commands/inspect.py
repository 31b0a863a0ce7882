"""The arguments of ``python -m bnfast inspect``."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from bnfast._cli.arguments import Parser
from bnfast._cli.failure import missing


def add_arguments(parser: Parser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "List the normalization layers of an ONNX model: what is unusual in the statistics of "
        "batch norm, and which layers could be folded into their neighbours."
    )
    parser.add_argument("model", type=Path, metavar="MODEL.onnx")
    parser.add_argument("--json", action="store_true", help="print JSON, with all channels")
    parser.add_output(
        "--plot",
        suffix=".png",
        metavar="FILE.png",
        help="draw the deviations of all batch norm",
    )


def run(options: Namespace) -> int:
    """Read, draw and print; return the exit status."""
    try:
        from bnfast._cli.onnx import inspection
    except ImportError as error:
        raise missing("onnx, onnxruntime and rich", "onnx", error) from error
    return inspection.run(options)
