"""Fixtures that every test may ask for: instruction set, threads, dtype, layout, random numbers."""

import os
import zlib

import numpy as np
import pytest

import bnfast
from bnfast import _core, _threads

# Before anything imports Keras, which reads it once; programs that tests start inherit it.
os.environ["KERAS_BACKEND"] = "numpy"


def pytest_addoption(parser):
    parser.addoption(
        "--each", type=int, metavar="N", help="of the cases of each test N, spread over all of them"
    )


@pytest.hookimpl(trylast=True)  # of those that -k and -m have left
def pytest_collection_modifyitems(config, items):
    most = config.getoption("--each")
    if most is None:
        return
    cases = {}
    for item in items:
        cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    chosen = {
        item
        for of_test in cases.values()
        for item in of_test[:: -(-len(of_test) // most)]  # rounded up
    }
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


# BNFAST_ISA narrows the run to one instruction set; without it every one that runs here is tested.
FORCED = os.environ.get("BNFAST_ISA", "").lower()


@pytest.fixture(params=[FORCED] if FORCED else bnfast.available_isas())
def isa(request):
    """Run the test with every instruction set of this machine."""
    before = _core.active_isa()
    _core.activate(request.param)
    yield request.param
    _core.activate(before)


@pytest.fixture
def use_isa():
    """Switch the instruction set inside a test."""
    before = _core.active_isa()
    yield _core.activate
    _core.activate(before)


@pytest.fixture
def use_threads(monkeypatch):
    """Run with exactly so many threads, whatever the processors and the work."""

    def use(num_threads):
        monkeypatch.setattr(_threads, "allowed_threads", lambda: 64)
        monkeypatch.setattr(_threads, "SERIAL_BYTES", 0)
        monkeypatch.setattr(_threads, "BYTES_PER_THREAD", 1)
        monkeypatch.setattr(_core, "team_was_late", lambda: False)
        bnfast.set_num_threads(num_threads)

    yield use
    bnfast.set_num_threads(None)


@pytest.fixture
def use_caches():
    """Schedule as if the second and the last level of cache had these sizes."""
    before = _core.cache_sizes()
    yield _core.assume_cache_sizes
    _core.assume_cache_sizes(*before)


@pytest.fixture(params=[np.float32, np.float64], ids=["f32", "f64"])
def dtype(request):
    return np.dtype(request.param)


@pytest.fixture(params=[1, -1], ids=["nchw", "nhwc"])
def axis(request):
    """The channel axis of a test that makes its input C-contiguous."""
    return request.param


@pytest.fixture
def rng(request):
    """Random numbers of the test's own, the same in every run."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))
