"""``python -m bnfast``."""

import os
import sys

from bnfast._cli import main


def _run() -> int:
    """Run one command; where what reads its output has left (``| head -1``), end without a word."""
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(_run())
