"""The kernels alone, without Python: sanitized, by another compiler, on emulated systems."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import emulated_windows
from bnfast import _core

KERNELS = Path(__file__).parent.parent / "src" / "bnfast" / "_kernels"
CHECK = Path(__file__).parent / "c" / "kernel_check.c"
BITS = CHECK.with_name("expected_bits.txt")  # whose change is said in the changelog

pytestmark = [
    pytest.mark.skipif(not KERNELS.is_dir(), reason="needs the source tree"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc"),
]


def build_and_run(folder, isa, flags, compiler="gcc", more=(), runner=()):
    program = folder / f"check_{isa}.exe"
    command = [
        *(compiler, *flags, "-Wconversion", "-Wdouble-promotion", "-Werror", *more),
        # GCC guesses wrongly of arrays that another function fills; clang does not know the word.
        *(() if compiler == "clang" else ("-Wno-maybe-uninitialized",)),
        *(f"-I{KERNELS}", f"-DBN_TABLE=bn_kernels_{isa}", '-DBN_FLAGS="checked"'),
        *(str(KERNELS / f"variant_{isa}.c"), str(CHECK), "-lm", "-o", str(program)),
    ]
    built = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([*runner, str(program)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 74
    return done.stdout


def build_sanitized(folder, isa):
    # -O1 for the compiler: the source reads and writes the same, and so are the bits. What is
    # undefined is so in the one source of all, which takes three times as long to be told.
    checks = "address,undefined" if isa == "baseline" else "address"
    sanitize = ["-O1", f"-fsanitize={checks}", "-fno-sanitize-recover=all"]
    return build_and_run(folder, isa, _core.built_isas()[isa].split(), more=sanitize)


def build_by_clang(folder, isa, more=(), runner=()):
    known_to_gcc_alone = "-fno-tree-"
    flags = [f for f in _core.built_isas()[isa].split() if not f.startswith(known_to_gcc_alone)]
    return build_and_run(folder, isa, flags, "clang", more, runner)


def checked():
    """The widest instruction set and the baseline: the others have the widest one's source."""
    return sorted({_core.available_isas()[0], "baseline"})


def build_for_windows(folder, isa):
    more = emulated_windows.flags_of_clang()
    return build_by_clang(folder, isa, more, emulated_windows.runner(folder))


def build_for_neon(folder):
    flags = [f for f in _core.built_isas()["baseline"].split() if not f.startswith("-m")]
    return build_and_run(
        *(folder, "baseline", [*flags, "-static"]),
        compiler="aarch64-linux-gnu-gcc",
        runner=["qemu-aarch64"],
    )


has_clang = shutil.which("clang") is not None
has_neon = bool(shutil.which("aarch64-linux-gnu-gcc") and shutil.which("qemu-aarch64"))


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """What each build prints, in the future: a compiler takes a minute, on one core of all."""

    def folder():
        return tmp_path_factory.mktemp("kernels")

    baseline = _core.built_isas()["baseline"].split()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = {"expected": pool.submit(build_and_run, folder(), "baseline", baseline)}
        for isa in checked():
            made["sanitized", isa] = pool.submit(build_sanitized, folder(), isa)
            if has_clang:
                made["clang", isa] = pool.submit(build_by_clang, folder(), isa)
        if has_neon:
            made["neon"] = pool.submit(build_for_neon, folder())
        if not emulated_windows.MISSING:
            # With the widest vectors, which Windows aligns and keeps across calls in its own way.
            made["windows"] = pool.submit(build_for_windows, folder(), _core.available_isas()[0])
        yield made
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def expected(builds):
    """What the baseline prints."""
    return builds["expected"].result()


def test_the_checks_tell_values_apart(expected):
    hashes = [line.split()[-1] for line in expected.splitlines()]
    assert len(set(hashes)) == len(hashes)


def test_the_bits_of_all_kernels_are_as_before(expected):
    assert expected == BITS.read_text(encoding="utf-8")


def test_no_variant_reads_or_writes_out_of_bounds(builds, expected):
    for isa in checked():
        assert builds["sanitized", isa].result() == expected, isa


@pytest.mark.skipif(not has_clang, reason="needs clang")
def test_another_compiler_makes_the_same_bits(builds, expected):
    for isa in checked():
        assert builds["clang", isa].result() == expected, isa


@pytest.mark.skipif(not has_neon, reason="needs aarch64-linux-gnu-gcc and qemu-aarch64")
def test_neon_makes_the_same_bits(builds, expected):
    assert builds["neon"].result() == expected


@pytest.mark.skipif(bool(emulated_windows.MISSING), reason=f"needs {emulated_windows.MISSING}")
def test_windows_makes_the_same_bits(builds, expected):
    assert builds["windows"].result() == expected
