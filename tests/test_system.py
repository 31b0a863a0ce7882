"""What the core asks of its system: memory, threads, clocks; of Windows, in an emulator."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import emulated_windows

KERNELS = Path(__file__).parent.parent / "src" / "bnfast" / "_kernels"
CHECK = Path(__file__).parent / "c" / "system_check.c"

pytestmark = pytest.mark.skipif(not KERNELS.is_dir(), reason="needs the source tree")


def build_and_run(folder, compiler, system, runner=()):
    program = folder / "system_check.exe"
    names = f"system_{system}", "output_memory", "cache_sizes"
    command = [
        *(*compiler, "-std=c11", "-O1", "-Wall", "-Wextra", "-Wconversion", "-Werror"),
        *(f"-I{KERNELS}", "-D_OPENMP=201511", str(CHECK)),
        *(*(str(KERNELS / f"{name}.c") for name in names), "-o", str(program)),
    ]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([*runner, str(program)], stdout=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="Windows is not POSIX")
def test_posix_gives_memory_threads_and_clocks(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    build_and_run(tmp_path, [compiler, "-pthread"], "posix")


@pytest.mark.skipif(bool(emulated_windows.MISSING), reason=f"needs {emulated_windows.MISSING}")
def test_windows_gives_memory_threads_and_clocks(tmp_path):
    compiler = ["clang", *emulated_windows.flags_of_clang()]
    build_and_run(tmp_path, compiler, "windows", emulated_windows.runner(tmp_path))
