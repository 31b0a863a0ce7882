"""``python -m bnfast info``."""

from __future__ import annotations

import json
from argparse import Namespace

from bnfast import show_config
from bnfast._cli.arguments import Parser


def add_arguments(parser: Parser) -> None:
    """Add the arguments of the command."""
    parser.description = "Show what was built and what runs on this machine."
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: Namespace) -> int:
    """Print it."""
    if options.json:
        print(json.dumps(show_config(mode="dicts"), indent=1))
    else:
        show_config()
    return 0
