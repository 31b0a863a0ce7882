"""The site of the documentation: its navigation has every page, and its reference every name."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SOURCE = ROOT / "src"
REFERENCE = sorted(DOCS.glob("api/*.md"))
if not (SOURCE.is_dir() and REFERENCE):
    pytest.skip("these are tests of the source tree", allow_module_level=True)

BULLET = re.compile(r"^- \[[^\]]+\]\(([^)#\s]+)\)", re.MULTILINE)
INCLUDED = re.compile(r"^```\{include\} (\S+)$", re.MULTILINE)
SHOWN = re.compile(r"^```\{literalinclude\} (\S+)$", re.MULTILINE)
OF_REFERENCE = re.compile(
    r"^\.\. currentmodule:: (?P<module>\S+)$"
    r"|^\.\. automodule:: (?P<whole>\S+)$"
    r"|^(?:   |\.\. py:data:: )(?P<name>\w+)$",
    re.MULTILINE,
)


def targets(page, pattern):
    return [(page.parent / link).resolve() for link in pattern.findall(page.read_text("utf-8"))]


@functools.cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8")).body


def origin(module, name):
    """The module that defines a name, and the name: found in the text, without an import."""
    path = SOURCE.joinpath(*module.split("."))
    for node in parsed(path / "__init__.py" if path.is_dir() else path.with_suffix(".py")):
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            # A package imports its submodules from itself.
            return (
                (f"{module}.{name}", None) if node.module == module else origin(node.module, name)
            )
    return module, name


def public_names():
    """The names in ``__all__`` of every public module."""
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if any(part.startswith("_") for part in parts):
            continue
        for node in parsed(path):
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                for name in ast.literal_eval(node.value):
                    yield ".".join(parts), name


def names_of_reference():
    found = []
    for page in REFERENCE:
        module = None
        for match in OF_REFERENCE.finditer(page.read_text(encoding="utf-8")):
            module = match["module"] or module
            if match["whole"]:
                found.append((match["whole"], None))
            elif match["name"]:
                found.append(origin(module, match["name"]))
    return found


def test_the_navigation_has_every_page_once():
    navigation = targets(DOCS / "README.md", BULLET)
    elsewhere = [path for page in DOCS.glob("site/*.md") for path in targets(page, INCLUDED)]
    pages = [*DOCS.glob("*.md"), *elsewhere, DOCS / "api/index.md", DOCS / "api/commands.md"]
    pages = set(pages) - {DOCS / "README.md", DOCS / "index.md"} | {ROOT / "examples"}
    assert sorted(navigation) == sorted(pages)


def test_the_index_of_the_reference_has_every_page_of_it_once():
    listed = re.findall(r"^(\w+)$", (DOCS / "api/index.md").read_text("utf-8"), re.MULTILINE)
    assert sorted([*listed, "index", "commands"]) == [page.stem for page in REFERENCE]


def test_the_site_shows_every_example():
    shown = targets(DOCS / "site/examples.md", SHOWN)
    assert sorted(shown) == sorted(ROOT.glob("examples/*.py"))


@pytest.mark.parametrize("module", sorted({module for module, _ in public_names()}))
def test_the_reference_has_every_public_name(module):
    public = {origin(module, name) for of, name in public_names() if of == module}
    assert public <= set(names_of_reference())


def test_the_reference_has_each_name_once():
    found = names_of_reference()
    assert sorted(found, key=str) == sorted(set(found), key=str)


def test_the_names_that_are_public_are_found():
    names = dict.fromkeys(public_names())
    assert ("bnfast", "batch_norm") in names and ("bnfast.integrations.dask", "moments") in names
    assert origin("bnfast", "batch_norm") == ("bnfast.functional.batch", "batch_norm")
    assert origin("bnfast", "folding") == ("bnfast.folding", None)
