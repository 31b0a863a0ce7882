"""How many threads for this much work, and the fork guard."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from bnfast import _core, _validation

# The smallest call for which a team wakes, and the smallest share of each thread: see thresholds.h.
SERIAL_BYTES: int = _core.SERIAL_BYTES
BYTES_PER_THREAD: int = _core.BYTES_PER_THREAD

_wanted: int | None = None
_of_the_environment: int | None = None  # BNFAST_NUM_THREADS, as it was at import
_of_this_caller = threading.local()  # `serial`, where calls of this Python thread have one thread


def _started_by_fork_alone() -> bool:
    """Whether this process was forked and has not executed a program since, as Linux tells it."""
    try:
        stat = Path("/proc/self/stat").read_bytes()  # the name in it may be any bytes
    except OSError:
        return False
    flags = int(stat.rpartition(b")")[2].split()[6])
    return bool(flags & 0x40)  # PF_FORKNOEXEC


# An OpenMP runtime's threads do not survive a fork, and its next parallel region would wait for
# them. The parent may have used one, ours or another library's: a process that was a forked child
# when it imported bnfast is serial, and so is one that was forked since, by Python or not. The
# number of the process would not tell: a child may have its parent's, in a namespace of its own.
_forked_before_import = _started_by_fork_alone()


def in_forked_child() -> bool:
    """Return whether this process must enter no OpenMP region."""
    return _forked_before_import or _core.is_forked_child()


def allowed_threads() -> int:
    """Return how many processors the calling thread may run on, which may change at any time."""
    return _core.allowed_processors() or os.cpu_count() or 1


def set_num_threads(num_threads: int | None) -> None:
    """Set how many threads one call may use.

    Results do not depend on it. Without it, ``BNFAST_NUM_THREADS`` counts, and without that the
    setting of OpenMP, read on every call (``OMP_NUM_THREADS``, ``threadpoolctl``). No setting goes
    beyond the processors that the process may run on, and a forked child always runs serially.

    Parameters
    ----------
    num_threads : int or None
        At least 1; None goes back to what counts without it.

    Raises
    ------
    TypeError, ValueError
        If it is not a positive integer.

    Examples
    --------
    >>> import bnfast
    >>> bnfast.set_num_threads(1)
    >>> bnfast.get_num_threads()
    1
    >>> bnfast.set_num_threads(None)
    """
    global _wanted
    if num_threads is None:
        _wanted = None
        return
    _wanted = _validation.integer_from("num_threads", num_threads, 1)


def obey_environment(num_threads: int) -> None:
    """Set how many threads count where `set_num_threads` has not set any."""
    global _of_the_environment
    _of_the_environment = num_threads


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let the calls of this Python thread run on one thread, and leave those of others alone."""
    before = _is_serial_caller()
    _of_this_caller.serial = True
    try:
        yield
    finally:
        _of_this_caller.serial = before


def _is_serial_caller() -> bool:
    return getattr(_of_this_caller, "serial", False)


def get_num_threads() -> int:
    """Return how many threads a call uses at most.

    Returns
    -------
    int
        1 in a forked child and in a build without OpenMP.

    Examples
    --------
    >>> import bnfast
    >>> bnfast.get_num_threads() >= 1
    True
    """
    if in_forked_child() or not _core.HAS_OPENMP or _is_serial_caller():
        return 1
    wanted = _of_the_environment if _wanted is None else _wanted
    if wanted is None:
        wanted = _core.openmp_max_threads()
    return 1 if wanted == 1 else min(wanted, allowed_threads())  # to ask is a system call


def chosen_by() -> str:
    """Return what decides the number of threads."""
    if in_forked_child():
        return "the fork: children are serial"
    if not _core.HAS_OPENMP:
        return "the build: no OpenMP"
    if _is_serial_caller():
        return "the scheduler, which runs other calls at once"
    if _wanted is not None:
        return "set_num_threads"
    return "OpenMP" if _of_the_environment is None else "BNFAST_NUM_THREADS"


def threads_for(work_bytes: int) -> int:
    """Return how many threads do a call that reads and writes so many bytes.

    All of them, or one: for little work, in a forked child, after a team that was late. Fewer where
    the system lets no more start.
    """
    if work_bytes < SERIAL_BYTES:
        return 1
    team = get_num_threads()
    if team == 1 or work_bytes < team * BYTES_PER_THREAD or _core.team_was_late():
        return 1
    return _core.startable_threads(team)
