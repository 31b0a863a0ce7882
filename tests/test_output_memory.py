"""Outputs begin at cache lines; the memory of large ones goes to the next, within a limit."""

import gc
import mmap
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest

import bnfast
from bnfast import _configuration, _core
from cases import BUFFERS
from public_calls import arrays_of, public_calls

LARGE = (64, 64, 32, 32)  # 16 MiB of float32
BYTES = 16 << 20


@pytest.fixture(autouse=True)
def empty_pool():
    before = bnfast.get_output_pool_limit()
    bnfast.set_output_pool_limit(0)
    bnfast.set_output_pool_limit(4 * BYTES)
    yield
    bnfast.set_output_pool_limit(0)
    bnfast.set_output_pool_limit(before)


@pytest.fixture
def x(rng):
    return rng.standard_normal(LARGE, np.float32)


def calls(x):
    mean, var = np.zeros(64, np.float32), np.ones(64, np.float32)
    yield lambda: bnfast.batch_norm(x, mean, var)
    yield lambda: bnfast.batch_norm_forward(x)[0]
    yield lambda: bnfast.batch_norm_backward(x, x, mean, var)[0]


def address(array):
    return array.__array_interface__["data"][0]


def test_the_next_output_gets_the_memory(x):
    for call in calls(x):
        y = call()
        first = address(y)
        del y
        assert _core.output_pool_bytes() == BYTES
        y = call()
        assert address(y) == first
        assert _core.output_pool_bytes() == 0
        del y


def test_another_size_does_not_get_the_memory(x):
    bnfast.batch_norm_forward(x)
    smaller = bnfast.batch_norm_forward(x[:32])[0]
    assert _core.output_pool_bytes() == BYTES  # a block counts as what its output needs
    del smaller
    assert _core.output_pool_bytes() == BYTES + BYTES // 2


def test_an_output_is_an_ordinary_array(x):
    expected = bnfast.batch_norm_forward(x)[0]
    for y in (bnfast.batch_norm_forward(x)[0], bnfast.batch_norm_forward(x)[0]):
        assert y.flags.owndata
        assert y.flags.aligned
        assert y.base is None
        np.testing.assert_array_equal(y, expected)
        y.resize((3, *LARGE), refcheck=False)
        np.testing.assert_array_equal(y[0], expected)
        y.resize((5,), refcheck=False)
        np.testing.assert_array_equal(y, expected.reshape(-1)[:5])
        y.resize((0,), refcheck=False)
        y.resize(LARGE, refcheck=False)
        del y


def test_memory_in_use_is_not_given_twice(x):
    held = [bnfast.batch_norm_forward(x)[0] for _ in range(3)]
    view = held[0][1:, ::2]
    del held[0]
    other = bnfast.batch_norm_forward(-x)[0]
    np.testing.assert_array_equal(view, bnfast.batch_norm_forward(x)[0][1:, ::2])
    assert not np.shares_memory(other, view)


def test_the_layout_is_that_of_the_input(x):
    for other in (np.asfortranarray(x), x.transpose(0, 2, 3, 1), x[:, :, ::-1]):
        y = bnfast.batch_norm_forward(other, axis=other.shape.index(64, 1))[0]
        assert y.strides == np.empty_like(other).strides


def test_the_limit_holds(x):
    for kept in range(1, 4):
        bnfast.set_output_pool_limit(kept * BYTES + 1)
        held = [bnfast.batch_norm_forward(x)[0] for _ in range(5)]
        del held
        assert _core.output_pool_bytes() == kept * BYTES
    bnfast.set_output_pool_limit(BYTES)
    assert _core.output_pool_bytes() == BYTES
    bnfast.set_output_pool_limit(BYTES - 1)
    assert _core.output_pool_bytes() == 0
    bnfast.batch_norm_forward(x)
    assert _core.output_pool_bytes() == 0


def test_the_oldest_goes_first(x):
    sizes = [32, 40, 48, 56]
    bnfast.set_output_pool_limit(2 * BYTES)
    for rows in sizes:
        bnfast.batch_norm_forward(x[:rows])
    assert _core.output_pool_bytes() == sum(sizes[2:]) * BYTES // 64


def test_one_that_is_too_large_drives_none_out(x):
    bnfast.set_output_pool_limit(BYTES)
    bnfast.batch_norm_forward(x[:32])
    kept = _core.output_pool_bytes()
    assert kept > 0
    bnfast.batch_norm_forward(np.concatenate([x, x]))
    assert _core.output_pool_bytes() == kept


def test_no_more_blocks_are_kept_than_there_are_places(x):
    bnfast.set_output_pool_limit(1 << 40)
    held = [bnfast.batch_norm_forward(x[:16])[0] for _ in range(20)]
    del held
    assert _core.output_pool_bytes() == 16 * BYTES // 4


def test_the_memory_of_small_outputs_is_not_kept(x):
    bnfast.batch_norm_forward(x[:15])
    assert _core.output_pool_bytes() == 0


# Around a line and what the library of C keeps at hand, and beyond a mapping of its own.
SMALL = [*[(2, 2, n) for n in (2, 3, 4, 5, 63, 64, 65, 257)], (3, 4, 12000), (4, 4, 0)]
HUGE = (4, 8, 180, 200)


@pytest.mark.parametrize(
    ("shape", "limit"), [*[(shape, 4 * BYTES) for shape in (*SMALL, HUGE)], (HUGE, 0)], ids=str
)
def test_every_output_begins_at_a_line(rng, dtype, use_threads, shape, limit):
    use_threads(1)
    bnfast.set_output_pool_limit(limit)
    x, dy = rng.normal(size=(2, *shape)).astype(dtype)
    weight, bias = rng.normal(size=(2, shape[1])).astype(dtype)
    for name, call in public_calls(x, dy, weight, bias).items():
        held = arrays_of(call())  # so that the next are elsewhere
        outputs = [a for a in held + arrays_of(call()) if a.shape == shape]
        assert name in {"moments", "summary", "batch_norm_backward_sums"} or len(outputs) >= 2
        assert {address(y) % 64 for y in outputs} <= {0}, name


@pytest.mark.parametrize("make", BUFFERS.values(), ids=BUFFERS)
def test_outputs_of_any_layout_begin_at_a_line(rng, make):
    x = make(rng.standard_normal((3, 5, 7, 9), np.float32))
    held = [bnfast.batch_norm_forward(x)[0] for _ in range(8)]
    assert {address(y) % 64 for y in held} == {0}
    assert {y.strides for y in held} == {np.empty_like(x).strides}


def test_outputs_have_the_strides_that_numpy_would_give_them(rng):
    for _ in range(300):
        ndim = rng.integers(2, 6)
        x = np.zeros(rng.integers(1, 5, ndim), np.float32).transpose(rng.permutation(ndim))
        x = x[tuple([slice(None, None, int(rng.choice([1, 2, -1, -2]))) for _ in range(ndim)])]
        if rng.integers(3) == 0:
            x = np.broadcast_to(x, [3 if size == 1 else size for size in x.shape])
        y, expected = _core.empty_output(x), np.empty_like(x)
        assert (y.shape, y.strides, y.flags) == (x.shape, expected.strides, expected.flags)


@pytest.mark.parametrize("limit", [0, 4 * BYTES])
@pytest.mark.parametrize("rows", [1, 20, 64])
def test_outputs_of_any_size_own_their_memory_and_can_be_resized(rng, rows, limit):
    bnfast.set_output_pool_limit(limit)
    x = rng.standard_normal((rows, 64, 32, 32), np.float32)[:, :, :5]
    expected = bnfast.batch_norm_forward(x)[0]
    y = bnfast.batch_norm_forward(x)[0]
    assert y.flags.owndata and y.base is None
    kept = x.size
    for size in (x.size + 1, 3 * x.size, 6 * x.size, x.size // 2, 100, 3, 50, 0, 7):
        y.resize(size, refcheck=False)
        kept = min(kept, size)
        np.testing.assert_array_equal(y[:kept], expected.reshape(-1)[:kept])


def test_the_memory_of_outputs_is_traced(rng):
    x = rng.standard_normal((8, 4, 100), np.float32)
    bnfast.batch_norm_forward(x)  # plans
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        y, *_ = bnfast.batch_norm_forward(x)
        held, _ = tracemalloc.get_traced_memory()
        assert held - before >= y.nbytes
        del y
        after, _ = tracemalloc.get_traced_memory()
        assert held - after >= x.nbytes
    finally:
        tracemalloc.stop()


def test_an_output_beyond_all_memory_is_an_error():
    x = np.broadcast_to(np.float32(1), (2, 3, 1 << 40, 1 << 5))
    with pytest.raises(MemoryError):
        bnfast.batch_norm(x, np.zeros(3), np.ones(3))


# Rows of one element: their statistics and coefficients are larger than the data.
LITTLE_MEMORY = """
import resource
import numpy as np
import bnfast

bnfast.set_num_threads(1)
x, out = np.ones((1 << 20, 1), np.float32), np.full((1 << 20, 1), 7, np.float32)
weight = np.ones(1, np.float32)
bnfast.layer_norm_forward(x[:10], 1, weight, out=out[:10])
out[:10] = 7
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
messages = []
unlimited = resource.RLIM_INFINITY
for more in range(0, 96, 4):  # MiB
    resource.setrlimit(resource.RLIMIT_AS, (used + (more << 20), unlimited))
    message = ""
    try:
        bnfast.layer_norm_forward(x, 1, weight, out=out)
    except MemoryError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_AS, (unlimited, unlimited))
    assert (out == (7 if message else 0)).all()
    out[...] = 7
    messages.append(message)
print(*messages, sep=chr(10))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory in use is read from /proc")
def test_without_memory_for_statistics_a_call_raises_and_writes_nothing():
    done = subprocess.run([sys.executable, "-c", LITTLE_MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    messages = done.stdout.splitlines()
    assert messages.count("no memory for the statistics of the channels") >= 3
    assert messages.count("") >= 3


def test_other_arrays_are_left_to_numpy(x):
    del x
    gc.collect()
    kept = _core.output_pool_bytes()
    y = np.empty(LARGE, np.float32)
    del y
    assert _core.output_pool_bytes() == kept


def test_many_threads_share_the_pool(x):
    expected = bnfast.batch_norm_forward(x[:20])[0]
    wrong = []

    def work():
        for _ in range(20):
            if not np.array_equal(bnfast.batch_norm_forward(x[:20])[0], expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert _core.output_pool_bytes() <= 4 * BYTES


@pytest.mark.parametrize("limit", [-1, 1.5, "1", None, True])
def test_a_bad_limit_is_refused(limit):
    with pytest.raises((TypeError, ValueError), match="limit must be"):
        bnfast.set_output_pool_limit(limit)


def test_a_limit_beyond_all_memory_is_one(x):
    bnfast.set_output_pool_limit(2**70)
    assert bnfast.get_output_pool_limit() == sys.maxsize
    bnfast.batch_norm_forward(x)
    assert _core.output_pool_bytes() == BYTES


@pytest.mark.parametrize(("value", "limit"), [("", 256 << 20), ("0", 0), ("1000", 1000)])
def test_the_variable_sets_the_limit(monkeypatch, value, limit):
    monkeypatch.setenv("BNFAST_OUTPUT_POOL_LIMIT", value)
    _configuration._choose_pool()
    assert bnfast.get_output_pool_limit() == limit


def test_the_variable_is_read_where_bnfast_is_imported(monkeypatch):
    monkeypatch.setenv("BNFAST_OUTPUT_POOL_LIMIT", "1000")
    code = "import bnfast; print(bnfast.get_output_pool_limit())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 1000


@pytest.mark.parametrize("value", ["-1", "many", "1.5"])
def test_a_bad_variable_is_an_import_error(monkeypatch, value):
    monkeypatch.setenv("BNFAST_OUTPUT_POOL_LIMIT", value)
    with pytest.raises(ImportError, match=r"^BNFAST_OUTPUT_POOL_LIMIT must be a number of bytes"):
        _configuration._choose_pool()


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_what_resized_outputs_leave_goes_back_to_the_system(rng):
    def resident():
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE

    x = rng.standard_normal((32, 64, 28, 28), np.float32)
    before = resident()
    for rows in rng.choice([24, 32], 200):
        y = bnfast.batch_norm_forward(x[:rows])[0]
        y.resize((2 * rows, *y.shape[1:]), refcheck=False)
    del y
    assert resident() - before < bnfast.get_output_pool_limit() + BYTES
    bnfast.set_output_pool_limit(0)
    assert resident() - before < BYTES // 4
