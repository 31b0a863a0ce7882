"""What several files say of a release is the same in each: its version, its Pythons, its NumPy."""

import re
from pathlib import Path

import pytest

import bnfast

ROOT = Path(__file__).parent.parent
if not (ROOT / "CITATION.cff").is_file():
    pytest.skip("these are tests of a clone or an sdist", allow_module_level=True)


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def found(pattern, name):
    """Return what the only match of a pattern in a file captures."""
    matches = re.findall(pattern, text_of(name), re.MULTILINE)
    assert len(matches) == 1, f"{name} has {len(matches)} of {pattern}"
    return matches[0]


def ci():
    if not (ROOT / ".ci" / "run").is_file():
        pytest.skip("an sdist has no .ci")
    return ".ci/run"


def pythons():
    classifiers = re.findall(
        r'^    "Programming Language :: Python :: (3\.\d+)",$',
        text_of("pyproject.toml"),
        re.MULTILINE,
    )
    assert classifiers
    return classifiers


def oldest_numpy():
    return found(r'^dependencies = \["numpy>=([\d.]+)"\]$', "pyproject.toml")


def test_the_next_release_has_one_version_and_one_date():
    version = bnfast.__version__.partition(".dev")[0]
    assert found(r"^version: (.*)$", "CITATION.cff") == version
    latest, date = re.search(
        r"^## \[(.*?)\] - (.*)$", text_of("CHANGELOG.md"), re.MULTILINE
    ).groups()
    assert latest == version
    if date != "unreleased":
        assert found(r"^date-released: (.*)$", "CITATION.cff") == date


def test_the_citation_has_what_its_format_requires():
    assert found(r"^cff-version: (.*)$", "CITATION.cff") == "1.2.0"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found(r"^date-released: (.*)$", "CITATION.cff"))
    for key in ("message", "title", "authors", "license"):
        found(rf"^{key}:(.*)$", "CITATION.cff")


def test_the_pages_name_the_pythons_of_the_package():
    first, *_, last = pythons()
    assert found(r'^requires-python = ">=(.*)"$', "pyproject.toml") == first
    assert found(r"^\| Python \| (.*) \|$", "docs/policy.md").split(", ") == pythons()
    assert f"Python {first} to {last}" in text_of("README.md")


def test_ci_tests_the_pythons_of_the_package():
    cases = found(r'^    case "\$version" in (.*?)\) ;; \*\)', ci())
    assert cases.split(" | ") == pythons()


def test_the_oldest_numpy_is_the_one_that_ci_tests():
    assert found(r"^\| NumPy \| (.*) and later \|$", "docs/policy.md") == oldest_numpy()
    assert found(r'"numpy==(.*?)\.\*"', ci()) == oldest_numpy()
