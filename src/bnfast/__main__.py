"""``python -m bnfast``."""

import errno
import os
import sys

from bnfast._cli import main


def _run() -> int:
    """Run one command.

    Where what reads its output has left (``| head -1``), it ends without a word; where a disk is
    full, with one line.
    """
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        if error.errno == errno.ENOSPC:
            of_file = f"{error.filename}: " if error.filename else ""
            print(f"{of_file}cannot be written: {error.strerror}", file=sys.stderr)
        # Python flushes once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(_run())
