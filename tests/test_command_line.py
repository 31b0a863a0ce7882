"""``python -m bnfast``, as a user calls it."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import bnfast
from bnfast import _cli, _dtypes
from bnfast._cli import outputs


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


def test_info_as_json_is_the_configuration():
    config = json.loads(run("info", "--json").stdout)
    expected = bnfast.show_config(mode="dicts")
    assert list(config) == list(expected)
    for name in ("bnfast", "build", "instruction sets", "caches"):
        assert config[name] == expected[name]


def test_version():
    assert run("--version").stdout.strip() == f"bnfast {bnfast.__version__}"


def test_without_a_command_the_help_lists_all(capsys):
    assert _cli.main([]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert all(f"\n  {name} " in said.out for name in _cli.COMMANDS)
    with pytest.raises(SystemExit) as end:
        _cli.main(["--help"])
    assert end.value.code == 0
    assert capsys.readouterr() == said


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("/usr/local/bin/bnfast", "bnfast"),
        ("C:/Scripts/bnfast.exe", "bnfast"),
        ("/lib/bnfast/__main__.py", "python -m bnfast"),
    ],
)
def test_the_help_and_messages_name_what_was_called(called, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [called, "demo", "--epoch", "0"])
    assert _cli.main() == 2
    assert capsys.readouterr().err.startswith(f"{name} demo: argument --epochs: ")
    for arguments in (["--help"], ["info", "--help"]):
        with pytest.raises(SystemExit):
            _cli.main(arguments)
        assert capsys.readouterr().out.startswith(" ".join(["usage:", name, *arguments[:-1], ""]))


def test_the_script_is_the_package():
    pyproject = Path(__file__).parent.parent / "pyproject.toml"
    if not pyproject.is_file():
        pytest.skip("an installation has no pyproject.toml")
    assert 'bnfast = "bnfast.__main__:run"' in pyproject.read_text(encoding="utf-8").splitlines()
    code = "import sys; sys.argv[:1] = ['bnfast']; from bnfast.__main__ import run; sys.exit(run())"
    done = subprocess.run([sys.executable, "-c", code, "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("bnfast: argument COMMAND: ")


@pytest.mark.parametrize("command", [None, *_cli.COMMANDS])
def test_help_imports_nothing_that_is_slow(command):
    code = (
        "import sys; before = set(sys.modules); from bnfast._cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    arguments = ["--help"] if command is None else [command, "--help"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.splitlines()[-1].split())
    assert {"argparse", "bnfast"} <= imported
    slow = {
        "matplotlib",
        "rich",
        "sklearn",
        "scipy",
        "torch",
        "onnx",
        "onnxruntime",
        "jax",
        "numba",
    }
    assert not imported & slow


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonsense",), "argument COMMAND: expected one of info, demo, stats, fold"),
        (("bnech",), "got 'bnech'; did you mean 'bench'?"),
        (("--verison",), "unknown option '--verison'; did you mean '--version'?"),
        (("info", "--jsno"), "unknown option '--jsno'; did you mean '--json'?"),
        (("info", "--xyzzy"), "unknown option '--xyzzy'; see python -m bnfast info --help"),
        (("demo", "--nope"), "unknown option '--nope'; see python -m bnfast demo --help"),
        (("info", "more"), "unexpected argument 'more'; see python -m bnfast info --help"),
        (("info", "-x"), "unexpected argument '-x'; see python -m bnfast info --help"),
        # Unknown options are told before what is missing for want of them.
        (("fold", "m.onnx", "--outptu=x"), "unknown option '--outptu'; did you mean '--output'?"),
        (("demo", "--epochs", "many"), "--epochs: expected an integer above 0, got 'many'"),
        (("demo", "--epochs", "0"), "--epochs: expected an integer above 0, got '0'"),
        (("demo", "--seed", "-1"), "--seed: expected an integer of at least 0, got '-1'"),
        (("demo", "--learning-rate", "0"), "expected a finite number above 0, got '0'"),
        (("demo", "--learning-rate", "inf"), "expected a finite number above 0, got 'inf'"),
        (("demo", "--dtype", "flaot32"), "got 'flaot32'; did you mean 'float32'?"),
        (("demo", "--fused", "--in-place"), "--in-place: not allowed with argument --fused"),
        (("demo", "--output", "p.xyz"), "expected a name that ends in .png, got 'p.xyz'"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(arguments, message, capsys):
    assert _cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    command = arguments[:1] if arguments[0] in _cli.COMMANDS else ()
    assert line.startswith(f"{' '.join(('python -m bnfast', *command))}: ") and message in line


def test_the_process_ends_with_the_status_of_bad_arguments():
    done = run("nonsense")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


SCRIPT = "import sys; sys.argv[:1] = ['/bin/bnfast']; from bnfast.__main__ import run; run()"


@pytest.mark.parametrize(
    ("program", "name"),
    [
        (["-m", "bnfast", "info"], "python -m bnfast"),
        (["-Bmbnfast", "info", "--json"], "python -m bnfast"),
        (["-m", "bnfast"], "python -m bnfast"),
        (["-c", SCRIPT, "info"], "bnfast"),
    ],
)
@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("BNFAST_ISA", "sse2", "BNFAST_ISA=sse2, but this build has only: "),
        ("BNFAST_NUM_THREADS", "0", "BNFAST_NUM_THREADS must be a positive integer, got '0'"),
    ],
)
def test_a_wrong_variable_is_told_in_one_sentence(program, name, variable, value, message):
    done = subprocess.run(
        [sys.executable, *program],
        env={**os.environ, variable: value},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{name}: {message}")


def test_a_wrong_variable_is_an_import_error_in_other_programs(tmp_path):
    (tmp_path / "other.py").write_text("try: import bnfast\nexcept ImportError as e: print(e)")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("import other")  # while argv[0] is "-m"
    (tmp_path / "package" / "__main__.py").touch()
    for program in (["other.py"], ["-m", "package"], ["-m", "package", "bnfast"]):
        done = subprocess.run(
            [sys.executable, *program],
            env={**os.environ, "BNFAST_ISA": "sse2"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("BNFAST_ISA=sse2, but this build has only: ")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_ctrl_c_ends_it_in_one_line(tmp_path):
    # It waits where it opens what nobody writes to.
    os.mkfifo(tmp_path / "pipe.npy")
    child = subprocess.Popen(
        [sys.executable, "-m", "bnfast", "stats", str(tmp_path / "pipe.npy"), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Shells have what runs beside them ignore it.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    with child:
        # As soon as this opens, the other side has; then it waits for bytes.
        with open(tmp_path / "pipe.npy", "wb"):
            child.send_signal(signal.SIGINT)
            printed = child.communicate(timeout=600)
    assert printed == ("", "interrupted\n")
    assert child.returncode == -signal.SIGINT  # what shells call 130


def test_outputs_are_files_in_folders_that_may_be_written(tmp_path, monkeypatch, capsys):
    def refused(path):
        assert _cli.main(["demo", "--output", str(path)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix(f"python -m bnfast demo: {path}")

    folder = tmp_path / "no" / "folder"
    assert refused(folder / "p.png") == f": the folder {folder} does not exist"
    (tmp_path / "folder.png").mkdir()
    assert refused(tmp_path / "folder.png") == ": expected a file to write to, got a folder"
    (tmp_path / "p.png").touch()
    assert refused(tmp_path / "p.png") == " exists, and is not written over without --force"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert refused(tmp_path / "q.png") == ": cannot be written: no permission"


def test_pipes_and_devices_have_nothing_to_lose(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes with names")
    os.mkfifo(tmp_path / "pipe")
    outputs.check_output(tmp_path / "pipe", force=False)


def test_names_of_its_own_choice_count_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("plot.png", "plot_2.png", "plot_3.png"):
        path = outputs.free_name("plot.png")
        assert path == Path(expected)
        path.touch()


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


class Trained(NamedTuple):
    accuracy: float
    kept_bytes: int
    activations: set  # the types of what normalizations took and gave
    parameters: set  # their types


@functools.cache
def trained(dtype, **of_layers):
    """The network of the demo after some epochs, with batch norm of such arguments."""
    from bnfast._cli import digits

    seen = set()

    class Watched(digits.Normalization):
        def forward(self, x):
            y = super().forward(x)
            seen.update((x.dtype.name, y.dtype.name))
            return y

        def backward(self, dy):
            dx = super().backward(dy)
            seen.update((dy.dtype.name, dx.dtype.name))
            return dx

    def normalize(channels):
        return Watched(bnfast.BatchNorm(channels, axis=-1, **of_layers))

    data = digits.load()
    network = digits.Network(0, normalize, fused=bool(of_layers), dtype=_dtypes.named(dtype))
    list(network.train(data, epochs=5, batch_size=64, learning_rate=0.5, seed=0))
    parameters = [pair for stage in network.stages for pair in stage.parameters()]
    return Trained(
        network.accuracy(data),
        network.kept_bytes(data.images[:64]),
        seen,
        {array.dtype.name for pair in parameters for array in pair},
    )


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_the_network_of_the_demo_is_as_accurate_with_activations_of_16_bits(half):
    for package in ("sklearn", "ml_dtypes"):
        pytest.importorskip(package)
    wide, narrow = trained("float32"), trained(half)
    assert (wide.activations, narrow.activations) == ({"float32"}, {half})
    assert wide.parameters == narrow.parameters == {"float32"}
    assert wide.accuracy > 0.95
    assert abs(narrow.accuracy - wide.accuracy) <= 0.01


def test_the_demo_says_which_type_its_activations_have(tmp_path):
    for package in ("sklearn", "matplotlib", "rich", "ml_dtypes"):
        pytest.importorskip(package)
    done = run("demo", "--dtype", "bfloat16", "--epochs", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "activations of bfloat16" in " ".join(done.stdout.split())
    assert os.listdir(tmp_path) == ["bnfast_demo.png"]
    difference = float(re.search(r"at most\s+([\d.e-]+)\s+of the largest", done.stdout)[1])
    assert 1e-4 < difference <= 2.0**-7  # a step of the type


@pytest.mark.parametrize("fused", ["fused", "inplace"])
def test_the_network_of_the_demo_is_as_accurate_fused_and_in_place(fused):
    for package in ("sklearn", "matplotlib", "rich", "ml_dtypes"):
        pytest.importorskip(package)
    from bnfast._cli import demo

    plain, narrow = trained("float32"), trained("bfloat16", **demo.FUSED[fused])
    assert plain.accuracy > 0.95
    assert abs(narrow.accuracy - plain.accuracy) <= 0.01
    assert narrow.kept_bytes < 0.5 * plain.kept_bytes


@pytest.mark.parametrize(
    ("option", "called"), [("--fused", "ReLU in one pass"), ("--in-place", "leaky ReLU in place")]
)
def test_the_demo_names_and_compares_what_it_fuses(tmp_path, monkeypatch, option, called):
    for package in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(package)
    monkeypatch.setenv("COLUMNS", "120")  # so that the table breaks no line
    (tmp_path / "bnfast_demo.png").write_text("that of an earlier run")
    done = run("demo", option, "--epochs", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert called in done.stdout
    assert str(tmp_path / "bnfast_demo_2.png") in done.stdout
    assert (tmp_path / "bnfast_demo_2.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "bnfast_demo.png").read_text() == "that of an earlier run"
    difference = float(re.search(r"at most\s+([\d.e-]+)\s+of the largest", done.stdout)[1])
    assert difference < 1e-4


def test_demo_trains_prints_and_plots(tmp_path):
    for package in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(package)
    (tmp_path / "plot.png").touch()
    done = run("demo", "--output", "plot.png", "--force", cwd=tmp_path)
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
    assert done.stderr == (
        "python -m bnfast demo: needs scikit-learn, matplotlib and rich (no matplotlib here): "
        'python -m pip install "bnfast[demo]"\n'
    )
