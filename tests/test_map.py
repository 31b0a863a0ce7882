"""The map of CONTRIBUTING.md: every file that it names exists, and it names every module."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
if not all((ROOT / name).exists() for name in ("CONTRIBUTING.md", "src")):
    pytest.skip("these are tests of the source tree", allow_module_level=True)

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAP = TEXT[TEXT.index("## The map") :]
NAMED = re.compile(r"[\w./*<>]+\.(?:py|pyx|pxi|pxd|pyi|c|h|inc)\b")
PLACES = ("src", "tests", "benchmarks", "docs", "examples", "setup.py")
STEMS = {
    stem
    for line in MAP[: MAP.index("| to change | open |")].splitlines()
    for stem in re.findall(r"`(\w+)`", line.split("|")[1] if line.startswith("|") else "")
}
# Which have no row of their own: rivals are one row, and headers are beside what they declare.
UNNAMED = ("*/__init__.py", "*/__main__.py", "*/_version.py", "*/rivals/*.py", "*/variant_*.c")


def files():
    found = [path for place in PLACES for path in (ROOT / place).rglob("*")] + [ROOT / "setup.py"]
    return [path.relative_to(ROOT) for path in found if path.is_file()]


def is_named(path, name):
    """Whether a file is meant by a name, which may begin with any of its folders."""
    return path.match(re.sub(r"<\w+>", "*", name))


def test_every_file_that_the_map_names_exists():
    paths = files()
    names = set(NAMED.findall(MAP))
    assert len(names) > 100
    assert [name for name in names if not any(is_named(path, name) for path in paths)] == []


def test_the_map_names_every_module():
    names = {name for name in NAMED.findall(MAP) if not set("*<") & set(name)}
    lacking = [
        path.as_posix()
        for path in files()
        if path.parts[0] == "src" and path.suffix in (".py", ".pyx", ".pxi", ".c", ".inc")
        if path.stem not in STEMS and not any(path.match(pattern) for pattern in UNNAMED)
        if not any(is_named(path, name) for name in names)
    ]
    assert lacking == []


def test_stems_are_files_of_functions():
    assert "batch" in STEMS
    folder = ROOT / "src" / "bnfast" / "functional"
    assert {path.stem for path in folder.glob("[!_]*.py")} == STEMS
