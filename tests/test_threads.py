"""How many threads; many callers at once; children of a fork."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import bnfast
from bnfast import _core, _threads

needs_openmp = pytest.mark.skipif(not _core.HAS_OPENMP, reason="built without OpenMP")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@pytest.fixture
def many_processors(monkeypatch):
    monkeypatch.setattr(_threads, "allowed_threads", lambda: 64)
    monkeypatch.setattr(_core, "team_was_late", lambda: False)
    monkeypatch.setattr(_threads, "_of_the_environment", None)
    yield
    bnfast.set_num_threads(None)


@needs_openmp
def test_set_num_threads_is_read_back(many_processors):
    for number in (1, 2, 5):
        bnfast.set_num_threads(number)
        assert bnfast.get_num_threads() == number
        assert _threads.chosen_by() == "set_num_threads"
    bnfast.set_num_threads(None)
    assert _threads.chosen_by() == "OpenMP"
    assert bnfast.get_num_threads() == _core.openmp_max_threads()


@needs_openmp
def test_none_goes_back_to_the_variable(many_processors):
    _threads.obey_environment(3)
    assert _threads.chosen_by() == "BNFAST_NUM_THREADS"
    for number in (5, None):
        bnfast.set_num_threads(number)
        assert bnfast.get_num_threads() == (number or 3)
    assert _threads.chosen_by() == "BNFAST_NUM_THREADS"


@needs_openmp
def test_small_work_is_serial_and_large_work_has_the_whole_team(many_processors):
    serial, each = _threads.SERIAL_BYTES, _threads.BYTES_PER_THREAD
    assert 2 * each < serial < 64 * each
    bnfast.set_num_threads(2)
    assert _threads.threads_for(serial - 1) == 1
    assert _threads.threads_for(serial) == 2
    bnfast.set_num_threads(64)
    assert _threads.threads_for(64 * each - 1) == 1
    assert _threads.threads_for(64 * each) == 64
    assert _threads.threads_for(1 << 40) == 64


@needs_openmp
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_the_setting_of_openmp_is_read_on_every_call(many_processors, limit):
    threadpoolctl = pytest.importorskip("threadpoolctl")
    with threadpoolctl.threadpool_limits(limit, user_api="openmp"):
        assert bnfast.get_num_threads() == limit


@needs_openmp
def test_few_channels_of_very_many_rows_are_finished_together(rng, use_threads):
    x = rng.standard_normal((220_000, 60), np.float32)  # so many blocks that channels might be cut
    results = []
    for number in (1, 2):
        use_threads(1)
        bnfast.batch_norm_forward(3 * x + 5)  # leaves other coefficients in the memory of the next
        use_threads(number)
        results.append(bnfast.batch_norm_forward(x))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_many_python_threads_get_the_same_bits(rng):
    arrays = [rng.normal(3, 2, (4, 16, 40, 40)).astype(np.float32) for _ in range(4)]

    def work(x):
        y, mean, invstd = bnfast.batch_norm_forward(x)
        return y, *bnfast.batch_norm_backward(y, x, mean, invstd)

    expected = [work(x) for x in arrays]
    with ThreadPoolExecutor(8) as pool:
        for got, want in zip(pool.map(work, arrays * 10), expected * 10, strict=True):
            for a, b in zip(got, want, strict=True):
                np.testing.assert_array_equal(a, b)


CHILD = """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork beside threads
import numpy as np, bnfast
from bnfast import _threads
_threads.allowed_threads = lambda: 64
bnfast.set_num_threads(4)
x = np.random.default_rng(0).normal(size=(8, 16, 64, 64)).astype(np.float32)
before = bnfast.batch_norm_forward(x)
assert bnfast.get_num_threads() == {expected}
if {fork_first}:
    pid = os.fork()
    if pid == 0:
        ok = bnfast.get_num_threads() == 1
        bnfast.set_num_threads(4)
        ok &= bnfast.get_num_threads() == 1
        after = bnfast.batch_norm_forward(x)
        ok &= all(np.array_equal(a, b) for a, b in zip(before, after))
        os._exit(0 if ok else 3)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status
else:
    import multiprocessing
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for after in pool.map(bnfast.batch_norm_forward, [x] * 4):
            assert all(np.array_equal(a, b) for a, b in zip(before, after))
after = bnfast.batch_norm_forward(x)
assert all(np.array_equal(a, b) for a, b in zip(before, after))
assert bnfast.get_num_threads() == {expected}
"""


LATE_IMPORT = """
import ctypes, os, sys
try:
    gomp = ctypes.CDLL("libgomp.so.1")  # as another library would have it
except OSError:
    sys.exit(77)
body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)
gomp.GOMP_parallel(body, None, 2, 0)
pid = os.fork()
if pid == 0:
    import numpy as np, bnfast
    from bnfast import _threads
    _threads.allowed_threads = lambda: 64
    bnfast.set_num_threads(4)
    bnfast.batch_norm_forward(np.ones((8, 16, 64, 64), np.float32))
    os._exit(0 if bnfast.get_num_threads() == 1 else 3)
_, status = os.waitpid(pid, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@needs_fork
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_child_that_imports_bnfast_after_the_fork_does_not_hang():
    done = subprocess.run(
        [sys.executable, "-c", LATE_IMPORT], capture_output=True, text=True, timeout=120
    )
    if done.returncode == 77:
        pytest.skip("no libgomp.so.1")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_no_more_threads_than_processors_are_allowed():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); import bnfast;"
        "bnfast.set_num_threads(4); print(bnfast.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "1", done.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_a_change_of_the_affinity_is_seen_by_the_next_call():
    before = os.sched_getaffinity(0)
    try:
        for allowed in ({min(before)}, before):
            os.sched_setaffinity(0, allowed)
            assert _threads.allowed_threads() == _core.allowed_processors() == len(allowed)
    finally:
        os.sched_setaffinity(0, before)


def test_one_thread_asks_for_no_affinity(monkeypatch):
    def never():
        raise AssertionError("a system call for nothing")

    monkeypatch.setattr(_threads, "allowed_threads", never)
    monkeypatch.setattr(_threads, "_wanted", 1)
    assert _threads.threads_for(1 << 40) == 1


SAME_NUMBER = """
import ctypes, os, sys
os.getpid = lambda: 1  # a child is its parent's namesake where each is the first of a namespace
import numpy as np, bnfast
from bnfast import _threads
_threads.allowed_threads = lambda: 64
bnfast.set_num_threads(2)
x = np.random.default_rng(0).normal(size=(8, 16, 64, 64)).astype(np.float32)
bnfast.batch_norm_forward(x)
pid = {fork}()
if pid == 0:
    bnfast.batch_norm_forward(x)
    os._exit(0 if bnfast.get_num_threads() == 1 else 3)
_, status = os.waitpid(pid, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@needs_fork
@pytest.mark.parametrize("fork", ["os.fork", "ctypes.PyDLL(None).fork"])
def test_a_child_that_has_the_number_of_its_parent_is_serial(fork):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SAME_NUMBER.format(fork=fork)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


@needs_fork
@pytest.mark.parametrize("fork_first", [True, False], ids=["os.fork", "multiprocessing"])
def test_forked_children_are_serial_and_never_hang(fork_first):
    code = CHILD.format(fork_first=fork_first, expected=4 if _core.HAS_OPENMP else 1)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


NO_ROOM = """
import resource
import numpy as np, bnfast
from bnfast import _threads
_threads.allowed_threads = lambda: 4
x = np.random.default_rng(0).normal(size=(8, 16, 64, 64)).astype(np.float32)
alone, together = np.empty_like(x), np.empty_like(x)
bnfast.set_num_threads(1)
bnfast.batch_norm_forward(x, out=alone)
bnfast.set_num_threads(4)
pages = int(open("/proc/self/statm").read().split()[0])
room = pages * resource.getpagesize() + (4 << 20)  # less than the stack of a thread
resource.setrlimit(resource.RLIMIT_AS, (room, room))
for _ in range(2):
    bnfast.batch_norm_forward(x, out=together)
    assert np.array_equal(alone, together)
print("alive")
"""


@needs_openmp
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_thread_that_cannot_be_started_leaves_the_call_to_the_others():
    done = subprocess.run(
        [sys.executable, "-c", NO_ROOM], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


@needs_openmp
def test_a_call_is_serial_while_the_team_is_late(many_processors, monkeypatch):
    bnfast.set_num_threads(4)
    assert _threads.threads_for(1 << 40) == 4
    monkeypatch.setattr(_core, "team_was_late", lambda: True)
    assert _threads.threads_for(1 << 40) == 1


def test_when_a_team_is_late_in_c(tmp_path):
    program = tmp_path / "team_check"
    source = Path(__file__).parent / "c" / "team_check.c"
    kernels = Path(__file__).parent.parent / "src" / "bnfast" / "_kernels"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not kernels.is_dir():
        pytest.skip("needs a C compiler and the source tree")
    command = [compiler, "-std=c11", f"-I{kernels}", str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


SMALL_STACK = """
import sys, threading
sys.path.insert(0, {tests!r})
import numpy as np
import bnfast
from public_calls import public_calls

bnfast.set_num_threads(1)
of_blas = "decorrelated", "iterative", "spectral"

rng = np.random.default_rng(0)
calls = []
for dtype, size in ((np.float32, 1), (np.float64, 1), (np.float64, 1e200)):
    for axes in ((0, 1, 2, 3), (0, 2, 3, 1)):  # dense, and neighbouring channels
        x, dy = (rng.normal(size=(2, 8, 64, 40, 30)) * size).astype(dtype)
        x, dy = (a.transpose(np.argsort(axes))[:, :, :, ::2] for a in (x, dy / size))
        weight, bias = rng.normal(size=(2, x.shape[1])).astype(dtype)
        for name, call in public_calls(x, dy, weight, bias).items():
            if not name.startswith(of_blas):
                calls.append(call)

def do_all():
    for call in calls:
        call()
    print("done")

do_all()  # what is imported and planned needs more, and needs it once
threading.stack_size(128 << 10)  # what musl gives a thread
thread = threading.Thread(target=do_all)
thread.start()
thread.join()
"""


def test_a_call_needs_less_stack_than_a_thread_of_musl_has():
    code = SMALL_STACK.format(tests=os.path.dirname(__file__))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "done\ndone\n"), done.stderr


@needs_openmp
def test_one_caller_of_several_has_one_thread(many_processors):
    bnfast.set_num_threads(3)
    with _threads.one_thread():
        assert bnfast.get_num_threads() == 1
        assert _threads.chosen_by() == "the scheduler, which runs other calls at once"
        with _threads.one_thread(), ThreadPoolExecutor(1) as pool:
            assert pool.submit(bnfast.get_num_threads).result() == 3
        assert bnfast.get_num_threads() == 1
    assert bnfast.get_num_threads() == 3
