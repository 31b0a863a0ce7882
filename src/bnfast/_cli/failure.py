"""What ends a command, as its user is told."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class Failure(Exception):
    """What the user is told, in one line."""

    status = 1  # of the process


class Misuse(Failure):
    """A command line that cannot be obeyed, whatever the files and the machine are like."""

    status = 2


class Unreadable(Failure):
    """A file that cannot be read, though others may."""


def reason_of(error: Exception) -> str:
    """Return the first line of what a library or the system says."""
    reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(reason).splitlines()[0]


def cannot_be_read(name: str, error: Exception) -> Unreadable:
    """Return what the user is told of a library's error."""
    return Unreadable(f"{name}: cannot be read: {reason_of(error)}")


def did_you_mean(given: str, possible: Iterable[str]) -> str:
    """Return the question for the closest of what is possible, or nothing where none is close.

    Upper case and the dashes of options make nothing closer.
    """
    of_lower = {word.lower().lstrip("-"): word for word in possible}
    close = get_close_matches(given.lower().lstrip("-"), of_lower, n=1)
    return f"; did you mean {of_lower[close[0]]!r}?" if close else ""


def missing(packages: str, extra: str, error: ImportError) -> Failure:
    """Return what the user is told of packages that are not installed: the extra that has them.

    pip finds the extra in the bnfast that is installed, and neither builds nor downloads that anew.
    """
    return Failure(f'needs {packages} ({error}): python -m pip install "bnfast[{extra}]"')
