"""The command line: `commands` has one module for each, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from bnfast import __version__, _program
from bnfast._cli.arguments import Parser, not_one_of
from bnfast._cli.failure import Failure, Misuse

COMMANDS = {
    "info": "what was built and what runs on this machine",
    "demo": "train a small network on handwritten digits, with and without batch norm",
    "stats": "count, mean, std and extremes of each channel of arrays and images, as one data set",
    "fold": "fold the batch norms of an ONNX model into the layers beside them",
    "inspect": "the normalization layers of an ONNX model, and whether their statistics are sound",
    "recalibrate": "give batch norm in an ONNX model the statistics of your data",
    "bench": "measure bnfast and every rival that is installed, in one run",
}


def _general_parser(program: str) -> Parser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {about}" for name, about in COMMANDS.items()]
    parser = Parser(
        prog=program,
        usage="%(prog)s COMMAND ...",
        description="Batch normalization on the CPU.",
        epilog="\n".join(["commands:", *lines, "", f"{program} COMMAND --help says more."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bnfast {__version__}")
    return parser


def command(name: str) -> tuple[ModuleType, Parser]:
    """Return the module of a command, and a parser with its arguments."""
    module = importlib.import_module(f"bnfast._cli.commands.{name}")
    parser = Parser(prog=f"{_program.called()} {name}")
    module.add_arguments(parser)
    return module, parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Without any, show the help and succeed, as pip does: who calls a program to see what it has
    made no mistake.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    program = _program.called()
    try:
        if not given or given[0].startswith("-"):
            general = _general_parser(program)
            general.parse(given)  # shows the help or the version, and ends, or refuses
            general.print_help()
            return 0
        name, *rest = given
        if name not in COMMANDS:
            raise Misuse(f"argument COMMAND: {not_one_of(name, tuple(COMMANDS))}")
        program = f"{program} {name}"
        module, parser = command(name)
        status: int = module.run(parser.parse(rest))
        return status
    except Failure as failure:
        print(f"{program}: {failure}", file=sys.stderr)
        return failure.status
