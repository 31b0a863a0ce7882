"""Fixtures that every test may ask for: instruction set, threads, dtype, layout, random numbers."""

import contextlib
import os
import zlib
from collections import Counter

import numpy as np
import pytest

import bnfast
from bnfast import _core, _threads

# Before anything imports Keras, which reads it once; programs that tests start inherit it.
os.environ["KERAS_BACKEND"] = "numpy"

# Idle threads of OpenBLAS spin, also on processors that other programs need: what trained a network
# beside one took twenty times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def pytest_configure(config):
    with contextlib.suppress(ImportError):  # NumPy has been imported, by a plugin perhaps
        from threadpoolctl import threadpool_limits

        threadpool_limits(1, user_api="blas")


def pytest_addoption(parser):
    parser.addoption(
        "--each", type=int, metavar="N", help="of the cases of each test N, spread over all of them"
    )
    parser.addoption(
        "--every-isa",
        action="store_true",
        help="each case with every instruction set, not with one",
    )


@pytest.hookimpl(trylast=True)  # of those that -k and -m have left
def pytest_collection_modifyitems(config, items):
    chosen = items
    if not config.getoption("--every-isa"):
        chosen = one_isa_of_each(chosen)
    most = config.getoption("--each")
    if most is not None:
        tests = groups(chosen, lambda item: item.nodeid.split("[")[0])
        chosen = [
            item for cases in tests for item in cases[:: -(-len(cases) // most)]
        ]  # rounded up
    chosen = set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


def groups(items, key):
    found = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found.values()


def one_isa_of_each(items):
    """Return every case with one instruction set: by lot, and the same in every run.

    That all make the same bits is tested with all.
    """

    def case(item):
        definitions = item._fixtureinfo.name2fixturedefs.get("isa", ())
        if any(each.func is ISA_FUNCTION for each in definitions):
            others = [part for part in item.callspec.id.split("-") if part != isa_of(item)]
            return item.nodeid.split("[")[0], *others
        return item.nodeid

    def isa_of(item):
        return item.callspec.params["isa"]

    found = groups(items, case)
    return [cases[zlib.crc32(repr(case(cases[0])).encode()) % len(cases)] for cases in found]


# BNFAST_ISA narrows the run to one instruction set; without it every one that runs here is tested.
FORCED = os.environ.get("BNFAST_ISA", "").lower()


def isa(request):
    """Run the test with an instruction set of this machine: see ``one_isa_of_each``."""
    before = _core.active_isa()
    _core.activate(request.param)
    yield request.param
    _core.activate(before)


ISA_FUNCTION = isa
isa = pytest.fixture(params=[FORCED] if FORCED else bnfast.available_isas())(isa)


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


@pytest.fixture
def assert_same_bits_everywhere(use_isa, use_threads, use_caches):
    """Compute arrays with every instruction set, with numbers of threads and sizes of caches."""

    def check(compute):
        use_isa("baseline")
        use_threads(1)
        expected = compute()
        for isa in bnfast.available_isas():
            use_isa(isa)
            for threads, caches in ((1, (0, 0)), (2, (1 << 50, 1 << 50)), (3, (1 << 14, 1 << 16))):
                use_threads(threads)
                use_caches(*caches)
                for a, b in zip(compute(), expected, strict=True):
                    np.testing.assert_array_equal(a, b)

    return check


@pytest.fixture
def count_calls(monkeypatch):
    """Count from now on the calls of functions of bnfast, by name."""

    def count(names):
        counts = Counter()

        def counted(name, function):
            def call(*arguments, **keywords):
                counts[name] += 1
                return function(*arguments, **keywords)

            return call

        for name in names:
            monkeypatch.setattr(bnfast, name, counted(name, getattr(bnfast, name)))
        return counts

    return count


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
