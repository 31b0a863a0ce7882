"""Which kernels run: the environment's word, and what this machine was expected to have."""

import os
import subprocess
import sys

import pytest

import bnfast
from bnfast import _configuration, _core


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_available_isas_are_built_best_first_and_end_with_the_baseline():
    available = bnfast.available_isas()
    built = list(_core.built_isas())
    assert available[-1] == "baseline"
    assert [name for name in built if name in available] == list(available)


@pytest.mark.skipif(not os.environ.get("BNFAST_EXPECT_ISAS"), reason="BNFAST_EXPECT_ISAS not set")
def test_every_expected_isa_is_available():
    assert set(bnfast.available_isas()) == set(os.environ["BNFAST_EXPECT_ISAS"].split(","))


ACTIVE = "import bnfast; from bnfast import _core; print(_core.active_isa())"


def test_the_best_isa_runs_by_default():
    done = run(ACTIVE, BNFAST_ISA="")
    assert done.stdout.strip() == bnfast.available_isas()[0]


@pytest.mark.parametrize("spelled", [str, str.upper], ids=["as listed", "upper case"])
@pytest.mark.parametrize("name", bnfast.available_isas())
def test_bnfast_isa_chooses_exactly(monkeypatch, use_isa, name, spelled):
    monkeypatch.setenv("BNFAST_ISA", spelled(name))
    for other in bnfast.available_isas():
        use_isa(other)
        _configuration._choose_isa()
        assert _core.active_isa() == name


@pytest.mark.parametrize("name", ["avx", "sse2", "SSE2", "native", "baseline,avx2", "1"])
def test_an_unknown_isa_is_an_import_error(monkeypatch, name):
    monkeypatch.setenv("BNFAST_ISA", name)
    built = ", ".join(_core.built_isas())
    with pytest.raises(ImportError, match=f"^BNFAST_ISA={name}, but this build has only: {built}$"):
        _configuration._choose_isa()


def test_bnfast_isa_is_read_where_bnfast_is_imported():
    done = run("import bnfast", BNFAST_ISA="sse2")
    assert done.returncode != 0
    assert "ImportError: BNFAST_ISA=sse2, but this build has only: " in done.stderr
    assert run(ACTIVE, BNFAST_ISA="BASELINE").stdout.strip() == "baseline"


def test_an_isa_that_the_machine_lacks_is_an_import_error(monkeypatch):
    # The machine has all that were built, so the check is made to answer otherwise.
    if len(_core.built_isas()) == 1:
        pytest.skip("this build has the baseline only")
    monkeypatch.setattr(_core, "available_isas", lambda: ("baseline",))
    monkeypatch.setenv("BNFAST_ISA", next(iter(_core.built_isas())))
    with pytest.raises(ImportError, match=r"but this machine runs only: baseline$"):
        _configuration._choose_isa()


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_a_bad_number_of_threads_is_an_import_error(monkeypatch, value):
    monkeypatch.setenv("BNFAST_NUM_THREADS", value)
    message = f"^BNFAST_NUM_THREADS must be a positive integer, got '{value}'$"
    with pytest.raises(ImportError, match=message):
        _configuration._choose_threads()


def test_the_number_of_threads_is_read_where_bnfast_is_imported():
    done = run("import bnfast", BNFAST_NUM_THREADS="two")
    assert done.returncode != 0
    assert "ImportError: BNFAST_NUM_THREADS must be a positive integer" in done.stderr


def test_bnfast_num_threads_is_obeyed():
    code = "import bnfast; print(bnfast.get_num_threads())\n"
    code += "for n in (2, None): bnfast.set_num_threads(n)\nprint(bnfast.get_num_threads())"
    done = run(code, BNFAST_NUM_THREADS="1")
    assert done.stdout.split() == ["1", "1"]


def test_only_an_available_isa_can_be_activated():
    with pytest.raises(ValueError, match="isa must be one of"):
        _core.activate("neon")


def test_every_variant_was_compiled_strictly():
    for flags in _core.built_isas().values():
        words = flags.split()
        assert "-ffp-contract=off" in words
        assert words.index("-fno-fast-math") > 0
        loose = ("-ffast", "-Ofast", "-funsafe", "-ffinite", "-fassociative", "-freciprocal")
        assert not [word for word in words if word.startswith(loose)]
