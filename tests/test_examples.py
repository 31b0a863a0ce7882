"""The programs of examples/, as a user calls them, and the program that makes docs/choosing.md."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES, PAGE = ROOT / "examples", ROOT / "docs" / "choosing.md"
SCRIPT = PAGE.parent / "make_choosing.py"
TABLE = re.compile(r"<!-- (\S+): begin -->\n(.*?)\n<!-- \1: end -->", re.DOTALL)
PICTURES = {"batch-size.png", "order.png", "scale-and-rate.png"}


def run_example(name, folder, *arguments):
    command = [sys.executable, EXAMPLES / f"{name}.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in folder.iterdir()} == set(arguments)  # it leaves nothing else
    return done.stdout


def largest_numbers(text):
    return [float(number) for number in re.findall(r"largest \w+:? (\S+)", text)]


def test_every_example_is_run_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "adapt_to_shift",
        "train",
        "train_sequences",
        "infer_in_place",
        "load_pytorch_state",
        "train_distributed",
    }


def test_train_learns_the_digits(tmp_path):
    pytest.importorskip("sklearn")
    accuracies = re.findall(r"epoch \d: ([\d.]+)%", run_example("train", tmp_path))
    assert float(accuracies[-1]) > 90


def test_train_sequences_gains_accuracy_by_lengths_and_memory_by_each_step_after(tmp_path):
    pytest.importorskip("ml_dtypes")
    text = run_example("train_sequences", tmp_path)
    padded, *right = map(float, re.findall(r"([\d.]+)% are right", text))
    assert len(right) == 4 and min(right) > padded + 3 and max(right) - min(right) < 3
    _, masked, fused, halves, checkpointed = map(float, re.findall(r"([\d.]+) MB", text))
    assert fused < 0.95 * masked and halves < 0.55 * fused and checkpointed < 0.55 * halves


def test_adapt_to_shift_recovers_most_of_the_accuracy(tmp_path):
    for package in ("sklearn", "matplotlib"):
        pytest.importorskip(package)
    text = run_example("adapt_to_shift", tmp_path, "drift.png")
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")
    clean, shifted, adapted, recalibrated = map(float, re.findall(r"([\d.]+)% of the test", text))
    assert clean > 95 and shifted < 40 and recalibrated > 85
    assert shifted + 30 < adapted < recalibrated + 5
    assert re.search(r"norm 1 .*\n    mean drifted in \d+ of 32 channels", text)


def test_infer_in_place_agrees_with_the_formula(tmp_path):
    errors = largest_numbers(run_example("infer_in_place", tmp_path))
    assert len(errors) == 2 and max(errors) < 2e-6


def test_load_pytorch_state_agrees_with_pytorch(tmp_path):
    pytest.importorskip("torch")
    text = run_example("load_pytorch_state", tmp_path)
    differences = largest_numbers(text)
    assert len(differences) == 2 and max(differences) < 1e-5
    assert "batches that both have seen: 3\n" in text


def test_training_on_two_ranks_is_that_of_one(tmp_path):
    pytest.importorskip("mpi4py")
    alone = run_example("train_distributed", tmp_path)
    mpiexec = shutil.which("mpiexec", path=Path(sys.executable).parent) or shutil.which("mpiexec")
    command = [mpiexec, "-n", "2", sys.executable, EXAMPLES / "train_distributed.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone
    assert float(alone.split()[-1]) < 0.1


def test_load_pytorch_state_says_so_without_pytorch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError\n")
    command = [sys.executable, EXAMPLES / "load_pytorch_state.py"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 1
    assert done.stderr == "PyTorch is not installed: nothing to load from\n"


def test_choosing_draws_its_pictures_and_fills_the_page(tmp_path):
    for package in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, SCRIPT, "--quick", "--output", "out", "--json", "numbers.json"],
        capture_output=True,
        text=True,
        timeout=600,  # a machine may be busy with other things
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    figures = list((tmp_path / "out" / "figures").iterdir())
    assert {path.name for path in figures} == PICTURES
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in figures)
    page = (tmp_path / "out" / PAGE.name).read_text()
    tables = dict(TABLE.findall(page))
    committed = PAGE.read_text()
    assert list(tables) == list(dict(TABLE.findall(committed)))
    assert TABLE.sub("", page) == TABLE.sub("", committed)  # the text is as it was
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert set(numbers) == set(tables)
    for member, accuracies in numbers["batch-size"].items():
        shown = [f"{100 * values[0]:.1f}" for values in accuracies]
        assert f"| {member} | {' | '.join(shown)} |" in tables["batch-size"]
        assert all(0 <= float(value) <= 100 for value in shown)
    assert numbers["batch-size"]["batch"][0][0] > 0.5
    assert re.search(r"\| batch \| [\d.]+ .s \(1\)", tables["costs"])


@pytest.mark.skipif(not (PAGE.parent / "figures").is_dir(), reason="an sdist has no pictures")
def test_the_page_has_its_pictures():
    assert {path.name for path in (PAGE.parent / "figures").glob("*.png")} == PICTURES


def test_the_page_shows_pictures_and_tables_of_a_full_run():
    committed = PAGE.read_text()
    for picture in PICTURES:
        assert f"](figures/{picture})" in committed
    tables = dict(TABLE.findall(committed))
    assert set(tables) == {"batch-size", "scale-and-rate", "order", "costs"}
    assert "| 2 | 4 | 8 | 16 | 32 | 64 | 128 | 256 |" in tables["batch-size"]
