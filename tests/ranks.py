"""Ranks that are threads of one process, for what holds of any communicator."""

import threading

import numpy as np

from bnfast.distributed import Communicator


class _Meeting:
    def __init__(self, size, timeout):
        self.blocks = [None] * size
        self.barrier = threading.Barrier(size, timeout=timeout)


class InThread(Communicator):
    """A rank; `exchanges` counts those it has taken part in, and `before` comes before each."""

    def __init__(self, rank, meeting, before=lambda: None):
        self._rank, self._meeting, self._before = rank, meeting, before
        self.exchanges = 0

    @property
    def rank(self):
        return self._rank

    @property
    def size(self):
        return len(self._meeting.blocks)

    def allgather(self, block):
        self._before()
        self.exchanges += 1
        meeting = self._meeting
        try:
            meeting.blocks[self._rank] = block
            meeting.barrier.wait()
            blocks = np.stack(meeting.blocks)
            meeting.barrier.wait()
        except threading.BrokenBarrierError:
            raise TimeoutError("a rank did not answer") from None
        return blocks


def on_ranks(size, function, timeout=20.0, before=lambda: None):
    """What ``function(communicator)`` returns or raises on each of so many ranks."""
    meeting, results = _Meeting(size, timeout), [None] * size

    def work(rank):
        try:
            results[rank] = function(InThread(rank, meeting, before))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def without_errors(results):
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results
