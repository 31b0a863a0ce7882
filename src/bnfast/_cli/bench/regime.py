"""Under which circumstances calls are timed: what goes on before each of them, and meanwhile."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np

from bnfast import _core
from bnfast._cli.bench.rivals import VIEW, Peer
from bnfast._threads import allowed_threads

# With as much as the last level holds, it kept some of what was in use before: 3 MiB took 0.37 ms
# for the first contender of a round, and 0.26 for the same as the third. With four times as much
# that still happened, now and then.
OTHER_BYTES = min(1 << 30, max(32 << 20, 8 * _core.cache_sizes()[1]))

# A turn of single calls on a busy machine: the system takes a processor away every few
# milliseconds, and who has just slept keeps it for longer.
BUSY_TURN = 20e-3

# It looks from time to time whether there still is someone to end it.
SPIN = """
import os
parent = os.getppid()
print(end=".", flush=True)
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""

Before = Callable[[], object]


@contextmanager
def _nothing_else(threads: int) -> Iterator[None]:
    """Leave the calls to themselves, as in a loop: they are timed many at a time."""
    yield None


@contextmanager
def _other_data(threads: int) -> Iterator[Before]:
    """Yield what reads and writes other data, by as many threads: each core has caches."""
    first, *others = np.array_split(np.ones(OTHER_BYTES // 4, np.float32), threads)

    def touch(part: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> None:
        np.negative(part, out=part)

    with ThreadPoolExecutor(threads) as pool:

        def touch_all() -> None:
            parts = [pool.submit(touch, part) for part in others]
            touch(first)  # on the core of the next call, whoever else is at work
            wait(parts)

        yield touch_all


@contextmanager
def _other_processes(threads: int) -> Iterator[Before]:
    """Let as many other processes as there are processors do nothing but compute."""
    command = [sys.executable, "-I", "-S", "-c", SPIN]
    with ExitStack() as stack:
        processes = []
        for _ in range(allowed_threads()):
            # Ctrl-C reaches them too, and nobody wants their tracebacks.
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            if process.stdout is None or not process.stdout.read(1):
                raise RuntimeError("a process that keeps the machine busy did not start")
        yield lambda: None


@dataclass(frozen=True)
class Regime:
    """How calls are made, and how they are timed."""

    help: str
    outputs: str  # what the report says of them
    note: str = ""  # and of what is unusual
    fresh: bool = False  # a new output at each call
    # For a number of threads: what goes on while calls are timed. It yields what is called before
    # each of them, which is then timed by itself; or None, where many are timed together.
    meanwhile: Callable[[int], AbstractContextManager[Before | None]] = _nothing_else
    turn: float | None = None  # seconds of a turn; None: as `timing.py` has it
    limit: bool = True  # what moves memory alone is measured beside them
    tail: bool = False  # the report shows the 95th percentile, too
    busy: bool = False  # other work goes on by intention
    shapes: Mapping[str, str] = field(default_factory=dict)  # unless asked for others, by norm
    beside: tuple[Peer, ...] = ()  # who is measured, whoever the rivals are

    def about(self) -> dict[str, str]:
        """Return what is unusual, for the JSON."""
        return {"about the regime": self.note} if self.note else {}


GIVEN = "outputs written to given memory"

REGIMES = {
    "out": Regime("write to given memory", GIVEN),
    "fresh": Regime("write to a new output at each call", "new outputs", fresh=True),
    "network": Regime(
        "to given memory, each call after more other data than the caches hold, as between the "
        "convolutions of a network; and bnfast on channels_last views beside plain arrays",
        GIVEN,
        "Regime network: before each call that is timed, and outside its time, "
        f"{OTHER_BYTES >> 20} MiB of other data are read and written, so that the call finds the "
        "caches cold, as between the convolutions of a network; the copies and reads of the limit "
        'do, too. Calls are timed one by one. "bnfast view" is bnfast on (N, C, H, W) views '
        "of the same NHWC memory with axis=1, as PyTorch's channels_last tensors are: no rival, "
        "its time too is a multiple of bnfast's on the plain arrays.",
        meanwhile=_other_data,
        turn=0,
        shapes={"batch": "resnet18"},
        beside=(VIEW,),
    ),
    "busy": Regime(
        "to given memory, while as many other processes as there are processors compute; with "
        "the 95th percentile of single calls",
        GIVEN,
        "Regime busy: this machine was busy by intention. While the contenders took turns, "
        "as many other processes as this one may use processors did nothing but compute. Calls "
        "are timed one by one; ratios are those of medians, but who waits for a call feels the "
        "95th percentile. Compare with no other regime.",
        meanwhile=_other_processes,
        turn=BUSY_TURN,
        limit=False,  # a copy that waits for a thread is none
        tail=True,
        busy=True,
    ),
}
