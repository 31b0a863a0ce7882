"""The name under which this process runs bnfast as its program."""

from __future__ import annotations

import re
import sys
from pathlib import Path

SCRIPT, PACKAGE = "bnfast", "python -m bnfast"


def called() -> str:
    """Return what was called: the script, or the package."""
    return SCRIPT if Path(sys.argv[0]).stem == SCRIPT else PACKAGE


def is_starting() -> bool:
    """Return whether this import of bnfast starts its command line, rather than another program.

    For ``python -m NAME ARGUMENTS``, Python imports the package first, with ``-m`` in the place of
    the program's name. The word before the arguments is then ``NAME``, with or without options:
    ``-mNAME``, ``-umNAME``.
    """
    if sys.argv[0] != "-m":
        return called() == SCRIPT
    return re.fullmatch(r"(-\w*m)?bnfast", sys.orig_argv[-len(sys.argv)]) is not None
