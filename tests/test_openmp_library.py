"""One OpenMP library in a process with PyTorch; settings of libraries beside it are obeyed, too."""

import subprocess
import sys
from pathlib import Path

import pytest

import bnfast
from bnfast import _core

pytestmark = [
    pytest.mark.skipif(not _core.HAS_OPENMP, reason="built without OpenMP"),
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each wheel has its own library"),
]

# Imports in both orders, and the processors that there may be not.
BEGIN = """
import {first}, {then}
import bnfast, threadpoolctl
from bnfast import _core, _threads
_threads.allowed_threads = lambda: 64
"""

WITH_TORCH = """
import torch
for wanted in (1, 3, 2):
    torch.set_num_threads(wanted)
    assert bnfast.get_num_threads() == wanted, (wanted, bnfast.get_num_threads())
pools = threadpoolctl.threadpool_info()
loaded = [pool["filepath"] for pool in pools if pool["prefix"] == "libgomp"]
assert len(loaded) == 1, loaded
"""

WITH_SKLEARN = """
for wanted in (1, 3):
    with threadpoolctl.threadpool_limits(wanted, user_api="openmp"):
        assert bnfast.get_num_threads() == wanted, (wanted, bnfast.get_num_threads())
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def both_orders(other):
    return [("bnfast", other), (other, "bnfast")]


@pytest.mark.skipif(
    not _core.build_facts()["compiler"].startswith("GCC"), reason="PyTorch's library is GCC's"
)
@pytest.mark.parametrize(("first", "then"), both_orders("torch"))
def test_torchs_setting_is_obeyed_whatever_is_imported_first(first, then, monkeypatch):
    for package in ("torch", "threadpoolctl"):
        pytest.importorskip(package)
    monkeypatch.delenv("BNFAST_NUM_THREADS", raising=False)
    run(BEGIN.format(first=first, then=then) + WITH_TORCH)


@pytest.mark.parametrize(("first", "then"), both_orders("sklearn.cluster"))
def test_threadpoolctl_reaches_bnfast_beside_scikit_learn(first, then, monkeypatch):
    for package in ("sklearn", "threadpoolctl"):
        pytest.importorskip(package)
    monkeypatch.delenv("BNFAST_NUM_THREADS", raising=False)
    run(BEGIN.format(first=first, then=then) + WITH_SKLEARN)


OF_WHEEL = Path(bnfast.__file__).with_name("_libs")


@pytest.mark.skipif(not OF_WHEEL.is_dir(), reason="not of a wheel that brings its own library")
def test_the_library_of_the_wheel_is_used_where_no_other_is_loaded():
    library = run("import bnfast._core as c; print(c.build_facts()['openmp_library'])").strip()
    assert Path(library).resolve() == OF_WHEEL.resolve() / "libgomp.so.1"
