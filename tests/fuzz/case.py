"""What came of one case, and the memory that calls must leave alone."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fuzz.buffers import Buffer


class Outcome:
    """Of one case: what was called, and what is wrong."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.refused = 0
        self.complaints: list[str] = []
        self.description = ""

    def called(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1

    def complain(self, what: str | None) -> None:
        if what is not None:
            self.complaints.append(what)


class Witness(NamedTuple):
    """Memory as it was before a call."""

    name: str
    buffer: Buffer
    before: bytes


def witnesses(buffers: dict[str, Buffer]) -> list[Witness]:
    return [Witness(name, buffer, buffer.snapshot()) for name, buffer in buffers.items()]


def complain_of_changes(outcome: Outcome, seen: list[Witness], when: str) -> None:
    """Whatever was passed has the bits that it had."""
    for name, buffer, before in seen:
        if buffer.snapshot() != before:
            outcome.complain(f"{name} was changed {when}")


def complain_of_error(outcome: Outcome, error: BaseException, names: tuple[str, ...]) -> None:
    """One clear error, that names the argument it is about; none to name where there are none."""
    outcome.refused += 1
    if not isinstance(error, (TypeError, ValueError)):
        outcome.complain(f"raised {type(error).__name__}: {error}")
    elif names and not any(re.search(rf"\b{name}\b", str(error)) for name in names):
        outcome.complain(f"the message names none of {names}: {error}")


@functools.cache
def parameters_of(function: Any) -> Mapping[str, inspect.Parameter]:
    """Of a function or a class."""
    return inspect.signature(function).parameters


def text_of(value: Any) -> str:
    """An argument in a message."""
    if isinstance(value, np.ndarray):
        return f"<{value.dtype} {value.shape}>"
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
