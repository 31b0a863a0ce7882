"""The README's numbers are those of the measured tables of docs, and its losses are called so."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
if not (ROOT / "README.md").is_file():
    pytest.skip("these are tests of a clone or an sdist", allow_module_level=True)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def table(page, marker):
    """Return the headings and the cells of the first table between two markers of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    part = text.partition(f"<!-- {marker}: begin -->")[2].partition(f"<!-- {marker}: end -->")[0]
    lines = re.search(r"(?:^\|.*\|\n)+", part, re.MULTILINE)[0].splitlines()
    headings, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    return headings, rows


def numbers(page, marker, column, only=""):
    """Return what a column has: its last numbers, without errors and marks."""
    headings, rows = table(page, marker)
    number = column if isinstance(column, int) else headings.index(column)
    cells = [row[number].partition(" (")[0] for row in rows if only in row or not only]
    return [float(re.findall(r"[\d.]+", cell)[-1]) for cell in cells]


@pytest.mark.parametrize(
    ("shown", "page", "marker", "column", "only"),
    [
        (
            "[{:.0f} to {:.0f}](docs/statistics.md",
            "docs/statistics.md",
            "speed",
            "times as fast",
            "",
        ),
        (
            "[{:.1f} to {:.1f}](docs/benchmark.md",
            "docs/benchmark.md",
            "tables",
            "NumPy",
            "training",
        ),
        ("[{:.1f} to {:.1f}; its norm", "docs/keras.md", "models", 4, ""),
        ("its normalizations {:.1f} to {:.1f}](docs/keras.md", "docs/keras.md", "models", 7, ""),
        ("[{:.2f} to {:.2f}](docs/pytorch.md", "docs/pytorch.md", "networks", "whole step", ""),
    ],
)
def test_each_factor_is_that_of_a_measured_table(shown, page, marker, column, only):
    measured = numbers(page, marker, column, only)
    assert shown.format(min(measured), max(measured)) in README


def test_a_loss_is_called_one_and_nothing_else_is():
    headings, rows = table("README.md", "table")
    cells = [cell for row in rows for cell in row[2 : headings.index("bnfast is slower in")]]
    ratios = {cell: float(re.search(r"\d+\.\d+", cell)[0]) for cell in cells if cell != "—"}
    assert {cell for cell, ratio in ratios.items() if ratio < 1} == {
        cell for cell in cells if "bnfast is slower" in cell
    }


def test_the_losses_of_each_line_make_up_those_of_the_whole():
    headings, rows = table("README.md", "table")
    counts = [row[headings.index("bnfast is slower in")].split(" of ") for row in rows]
    lost, compared = (sum(map(int, column)) for column in zip(*counts, strict=True))
    assert f"[{lost} of {compared} comparisons]" in README
    assert f"In {lost} of {compared} comparisons" in (ROOT / "docs/benchmark.md").read_text("utf-8")
