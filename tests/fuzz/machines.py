"""Ways to run a call that must not change a bit: instruction sets, threads, caches, float modes."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

import bnfast
from bnfast import _core, _threads
from fuzz import draws

# What a control register says where denormals are flushed to zero.
FLUSHING = {"x86_64": 0x9FC0, "AMD64": 0x9FC0, "aarch64": 1 << 24, "arm64": 1 << 24}


class Machine(NamedTuple):
    """An instruction set, a number of threads, sizes of caches, and the caller's float mode."""

    isa: str
    threads: int
    caches: tuple[int, int]
    flushing: bool


def usual() -> Machine:
    """The best instruction set and one thread."""
    return Machine(bnfast.available_isas()[0], 1, _core.cache_sizes(), False)


def draw(rng: np.random.Generator) -> Machine:
    """Another one: small caches send small outputs around them."""
    caches = draws.pick(rng, (_core.cache_sizes(), (1 << 12, 1 << 13), (1 << 10, 1 << 16)))
    isa = draws.pick(rng, bnfast.available_isas())
    flushing = draws.chance(rng, 0.2) and platform.machine() in FLUSHING
    return Machine(isa, draws.pick(rng, (1, 2, 2, 3)), caches, flushing)


@contextlib.contextmanager
def running_on(machine: Machine) -> Iterator[None]:
    """Calls of any size use all of its threads."""
    before = _core.active_isa(), _core.cache_sizes(), _core.float_mode()
    of_threads = ("allowed_threads", "SERIAL_BYTES", "BYTES_PER_THREAD")
    kept = {name: getattr(_threads, name) for name in of_threads}
    was_late = _core.team_was_late
    _core.activate(machine.isa)
    _core.assume_cache_sizes(*machine.caches)
    if machine.threads > 1:
        _threads.allowed_threads = lambda: machine.threads
        _threads.SERIAL_BYTES, _threads.BYTES_PER_THREAD = 0, 1
        _core.team_was_late = lambda: False
    bnfast.set_num_threads(machine.threads)
    if machine.flushing:
        _core.assume_float_mode(FLUSHING[platform.machine()])
    try:
        yield
    finally:
        if machine.flushing:
            _core.assume_float_mode(before[2])
        _core.activate(before[0])
        _core.assume_cache_sizes(*before[1])
        bnfast.set_num_threads(None)
        for name, value in kept.items():
            setattr(_threads, name, value)
        _core.team_was_late = was_late
