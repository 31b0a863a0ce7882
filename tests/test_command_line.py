"""``python -m bnfast``, as a user calls it."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

import bnfast
from bnfast import _cli, _dtypes


def run(*arguments, **keywords):
    return subprocess.run(
        [sys.executable, "-m", "bnfast", *arguments],
        capture_output=True,
        text=True,
        timeout=600,  # a machine may be busy with other things
        **keywords,
    )


def test_info():
    done = run("info")
    assert done.returncode == 0, done.stderr
    assert f"version: {bnfast.__version__}" in done.stdout
    assert "available: " + ", ".join(bnfast.available_isas()) in done.stdout


def test_version():
    assert run("--version").stdout.strip() == f"bnfast {bnfast.__version__}"


@pytest.mark.parametrize(
    "arguments",
    [
        *((), ("nonsense",), ("demo", "--epochs", "many"), ("demo", "--epochs", "0")),
        *(("demo", "--seed", "-1"), ("demo", "--learning-rate", "0")),
        *(("demo", "--dtype", "float64"), ("demo", "--fused", "--in-place")),
        *(("demo", "--output", "plot.xyz"), ("demo", "--output", "not/a/folder/plot.png")),
    ],
)
def test_bad_arguments_show_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        _cli.main(arguments)
    assert exit_info.value.code == 2
    assert "usage: python -m bnfast" in capsys.readouterr().err


def test_the_command_ends_with_the_status_of_bad_arguments():
    done = run("nonsense")
    assert done.returncode == 2
    assert "usage: python -m bnfast" in done.stderr


@pytest.mark.parametrize("arguments", [("info",), ("--version",)])
def test_a_reader_that_has_left_is_no_error(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "bnfast", *arguments],
        env={**os.environ, "PYTHONUNBUFFERED": ""},  # what is written fails at the end
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=600,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [("info",), ("stats",)])
def test_a_full_disk_is_told_in_one_line(arguments, tmp_path):
    if arguments[0] == "stats":
        pytest.importorskip("rich")
        arguments += (str(tmp_path / "x.npy"),)
        np.save(arguments[1], np.ones((4, 3)))
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "bnfast", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=600,
        )
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["cannot be written: No space left on device"]


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_the_network_of_the_demo_is_as_accurate_with_activations_of_16_bits(half):
    for package in ("sklearn", "ml_dtypes"):
        pytest.importorskip(package)
    from bnfast._cli import digits

    class Watched(digits.Normalization):
        def forward(self, x):
            y = super().forward(x)
            seen.update((x.dtype, y.dtype))
            return y

        def backward(self, dy):
            dx = super().backward(dy)
            seen.update((dy.dtype, dx.dtype))
            return dx

    def normalize(channels):
        return Watched(bnfast.BatchNorm(channels, axis=-1))

    data = digits.load()
    accuracies = []
    for dtype in (np.dtype(np.float32), _dtypes.named(half)):
        seen = set()
        network = digits.Network(0, normalize, dtype=dtype)
        list(network.train(data, epochs=5, batch_size=64, learning_rate=0.5, seed=0))
        assert seen == {dtype}
        parameters = [pair for stage in network.stages for pair in stage.parameters()]
        assert {array.dtype for pair in parameters for array in pair} == {np.dtype(np.float32)}
        accuracies.append(network.accuracy(data))
    assert accuracies[0] > 0.95
    assert abs(accuracies[1] - accuracies[0]) <= 0.01


def test_the_demo_says_which_type_its_activations_have(tmp_path):
    for package in ("sklearn", "matplotlib", "rich", "ml_dtypes"):
        pytest.importorskip(package)
    done = run("demo", "--dtype", "bfloat16", "--epochs", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "activations of bfloat16" in " ".join(done.stdout.split())
    difference = float(re.search(r"at most\s+([\d.e-]+)\s+of the largest", done.stdout)[1])
    assert 1e-4 < difference <= 2.0**-7  # a step of the type


@pytest.mark.parametrize("fused", ["fused", "inplace"])
def test_the_network_of_the_demo_is_as_accurate_fused_and_in_place(fused):
    for package in ("sklearn", "matplotlib", "rich", "ml_dtypes"):
        pytest.importorskip(package)
    from bnfast._cli import demo, digits

    data = digits.load()
    kept, accuracies = [], []
    for dtype, kind in (("float32", None), ("bfloat16", fused)):

        def normalize(channels, kind=kind):
            layer = bnfast.BatchNorm(channels, axis=-1, **demo.FUSED[kind])
            return digits.Normalization(layer)

        network = digits.Network(0, normalize, fused=kind is not None, dtype=_dtypes.named(dtype))
        list(network.train(data, epochs=5, batch_size=64, learning_rate=0.5, seed=0))
        accuracies.append(network.accuracy(data))
        kept.append(network.kept_bytes(data.images[:64]))
    assert accuracies[0] > 0.95
    assert abs(accuracies[1] - accuracies[0]) <= 0.01
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize(
    ("option", "called"), [("--fused", "ReLU in one pass"), ("--in-place", "leaky ReLU in place")]
)
def test_the_demo_names_and_compares_what_it_fuses(tmp_path, monkeypatch, option, called):
    for package in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(package)
    monkeypatch.setenv("COLUMNS", "120")  # so that the table breaks no line
    done = run("demo", option, "--epochs", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert called in done.stdout
    difference = float(re.search(r"at most\s+([\d.e-]+)\s+of the largest", done.stdout)[1])
    assert difference < 1e-4


def test_demo_trains_prints_and_plots(tmp_path):
    for package in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(package)
    done = run("demo", "--output", "plot.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "plot.png") in done.stdout
    accuracies = [float(number) for number in re.findall(r"([\d.]+)%", done.stdout)]
    with_evaluation, with_training, without = accuracies
    assert with_evaluation >= 97
    assert with_training >= 97
    assert without < with_evaluation
    assert re.search(r"bnfast [\d.]+ s, plain NumPy formulas\s+[\d.]+\s+s", done.stdout)


def test_demo_says_what_is_missing(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('no matplotlib here')")
    done = run("demo", cwd=tmp_path)
    assert done.returncode == 1
    assert "python -m pip install scikit-learn matplotlib rich" in done.stderr
    assert "Traceback" not in done.stderr
