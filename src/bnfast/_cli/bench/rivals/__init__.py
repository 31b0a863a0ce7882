"""Who bnfast is compared with: one file for each, which imports its package when it is imported."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np

from bnfast import _dtypes
from bnfast._cli.bench.cell import Cell, mean_and_std
from bnfast._cli.failure import Failure
from bnfast._typing import Array


class NotOffered(Exception):
    """The rival has no such normalization, operation, layout or dtype; the message says which."""


def first(results: Any) -> Any:
    """Return y or dx of what a call returned: that, or that and more."""
    return results[0] if isinstance(results, tuple) else results


def read_moments(results: Any) -> Array:
    """Return the mean and the standard deviation, of the mean and the variance that a call made."""
    return mean_and_std(*results)


@dataclass(frozen=True)
class Contender:
    """A cell, prepared: all that is timed is `call`."""

    call: Callable[[], Any]  # returns its result, in whatever form it has
    read: Callable[[Any], Array] = np.asarray  # that result in the layout of the cell, not timed
    fresh: bool = False  # it makes a new output at each call, although it was asked to write to one
    copies: bool = False  # its inputs are copies of its own
    itself: bool = False  # bnfast once more, and so no rival
    own_output: bool | None = None  # its output is memory of its own; None: if it is new
    note: str = ""

    def own_buffers(self, fresh: bool) -> list[str]:
        """Return what begins where it likes, whatever the offset, in the regime of new outputs."""
        own_output = fresh or self.fresh if self.own_output is None else self.own_output
        return ["inputs"] * self.copies + ["outputs"] * own_output


class Rival(ABC):
    """One opponent, at its best setting for a number of threads that is fixed for the run."""

    takes_halves = True  # data of 16 bits, with parameters of float32

    def __init__(self, threads: int) -> None:
        self.threads = threads

    @property
    @abstractmethod
    def version(self) -> str:
        """What is measured."""

    @abstractmethod
    def prepare(self, cell: Cell[Any], fresh: bool) -> Contender:
        """Return the cell with its inputs where this rival likes them best, or raise NotOffered.

        With `fresh` every call makes its output anew; without, it writes to memory that is there,
        to ``cell.data.out`` where the layout is the same. Memory that is made for the rival comes
        from ``cell.data.empty``.
        """


def enter(rival: Rival, cell: Cell[Any], fresh: bool) -> Contender:
    """Return what a rival prepares; raise NotOffered for data of 16 bits that it does not take."""
    if _dtypes.is_half(cell.data.dtype) and not rival.takes_halves:
        raise NotOffered(f"no {cell.data.dtype} is driven here")
    return rival.prepare(cell, fresh)


class Peer(NamedTuple):
    """Where a rival is to be found."""

    title: str
    module: str
    rival: str  # the class
    distributions: tuple[str, ...]  # on PyPI
    only: tuple[str, ...] = ()  # the normalizations that it is there for

    def is_for(self, normalizations: Iterable[str]) -> bool:
        """Return whether it is there for one of them."""
        return not self.only or not set(self.only).isdisjoint(normalizations)

    def missing(self) -> list[str]:
        """Return what is not installed."""
        return [name for name in self.distributions if not _installed(name)]

    def load(self, threads: int) -> Rival:
        """Import it and make it ready; whatever that raises is for the caller to report."""
        module = importlib.import_module(f"{__name__}.{self.module}")
        rival: Rival = getattr(module, self.rival)(threads)
        return rival


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


# What others do in two or three operations.
ACTIVATED = ("batch-relu", "batch-add-relu")

PEERS = {
    "numpy": Peer("NumPy", "numpy_formulas", "NumPyFormulas", ("numpy",)),
    "pytorch": Peer("PyTorch", "pytorch", "PyTorch", ("torch",)),
    "pytorch-compiled": Peer(
        "PyTorch compiled", "pytorch_compiled", "PyTorchCompiled", ("torch",), only=ACTIVATED
    ),
    "unfused": Peer("bnfast unfused", "bnfast_unfused", "Unfused", ("bnfast",), only=ACTIVATED),
    "onednn": Peer("oneDNN", "onednn", "OneDnn", ("onednn-cpu-gomp",)),
    "onednn-blocked": Peer("oneDNN blocked", "onednn", "OneDnnBlocked", ("onednn-cpu-gomp",)),
    "onnxruntime": Peer("ONNX Runtime", "onnx_runtime", "OnnxRuntime", ("onnxruntime", "onnx")),
    "jax": Peer("JAX", "jax_xla", "JaxXla", ("jax", "jaxlib")),
    "numba": Peer("Numba", "numba_kernels", "NumbaKernels", ("numba",)),
    "numpy-float64": Peer(
        "NumPy float64", "numpy_formulas", "NumPyInFloat64", ("numpy",), only=("moments",)
    ),
    "onedal": Peer("oneDAL", "onedal", "OneDal", ("scikit-learn-intelex",), only=("moments",)),
    "polars": Peer("polars", "polars_frames", "PolarsFrames", ("polars",), only=("moments",)),
}


# No rival, but measured as one.
VIEW = Peer("bnfast view", "bnfast_view", "ChannelsLastView", ("bnfast",))


class NotInstalled(Failure):
    """A rival that was asked for by name is missing; the message says how to get it."""


def missing(normalizations: Iterable[str]) -> list[Peer]:
    """Return the rivals of these normalizations that are not installed."""
    return [peer for peer in PEERS.values() if peer.missing() and peer.is_for(normalizations)]


def choose(names: tuple[str, ...] | None, normalizations: Iterable[str]) -> dict[str, Peer]:
    """Return the rivals of these names, or all that are installed and for these normalizations."""
    if names is None:
        return {
            name: peer
            for name, peer in PEERS.items()
            if not peer.missing() and peer.is_for(normalizations)
        }
    chosen = {name: PEERS[name] for name in names}
    absent = {name: peer.missing() for name, peer in chosen.items() if peer.missing()}
    if absent:
        packages = list(dict.fromkeys(package for group in absent.values() for package in group))
        raise NotInstalled(
            f"not installed: {', '.join(absent)}: all rivals come with the extra bench, "
            f"{'this one' if len(absent) == 1 else 'these'} with: "
            f"python -m pip install {' '.join(packages)}"
        )
    return chosen
