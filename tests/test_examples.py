"""The scripts of examples/, as a user calls them, and the page that one of them makes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT, PAGE = ROOT / "examples" / "choosing.py", ROOT / "docs" / "choosing.md"
TABLE = re.compile(r"<!-- (\S+): begin -->\n(.*?)\n<!-- \1: end -->", re.DOTALL)
PICTURES = {"batch-size.png", "order.png", "scale-and-rate.png"}


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


def test_the_page_has_pictures_and_tables_of_a_full_run():
    committed = PAGE.read_text()
    for picture in PICTURES:
        assert f"](figures/{picture})" in committed
        assert (PAGE.parent / "figures" / picture).is_file()
    tables = dict(TABLE.findall(committed))
    assert set(tables) == {"batch-size", "scale-and-rate", "order", "costs"}
    assert "| 2 | 4 | 8 | 16 | 32 | 64 | 128 | 256 |" in tables["batch-size"]
