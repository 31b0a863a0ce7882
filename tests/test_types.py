"""What a type checker tells users of their calls: the types that come out, and what it refuses."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bnfast

ROOT = Path(__file__).parent.parent

GIVEN = """\
from typing import Any
import numpy as np
from numpy.typing import NDArray
from typing_extensions import assert_type
import bnfast

def calls(
    f16: NDArray[np.float16], f32: NDArray[np.float32], f64: NDArray[np.float64],
    floats: NDArray[np.floating[Any]], unknown: NDArray[Any], i64: NDArray[np.int64],
) -> None:
    layer = bnfast.BatchNorm(3)
"""

COME_OUT = {
    # As the input is, whatever the parameters are.
    "bnfast.batch_norm(f16, None, None, training=True)": "NDArray[np.float16]",
    "bnfast.batch_norm(f32, f64, f64, f64)": "NDArray[np.float32]",
    "bnfast.batch_norm(f64, [0.0], [1.0], [1.0], out=f64)": "NDArray[np.float64]",
    "bnfast.batch_norm(floats, None, None, training=True)": "NDArray[np.floating[Any]]",
    "bnfast.batch_norm(unknown, None, None, training=True)": "NDArray[Any]",
    "bnfast.layer_norm(f16, 3)": "NDArray[np.float16]",
    "bnfast.group_norm(f64, 3, mask=[[True]])": "NDArray[np.float64]",
    "bnfast.instance_norm(f32, lengths=[1, 2])": "NDArray[np.float32]",
    "bnfast.weight_norm(f32, [1.0])": "NDArray[np.float32]",
    "layer(f32)": "NDArray[np.float32]",
    "layer(f64, residual=f64)": "NDArray[np.float64]",
    "layer.backward(f32)": "NDArray[np.float32]",
    "bnfast.LayerNorm(3).eval()(f16)": "NDArray[np.float16]",
    # A list is what NumPy makes of it.
    "bnfast.batch_norm([[1.0], [2.0]], None, None, training=True)": "NDArray[np.float64]",
    "bnfast.rms_norm([1, 2.0], 2)": "NDArray[np.float64]",
    # Statistics are float64.
    "bnfast.batch_norm_forward(f32)": (
        "tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]"
    ),
    "bnfast.rms_norm_forward(f32, 3)": "tuple[NDArray[np.float32], NDArray[np.float64]]",
    "bnfast.moments(i64, axis=(0, 1))": "bnfast.Moments",
    "bnfast.summary([[1, 2]], axis=None)": "bnfast.Summary",
    # A residual has a gradient.
    "bnfast.batch_norm_backward(f32, f32, f64, f64, f32)": (
        "tuple[NDArray[np.float32], NDArray[Any], NDArray[Any]]"
    ),
    "bnfast.group_norm_backward(f32, f32, 3, f64, f64, residual=True)": (
        "tuple[NDArray[np.float32], NDArray[Any], NDArray[Any], NDArray[np.float32]]"
    ),
}

REFUSED = {
    "bnfast.batch_norm(i64, None, None, training=True)": "type-var",
    "bnfast.layer_norm('text', 3)": "arg-type",
    "bnfast.layer_norm(f32, 3.0)": "arg-type",
    "bnfast.batch_norm(f32, None, None, eps='small')": "arg-type",
    "bnfast.batch_norm(f32, None, None, out=[1.0])": "arg-type",
    "bnfast.batch_norm(f32)": "call-arg",
    "layer(f32, trainig=True)": "call-arg",
}


@pytest.fixture(scope="module")
def cache(pytestconfig):
    """Where mypy keeps what it has read: not where it does for who runs it beside the tests."""
    pytest.importorskip("mypy")
    return pytestconfig.cache.mkdir("mypy")


def errors_of(folder, code, cache):
    """Return what mypy has against a program, by the numbers of its lines."""
    path = folder / "program.py"
    path.write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"]
    command += ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(cache), str(path)]
    home = Path(bnfast.__file__).parent.parent
    environment = dict(os.environ)
    if home.name != "site-packages":  # where mypy looks by itself
        environment["MYPYPATH"] = str(home)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    errors = {}
    for line in done.stdout.splitlines():
        match = re.match(r".*program\.py:(\d+): error: (.*)$", line)
        if match:
            errors.setdefault(int(match[1]), []).append(match[2])
        else:
            assert ": note: " in line or line.startswith(("Success", "Found")), line
    return errors


@pytest.fixture(scope="module")
def errors(tmp_path_factory, cache):
    """Of all calls at once, by the calls: mypy reads NumPy for seconds."""
    lines = {f"    assert_type({call}, {kind})": call for call, kind in COME_OUT.items()}
    lines |= {f"    {call}": call for call in REFUSED}
    found = errors_of(tmp_path_factory.mktemp("types"), GIVEN + "\n".join(lines) + "\n", cache)
    first = GIVEN.count("\n") + 1
    numbered = dict(enumerate(lines.values(), first))
    assert set(found) <= set(numbered)
    return {call: found.get(number, []) for number, call in numbered.items()}


@pytest.mark.parametrize("call", COME_OUT)
def test_what_comes_out_has_the_type_of_what_goes_in(errors, call):
    assert errors[call] == []


@pytest.mark.parametrize("call", REFUSED)
def test_a_wrong_argument_is_seen_before_the_program_runs(errors, call):
    assert len(errors[call]) == 1 and errors[call][0].endswith(f"[{REFUSED[call]}]")


def test_the_readmes_python_passes(tmp_path, cache):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    code = "".join(f"def block_{n}() -> None:\n{indented(b)}" for n, b in enumerate(blocks))
    assert blocks and errors_of(tmp_path, code, cache) == {}


def indented(code):
    return "".join(f"    {line}" if line.strip() else line for line in code.splitlines(True))
