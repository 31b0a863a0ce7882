"""Through what ranks exchange messages: MPI, torch.distributed, or what a user writes."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bnfast import _validation
from bnfast._scalars import describe

Bytes = NDArray[np.uint8]
AnyCommunicator = TypeVar("AnyCommunicator", bound="Communicator")

_LENGTH = np.dtype("<i8")  # of a message: what a block begins with
_FIRST_BYTES = 2048  # of the first message: 64 channels and what ranks must agree on

# Waiting for MPI: spinning is quickest, but takes the core from a rank that shares it.
_SPIN_SECONDS, _NAP_SECONDS = 200e-6, 50e-6


class Communicator(ABC):
    """The ranks of a computation, and how they exchange bytes.

    For another transport than MPI and torch.distributed, write a subclass with `rank`, `size` and
    `allgather`.

    Attributes
    ----------
    rank : int
        Which of them this process is, counted from 0.
    size : int
        How many they are.

    Notes
    -----
    All ranks must use a communicator for the same calls in the same order, and from one thread at a
    time. After an exchange that failed it is of no use any more, and says so.

    Copies of a layer share its communicator.

    Examples
    --------
    One rank alone:

    >>> import numpy as np, bnfast.distributed
    >>> class Alone(bnfast.distributed.Communicator):
    ...     rank, size = 0, 1
    ...
    ...     def allgather(self, block):
    ...         return block[np.newaxis]
    >>> x = np.random.default_rng(0).normal(size=(8, 3))
    >>> y, saved = bnfast.distributed.sync_batch_norm_forward(x, Alone())
    >>> np.array_equal(y, bnfast.batch_norm_forward(x)[0])
    True
    """

    # What the next block has room for follows from what all ranks have seen: see `exchange`.
    _seen: tuple[int, int] = (0, 0)
    _longest_after: dict[tuple[int, int], int]
    _failed: BaseException | None = None
    _layers = 0

    def __new__(cls: type[AnyCommunicator], *_: Any, **__: Any) -> AnyCommunicator:
        """Make one whose subclass need not call ours."""
        communicator = super().__new__(cls)
        communicator._longest_after = {}
        return communicator

    @property
    @abstractmethod
    def rank(self) -> int:
        """Which rank this is, counted from 0."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many ranks there are."""

    @abstractmethod
    def allgather(self, block: Bytes) -> Bytes:
        """Send a block to all ranks, and return those of all.

        Parameters
        ----------
        block : array (n,) of uint8
            Of the same n on every rank.

        Returns
        -------
        array (size, n) of uint8
            In the order of the ranks.

        Raises
        ------
        OSError
            Such as ConnectionError and TimeoutError: where another rank does not answer. An
            `allgather` must not wait for ever.
        """

    def exchange(self, message: bytes) -> tuple[NDArray[np.int64], Bytes]:
        """Send a message to all ranks, and return those of all.

        Messages may have different lengths: that is how ranks that do not agree find out. One
        `allgather` will do where the longest was foreseen from those before, as it is after the
        first steps of a training; else the rest takes another.

        Parameters
        ----------
        message : bytes

        Returns
        -------
        lengths : array (size,) of int64
        messages : array (size, at least the longest) of uint8
            Those that are shorter are followed by zeros.

        Raises
        ------
        RuntimeError
            If an earlier exchange failed.
        OSError
            As `allgather`.
        """
        if self._failed is not None:
            raise RuntimeError(
                f"an earlier exchange of this communicator failed: "
                f"{type(self._failed).__name__}: {self._failed}"
            ) from self._failed
        # On every rank the same, because the lengths of the past are.
        foreseen = self._longest_after.get(self._seen, _FIRST_BYTES)
        block = np.zeros(_LENGTH.itemsize + foreseen, np.uint8)
        block[: _LENGTH.itemsize].view(_LENGTH)[0] = len(message)
        _put(block[_LENGTH.itemsize :], message[:foreseen])
        blocks = self._gathered(block)
        lengths = blocks[:, : _LENGTH.itemsize].copy().view(_LENGTH)[:, 0].astype(np.int64)
        messages, longest = blocks[:, _LENGTH.itemsize :], int(lengths.max())
        if longest > foreseen:
            rest = np.zeros(longest - foreseen, np.uint8)
            _put(rest, message[foreseen:])
            messages = np.concatenate((messages, self._gathered(rest)), axis=1)
        self._longest_after[self._seen] = max(foreseen, longest)
        self._seen = self._seen[1], longest
        return lengths, messages

    def _gathered(self, block: Bytes) -> Bytes:
        try:
            blocks = self.allgather(block)
            shape = self.size, block.size
            is_array = isinstance(blocks, np.ndarray)
            if not is_array or blocks.dtype != np.uint8 or blocks.shape != shape:
                raise TypeError(
                    f"allgather of {type(self).__name__} must return an array of uint8 of shape "
                    f"{shape}, got {describe(blocks)}"
                )
        except BaseException as error:
            self._failed = error
            raise
        return blocks

    def _number_of_layer(self) -> int:
        """Return the number of a new layer: on all ranks the same, where all make the same ones."""
        self._layers += 1
        return self._layers - 1

    def __copy__(self: AnyCommunicator) -> AnyCommunicator:
        return self

    def __deepcopy__(self: AnyCommunicator, memo: object) -> AnyCommunicator:
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank}, size={self.size})"


def _put(block: Bytes, message: bytes) -> None:
    block[: len(message)] = np.frombuffer(message, np.uint8)


class MPICommunicator(Communicator):
    """The processes of an MPI communicator: those that ``mpiexec`` has started, for one.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm, optional
        ``MPI.COMM_WORLD`` where None. Where other threads use it, too, give a ``comm.Dup()``.
    timeout : float
        How many seconds to wait for the other ranks in one exchange.

    Raises
    ------
    ImportError
        Without mpi4py or an MPI library: ``python -m pip install mpi4py mpich``.
    TypeError, ValueError
        For an argument of the wrong type or value.

    Notes
    -----
    Where a rank does not answer in time, the others raise TimeoutError. A process that dies ends
    the job: ``mpiexec`` ends the others, and returns another status than 0. One that leaves by an
    exception waits in MPI's own end for the others, which `timeout` then ends.

    Examples
    --------
    In a program for ``mpiexec -n 4 python program.py``::

        from mpi4py import MPI
        from bnfast.distributed import MPICommunicator, SyncBatchNorm

        layer = SyncBatchNorm(64, MPICommunicator(MPI.COMM_WORLD))
    """

    def __init__(self, comm: Any = None, *, timeout: float = 300.0) -> None:
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise ImportError(
                f"MPICommunicator needs mpi4py and an MPI library: python -m pip install mpi4py "
                f"mpich ({error})"
            ) from error
        if comm is None:
            comm = MPI.COMM_WORLD
        if not isinstance(comm, MPI.Intracomm):
            raise TypeError(f"comm must be an mpi4py.MPI.Intracomm, got {describe(comm)}")
        self._comm, self._error = comm, MPI.Exception
        self._timeout = _validation.positive("timeout", timeout)
        self._rank, self._size = comm.Get_rank(), comm.Get_size()

    @property
    def rank(self) -> int:
        """Which rank this is, counted from 0."""
        return self._rank

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self._size

    def allgather(self, block: Bytes) -> Bytes:
        """Send a block to all ranks, and return those of all: see `Communicator.allgather`."""
        blocks = np.empty((self._size, block.size), np.uint8)
        try:
            request = self._comm.Iallgather(block, blocks)
            self._pending = request, block, blocks  # MPI writes to them as long as it is not done
            self._wait(request)
        except self._error as error:
            raise ConnectionError(f"no exchange with the other ranks: {error}") from error
        del self._pending
        return blocks

    def _wait(self, request: Any) -> None:
        began = time.monotonic()
        while not request.Test():
            waited = time.monotonic() - began
            if waited > self._timeout:
                raise TimeoutError(
                    f"the other ranks did not all answer rank {self._rank} of {self._size} within "
                    f"{self._timeout:g} s: has one ended, or is a layer of one in evaluation?"
                )
            if waited > _SPIN_SECONDS:
                time.sleep(_NAP_SECONDS)


class TorchCommunicator(Communicator):
    """The processes of a torch.distributed group whose tensors may be on the CPU: gloo's.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        The default group where None. Its ``timeout``, which ``init_process_group`` and
        ``new_group`` take, is how long an exchange may last.

    Raises
    ------
    ImportError
        Without PyTorch.
    RuntimeError
        Before ``torch.distributed.init_process_group``.
    ValueError
        If this process is not in the group.

    Notes
    -----
    Where a rank ends or does not answer in time, the others raise ConnectionError.

    Examples
    --------
    In a program for ``torchrun --nproc-per-node 2 program.py``::

        import torch.distributed
        from bnfast.distributed import SyncBatchNorm, TorchCommunicator

        torch.distributed.init_process_group("gloo")
        layer = SyncBatchNorm(64, TorchCommunicator())
    """

    def __init__(self, group: Any = None) -> None:
        try:
            import torch
            from torch import distributed
        except ImportError as error:
            raise ImportError(
                f"TorchCommunicator needs PyTorch: python -m pip install torch ({error})"
            ) from error
        if not (distributed.is_available() and distributed.is_initialized()):
            raise RuntimeError(
                "TorchCommunicator needs torch.distributed.init_process_group before it"
            )
        self._torch, self._distributed, self._group = torch, distributed, group
        self._rank: int = distributed.get_rank(group)
        self._size: int = distributed.get_world_size(group)
        if self._rank < 0:
            raise ValueError("group must be one that this process is in")

    @property
    def rank(self) -> int:
        """Which rank this is, counted from 0."""
        return self._rank

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self._size

    def allgather(self, block: Bytes) -> Bytes:
        """Send a block to all ranks, and return those of all: see `Communicator.allgather`."""
        blocks = np.empty((self._size, block.size), np.uint8)
        tensors = [self._torch.from_numpy(each) for each in blocks]
        try:
            self._distributed.all_gather(tensors, self._torch.from_numpy(block), group=self._group)
        except RuntimeError as error:
            raise ConnectionError(
                f"rank {self._rank} of {self._size} had no exchange with the other ranks: {error}"
            ) from error
        return blocks
