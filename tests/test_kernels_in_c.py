"""The kernels alone, without Python: sanitized, by another compiler, on an emulated aarch64."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from bnfast import _core

KERNELS = Path(__file__).parent.parent / "src" / "bnfast" / "_kernels"
CHECK = Path(__file__).parent / "c" / "kernel_check.c"

pytestmark = [
    pytest.mark.skipif(not KERNELS.is_dir(), reason="needs the source tree"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc"),
]


def build_and_run(folder, isa, flags, compiler="gcc", more=(), runner=()):
    program = folder / f"check_{isa}"
    command = [
        *(compiler, *flags, "-Wconversion", "-Wdouble-promotion", "-Werror", *more),
        # GCC guesses wrongly of arrays that another function fills; clang does not know the word.
        *(() if compiler == "clang" else ("-Wno-maybe-uninitialized",)),
        *(f"-I{KERNELS}", f"-DBN_TABLE=bn_kernels_{isa}", '-DBN_FLAGS="checked"'),
        *(str(KERNELS / f"variant_{isa}.c"), str(CHECK), "-lm", "-o", str(program)),
    ]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([*runner, str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 24
    return done.stdout


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What the baseline prints."""
    flags = _core.built_isas()["baseline"].split()
    return build_and_run(tmp_path_factory.mktemp("baseline"), "baseline", flags)


def side_by_side(build):
    """What `build` makes of each instruction set: a compiler takes a minute, on one core."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = {isa: pool.submit(build, isa) for isa in _core.available_isas()}
        return {isa: future.result() for isa, future in made.items()}


def build_sanitized(folder, isa):
    # -O1 for the compiler: the source reads and writes the same, and so are the bits. What is
    # undefined is so in the one source of all, which takes three times as long to be told.
    checks = "address,undefined" if isa == "baseline" else "address"
    sanitize = ["-O1", f"-fsanitize={checks}", "-fno-sanitize-recover=all"]
    return build_and_run(folder, isa, _core.built_isas()[isa].split(), more=sanitize)


def build_by_clang(folder, isa):
    known_to_gcc_alone = "-fno-tree-"
    flags = [f for f in _core.built_isas()[isa].split() if not f.startswith(known_to_gcc_alone)]
    return build_and_run(folder, isa, flags, compiler="clang")


def test_the_checks_tell_values_apart(expected):
    hashes = [line.split()[-1] for line in expected.splitlines()]
    assert len(set(hashes)) == len(hashes)


def test_no_variant_reads_or_writes_out_of_bounds(tmp_path, expected):
    for isa, made in side_by_side(partial(build_sanitized, tmp_path)).items():
        assert made == expected, isa


@pytest.mark.skipif(shutil.which("clang") is None, reason="needs clang")
def test_another_compiler_makes_the_same_bits(tmp_path, expected):
    for isa, made in side_by_side(partial(build_by_clang, tmp_path)).items():
        assert made == expected, isa


@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-gcc") is None or shutil.which("qemu-aarch64") is None,
    reason="needs aarch64-linux-gnu-gcc and qemu-aarch64",
)
def test_neon_makes_the_same_bits(tmp_path, expected):
    flags = [f for f in _core.built_isas()["baseline"].split() if not f.startswith("-march")]
    made = build_and_run(
        *(tmp_path, "baseline", [*flags, "-static"]),
        compiler="aarch64-linux-gnu-gcc",
        runner=["qemu-aarch64"],
    )
    assert made == expected
