"""``python -m bnfast``, and the script ``bnfast``."""

import errno
import os
import sys

from bnfast._cli import main


def _say_interrupted(*about: object) -> None:
    print("interrupted", file=sys.stderr)


def run() -> int:
    """Run one command, as the whole of a process.

    Where what reads its output has left (``| head -1``), it ends without a word; where a disk is
    full, with one line. So it does at Ctrl-C: as a program that this signal has ended, which a
    shell calls status 130, and for which it ends its loop.
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
    except KeyboardInterrupt:
        sys.excepthook = _say_interrupted
        raise


if __name__ == "__main__":
    sys.exit(run())
