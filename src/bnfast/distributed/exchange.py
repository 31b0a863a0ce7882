"""One exchange of ranks: do they agree on what they do? Then the numbers of all, else an error."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bnfast.distributed.communicators import Bytes, Communicator

# What ranks must agree on, by name; "call" says what kind of call it is. All calls of a kind have
# the same names, and a name has one type: to a cache, 1, 1.0 and True are the same key.
Term = int | float | str | bool | None

# A message: the length of the terms and a count, the terms as JSON, and float64 values.
_HEADER = np.dtype([("terms", "<i8"), ("count", "<i8")])
_VALUE = np.dtype("<f8")
_FAILED = "failed"


@lru_cache(maxsize=1024)
def _encoded(terms: tuple[tuple[str, Term], ...]) -> bytes:
    text = json.dumps(dict(terms)).encode()
    return text + b" " * (-len(text) % _VALUE.itemsize)  # what follows is aligned


def _message(terms: Mapping[str, Term], count: int, values: bytes) -> bytes:
    encoded = _encoded(tuple(terms.items()))
    return np.array((len(encoded), count), _HEADER).tobytes() + encoded + values


@contextmanager
def failures_told(communicator: Communicator) -> Iterator[None]:
    """Tell the other ranks, in the exchange that they wait for, of an error that comes before."""
    try:
        yield
    except BaseException as error:
        with suppress(Exception):  # the first error is the one to raise
            told = f"{type(error).__name__}: {error}"
            communicator.exchange(_message({_FAILED: told}, 0, b""))
        raise


def exchanged(
    communicator: Communicator, terms: Mapping[str, Term], count: int, values: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the counts and the values of all ranks, (ranks,) and (ranks, *shape of values).

    Raises, on every rank, where one has failed, or where not all have the same `terms`.
    """
    message = _message(terms, count, values.astype(_VALUE, copy=False).tobytes())
    lengths, messages = communicator.exchange(message)
    head, end = _HEADER.itemsize, len(message) - values.nbytes
    own = np.frombuffer(message, np.uint8)
    if (lengths != len(message)).any() or (messages[:, head:end] != own[head:end]).any():
        _raise_for(lengths, messages)
    counts = messages[:, :head].copy().view(_HEADER)["count"][:, 0].astype(np.int64)
    found = messages[:, end : len(message)].copy().view(_VALUE).astype(np.float64, copy=False)
    return counts, found.reshape(len(counts), *values.shape)


def _terms_of(length: int, message: Bytes) -> dict[str, Term]:
    text = message[:length].tobytes()
    size = int(np.frombuffer(text, _HEADER, 1)["terms"][0])
    terms: dict[str, Term] = json.loads(text[_HEADER.itemsize :][:size])
    return terms


def _raise_for(lengths: NDArray[np.int64], messages: Bytes) -> None:
    """Say which ranks have failed, or which terms differ: the same on every rank."""
    terms = [_terms_of(*each) for each in zip(lengths.tolist(), messages, strict=True)]
    failed = {rank: each[_FAILED] for rank, each in enumerate(terms) if _FAILED in each}
    if failed:
        told = "; ".join(f"rank {rank} failed: {error}" for rank, error in failed.items())
        raise RuntimeError(told)
    different = []
    # Different calls have different terms: that the calls differ says enough.
    for name in (name for name in terms[0] if all(name in each for each in terms)):
        ranks: dict[str, list[int]] = {}
        for rank, each in enumerate(terms):
            ranks.setdefault(str(each[name]), []).append(rank)
        if len(ranks) > 1:
            found = ", ".join(f"{value} on {named(which)}" for value, which in ranks.items())
            different.append(f"{name}: {found}")
    hint = ""
    if any(each.startswith(("call:", "layer:")) for each in different):
        hint = (
            " (all ranks must make the same layers in the same order, and have them in the same "
            "mode, frozen or not)"
        )
    raise ValueError(f"the ranks must agree, but differ in {'; '.join(different)}{hint}")


def named(ranks: list[int]) -> str:
    """Ranks in words: of neighbours the first and the last."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    words = [str(first) if first == last else f"{first} to {last}" for first, last in runs]
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(words)}"
