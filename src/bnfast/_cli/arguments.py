"""The arguments of commands: what they may be, and what is said of others, in one sentence."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from bnfast import _dtypes
from bnfast._cli.failure import Misuse, did_you_mean, missing
from bnfast._cli.outputs import check_output

HALVES = ("float16", "bfloat16")


def not_one_of(given: str, choices: Sequence[str]) -> str:
    """Return what is said of a word that is none of the choices."""
    expected = f"expected one of {', '.join(choices)}"
    return f"{expected}, got {given!r}{did_you_mean(given, choices)}"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage, and guards the files of outputs."""

    def __init__(self, **about: Any) -> None:
        self._outputs: list[argparse.Action] = []
        super().__init__(**about)

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise Misuse(message)

    def add_output(self, *names: str, suffix: str = "", **about: Any) -> None:
        """Add an option that names a file to write, and ``--force`` with the first of them."""
        if not self._outputs:
            self.add_argument(
                "--force", action="store_true", help="write over files that are there already"
            )
        action = self.add_argument(*names, type=partial(_path_of_output, suffix), **about)
        self._outputs.append(action)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Return what the arguments say, or refuse them."""
        self._check_names(arguments)
        options, unexpected = self.parse_known_args(arguments)
        if unexpected:
            self.error(f"unexpected argument {unexpected[0]!r}; see {self.prog} --help")
        self._check_outputs(options)
        return options

    def _check_names(self, arguments: Iterable[str]) -> None:
        """Refuse unknown options before argparse says what else is missing for want of them."""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        for argument in arguments:
            name = argument.partition("=")[0]
            if name == "--":
                break
            if name.startswith("--") and not any(each.startswith(name) for each in known):
                hint = did_you_mean(name, known) or f"; see {self.prog} --help"
                self.error(f"unknown option {name!r}{hint}")

    def _check_outputs(self, options: argparse.Namespace) -> None:
        """Refuse what cannot be written while nothing has been done yet."""
        paths = [getattr(options, action.dest) for action in self._outputs]
        for action, path in zip(self._outputs, paths, strict=True):
            if path is None or path == action.const:
                continue
            if paths.count(path) > 1:
                self.error(f"expected a file for each output, got {path} twice")
            check_output(path, options.force)


def _path_of_output(suffix: str, text: str) -> Path:
    if not text.endswith(suffix):
        raise argparse.ArgumentTypeError(f"expected a name that ends in {suffix}, got {text!r}")
    return Path(text)


def number(
    kind: type[int] | type[float], *, above: float = -math.inf, at_least: float = -math.inf
) -> Callable[[str], int | float]:
    """Return what reads a finite number, within a bound where one is given."""
    expected = "an integer" if kind is int else "a finite number"
    if above != -math.inf:
        expected += f" above {above}"
    elif at_least != -math.inf:
        expected += f" of at least {at_least}"

    def convert(text: str) -> int | float:
        with suppress(ValueError):
            given = kind(text)
            if above < given < math.inf and given >= at_least:
                return given
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return convert


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """Return what reads one of some words."""

    def convert(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(not_one_of(text, choices))
        return text

    return convert


def several_of(choices: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Return what reads some of these words, with commas between them, in any case."""

    def convert(text: str) -> tuple[str, ...]:
        return tuple(map(one_of(choices), text.lower().split(",")))

    return convert


def dtype_of(choices: Sequence[str]) -> Callable[[str], str]:
    """Return what reads the name of a dtype that this installation has."""

    def convert(text: str) -> str:
        name = one_of(choices)(text)
        try:
            _dtypes.named(name)
        except ImportError as error:
            raise missing("ml_dtypes for bfloat16", "half", error) from error
        return name

    return convert
