"""Importing changes nothing in the process, costs little and needs NumPy alone."""

import os
import subprocess
import sys

import pytest

CHECK = """
import os, sys, threading
import numpy as np
tiny = np.float32(1e-40)
before = dict(os.environ), threading.active_count(), np.geterr(), len(os.listdir("/proc/self/task"))
import bnfast
after = dict(os.environ), threading.active_count(), np.geterr(), len(os.listdir("/proc/self/task"))
assert before == after, (before, after)
assert tiny * np.float32(1) != 0 and np.float32(1e-38) / np.float32(1e3) != 0
x = np.ones((64, 64, 64), np.float32)
bnfast.batch_norm_forward(x)
assert tiny * np.float32(1) != 0 and np.float32(1e-38) / np.float32(1e3) != 0
"""


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_import_leaves_the_float_mode_the_environment_and_the_threads_alone():
    done = run("-c", CHECK)
    assert done.returncode == 0, done.stderr


def test_only_numpy_and_the_standard_library_are_imported():
    done = run(
        "-c",
        "import sys, numpy; before = set(sys.modules); import bnfast;"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))",
    )
    outside = set(done.stdout.split()) - set(sys.stdlib_module_names) - {"bnfast", "numpy"}
    # Cython registers modules of its own, for its types and for tracebacks.
    assert not {name for name in outside if not name.startswith(("_cython", "cython_runtime"))}


def test_the_command_line_is_not_imported():
    done = run(
        "-c", "import sys, bnfast; print('argparse' in sys.modules, 'bnfast._cli' in sys.modules)"
    )
    assert done.stdout.split() == ["False", "False"]
