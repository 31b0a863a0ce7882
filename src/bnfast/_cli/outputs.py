"""Where commands write: never over a file, unless they are told to."""

from __future__ import annotations

import os
from itertools import chain, count
from pathlib import Path

from bnfast._cli.failure import Failure


def check_output(path: Path, force: bool) -> None:
    """Refuse a path that cannot be written, or where a file is, unless it may be written over.

    Pipes and devices (``/dev/null``) have nothing to lose.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise Failure(f"{path}: the folder {folder} does not exist")
    if path.is_dir():
        raise Failure(f"{path}: expected a file to write to, got a folder")
    if path.is_file() and not force:
        raise Failure(f"{path} exists, and is not written over without --force")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise Failure(f"{path}: cannot be written: no permission")


def free_name(name: str) -> Path:
    """Return this name, or with a number the first in the current folder that no file has."""
    first = Path(name)
    numbered = (first.with_stem(f"{first.stem}_{number}") for number in count(2))
    return next(path for path in chain([first], numbered) if not path.exists())
