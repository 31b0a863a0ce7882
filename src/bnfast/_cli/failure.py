"""What ends a command, as its user is told."""

from __future__ import annotations


class Failure(Exception):
    """What the user is told, in one line."""


def reason_of(error: Exception) -> str:
    """Return the first line of what a library or the system says."""
    reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(reason).splitlines()[0]


def cannot_be_read(name: str, error: Exception) -> Failure:
    """Return what the user is told of a library's error."""
    return Failure(f"{name}: cannot be read: {reason_of(error)}")
