"""The pages in Markdown: links lead somewhere, Python runs, CI runs the README's commands."""

import functools
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = (
    sorted(ROOT.glob("*.md"))
    + sorted(ROOT.glob("docs/*.md"))
    + sorted(ROOT.glob("docs/api/*.md"))
    + sorted(ROOT.glob("docs/site/*.md"))
    + sorted(ROOT.glob("benchmarks/*.md"))
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```([^`\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
IMPORTED = re.compile(r"^(?:import|from) (?:bnfast\.integrations\.)?(\w+)", re.MULTILINE)
HAS_PICTURES = (ROOT / "docs" / "figures").is_dir()  # an sdist has none
COMMAND = re.compile(r"^    (python .*?)(?:  +#.*)?$", re.MULTILINE)


def name_of(page):
    return str(page.relative_to(ROOT))


def anchors(page):
    """What GitHub makes of the headings of a page."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page, text):
    broken = []
    for link in LINK.findall(FENCED.sub("", text)):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        if path.endswith(".png") and not HAS_PICTURES:
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def code_of(page):
    blocks = FENCED.findall(page.read_text(encoding="utf-8"))
    return [code for language, code in blocks if language == "python"]


BLOCKS = [(page, code) for page in PAGES for code in code_of(page)]

# Each block has names and a folder of its own.
RUN = """
import json, os, sys, tempfile, traceback
errors = []
for code in json.load(sys.stdin):
    os.chdir(tempfile.mkdtemp(dir=sys.argv[1]))
    try:
        exec(code, {"__name__": "__main__"})
        errors.append(None)
    except BaseException:
        errors.append(traceback.format_exc())
with open(os.path.join(sys.argv[1], "errors"), "w") as file:
    json.dump(errors, file)
"""


def missing(code):
    """The packages of its imports that are not installed."""
    return [name for name in IMPORTED.findall(code) if importlib.util.find_spec(name) is None]


@functools.cache
def errors_of(page):
    """What became of each block of a page for which all is installed, or None where it ran.

    In one process: frameworks take seconds to import.
    """
    blocks = [code for code in code_of(page) if not missing(code)]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", RUN, folder],
            input=json.dumps(blocks),
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        errors = json.loads((Path(folder) / "errors").read_text())
    return dict(zip(blocks, errors, strict=True))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_and_anchor_exists(page):
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_a_broken_link_is_found():
    links = ["docs/nothing.md", "docs/numerics.md#nothing", "docs/numerics.md#range", "#nothing"]
    text = " ".join(f"[text]({link})" for link in links)
    assert broken_links(ROOT / "README.md", text) == [links[0], links[1], links[3]]


@pytest.mark.parametrize(
    ("page", "code"), BLOCKS, ids=[f"{name_of(page)}-{len(code)}" for page, code in BLOCKS]
)
def test_python_in_pages_runs(page, code):
    if missing(code):
        pytest.skip(f"{', '.join(missing(code))} not installed")
    error = errors_of(page)[code]
    assert error is None, error


def test_the_readme_has_python():
    assert code_of(ROOT / "README.md")


def test_ci_runs_the_commands_of_the_readme():
    ci = ROOT / ".ci" / "run"
    if not ci.is_file():
        pytest.skip("an sdist has no .ci")
    commands = COMMAND.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    parts = [part for command in commands for part in command.split(" && ")]
    assert "python -m bnfast demo" in parts and "python -m pytest" in parts
    # Each installation builds bnfast: one without extras, and one for all that is tried.
    assert sum("pip install" in part for part in parts) == 2
    # CI installs a plain clone in `fresh`.
    script = ci.read_text(encoding="utf-8")
    elsewhere = {"python -m pip install .": 'fresh "${pythons[0]}" .\n'}
    for part in parts:
        assert elsewhere.get(part, part) in script
