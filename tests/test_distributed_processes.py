"""Synchronized batch norm of real processes: MPI's, and those of torch.distributed with gloo."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("distributed_program.py")
PATIENCE = 120.0  # seconds for a program, most of which it takes to start on a busy machine

# A rank has one core at most, and looks for its arguments nowhere else.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def outcome(programs):
    """The status of each, the output of all, or a failure of the test where one hangs."""
    output, hung = "", False
    for program in programs:
        try:
            output += program.communicate(timeout=PATIENCE)[0]
        except subprocess.TimeoutExpired:
            hung = True
            break
    for program in programs:
        if program.poll() is None:
            os.killpg(program.pid, signal.SIGKILL)
            output += program.communicate()[0]
    if hung:
        pytest.fail(f"no end within {PATIENCE} s: {output}")
    return {program.returncode for program in programs}, output


def started(*command, **more):
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**ENVIRONMENT, **more},
        start_new_session=True,  # a group, with what it starts
    )


def mpi(size, *scenarios):
    pytest.importorskip("mpi4py")
    mpiexec = shutil.which("mpiexec", path=Path(sys.executable).parent) or shutil.which("mpiexec")
    if mpiexec is None:
        pytest.skip("no mpiexec: pip install mpich")
    return outcome([started(mpiexec, "-n", str(size), sys.executable, PROGRAM, "mpi", *scenarios)])


def gloo(size, *scenarios):
    if find_spec("torch") is None:
        pytest.skip("no torch")
    with tempfile.TemporaryDirectory() as folder:
        meeting = {"WORLD_SIZE": str(size), "MEETING": os.path.join(folder, "meeting")}
        return outcome(
            [
                started(sys.executable, PROGRAM, "gloo", *scenarios, RANK=str(rank), **meeting)
                for rank in range(size)
            ]
        )


TRANSPORTS = pytest.mark.parametrize("transport", [mpi, gloo], ids=lambda f: f.__name__)
AGREE = ("steps", "differ", "fail")
OF_MODULES = ("module", "module_refuses")


@functools.cache
def of_all(transport, size, scenarios):
    """What came of scenarios without a victim, one after the other: ranks take long to start."""
    return transport(size, *scenarios)


@TRANSPORTS
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("scenario", AGREE)
def test_processes_agree(transport, scenario, size):
    status, output = of_all(transport, size, AGREE)
    assert status == {0}, output
    assert output.count(f"done {scenario}, ") == size


@TRANSPORTS
def test_a_rank_that_is_killed_ends_the_job(transport):
    status, output = transport(2, "die")
    assert 0 not in status, output
    assert "done" not in output
    if transport is gloo:
        assert "ConnectionError: rank 0 of 2 had no exchange with the other ranks" in output


@TRANSPORTS
def test_a_rank_that_leaves_by_an_error_ends_the_job(transport):
    status, output = transport(2, "leave")
    assert 0 not in status, output
    assert "KeyError" in output
    assert "done" not in output


@TRANSPORTS
def test_a_rank_that_exchanges_nothing_is_not_waited_for_for_ever(transport):
    status, output = transport(2, "evaluate")
    assert status != {0}, output
    error = "TimeoutError: the other ranks" if transport is mpi else "ConnectionError: rank 0"
    assert error in output


@pytest.mark.parametrize("scenario", OF_MODULES)
def test_pytorchs_module_trains_and_fails_as_one_process_would(scenario):
    status, output = of_all(gloo, 2, OF_MODULES)
    assert status == {0}, output
    assert output.count(f"done {scenario}, ") == 2
