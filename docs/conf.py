"""How Sphinx makes a site of the pages of this folder.

    python -m pip install ".[docs]"
    python -m sphinx -W --keep-going -b html docs docs/_build/html

The pages are read in the repository, too. `README.md` is the map of both readings: each of its
headings becomes a caption of the site's navigation, each of its bullets a page.
"""

import importlib
import inspect
import pkgutil
import re
from functools import partial
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

from docutils import nodes
from sphinx import addnodes
from sphinx.ext.autodoc.mock import mock
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective
from sphinx.util.inspect import stringify_signature

import bnfast
from bnfast import _cli, integrations

DOCS = Path(__file__).parent
ROOT = DOCS.parent

project = "bnfast"
author = "bnfast developers"
project_copyright = author
version = release = bnfast.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc", "myst_parser"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build", "README.md"]
templates_path = ["_templates"]
default_role = "py:obj"
highlight_language = "text"
nitpicky = True
nitpick_ignore_regex = [("py:obj", "[a-z_]+")]  # parameters, which are no targets

myst_heading_anchors = 4  # named as in the repository

autodoc_typehints = "none"  # numpydoc's sections say more
autodoc_member_order = "bysource"
numpydoc_show_class_members = False  # the template of classes shows them

html_theme = "furo"
html_title = f"bnfast {release}"
html_static_path = ["_static"]
html_css_files = ["bnfast.css"]
html_copy_source = False
html_show_sphinx = False

# Pages that lie elsewhere in the repository, and the pages of the site that include them.
INCLUDED = {
    "README.md": "site/start.md",
    "docs/README.md": "index.md",
    "benchmarks/README.md": "site/measuring.md",
    "examples": "site/examples.md",
    "CHANGELOG.md": "site/changelog.md",
    "CONTRIBUTING.md": "site/contributing.md",
    "SECURITY.md": "site/security.md",
    "CODE_OF_CONDUCT.md": "site/conduct.md",
}
CODE_OR_LINK = re.compile(r"^```.*?^```$|`[^`]+`|\]\((?P<link>[^)\s]+)\)", re.DOTALL | re.MULTILINE)
BULLET = re.compile(r"^- \[[^\]]+\]\(([^)#\s]+)\)", re.MULTILINE)

# The libraries of `bnfast.integrations`, which need not be there: stand-ins do.
PEERS = ["autograd", "dask", "keras", "onnx", "scipy", "sklearn", "thinc", "torch"]


def import_integrations():
    """Import the modules of `bnfast.integrations` with stand-ins for the libraries."""
    with mock(PEERS):
        import keras.config
        import thinc.layers
        import torch

        # What the modules look at while they are imported.
        keras.config.backend = lambda: "numpy"
        thinc.layers.layernorm = SimpleNamespace(forward=lambda model, X, is_train: None)
        torch.Tensor = type("Tensor", (), {})
        for module in pkgutil.iter_modules(integrations.__path__):
            importlib.import_module(f"bnfast.integrations.{module.name}")


def in_site(link, page):
    """Return where a link of a page of the repository leads in the site, from the folder docs."""
    path, hash_sign, anchor = link.partition("#")
    if not path or "://" in link or link.startswith("mailto:"):
        return link
    target = (page.parent / path).resolve().relative_to(ROOT).as_posix()
    if target in INCLUDED:
        target = f"docs/{INCLUDED[target]}"
    elif target.startswith("examples/"):
        target, hash_sign = f"docs/{INCLUDED['examples']}", "#"
        anchor = PurePosixPath(path).name.replace(".", "")
    path = target.removeprefix("docs/") if target.startswith("docs/") else f"../{target}"
    return f"/{path}{hash_sign}{anchor}"


def lead_links_into_the_site(text, page):
    """Return the text of a page with its links, but not what looks like links in its code."""

    def led(match):
        link = match["link"]
        return f"]({in_site(link, page)})" if link else match[0]

    return CODE_OR_LINK.sub(led, text)


def read_source(app, docname, content):
    """Of a page of the site."""
    page = Path(app.env.doc2path(docname))
    if page.suffix == ".md":
        content[0] = lead_links_into_the_site(content[0], page)


def read_included(app, path, docname, content):
    """Of a page that another one includes."""
    content[0] = lead_links_into_the_site(content[0], (DOCS / path).resolve())


def signature_of_class(app, what, name, thing, options, signature, returned):
    """Return what a class is called with, where autodoc shows what its ``__new__`` ignores."""
    if what == "class":
        parameters = inspect.signature(thing).parameters.values()
        shown = inspect.Signature([one for one in parameters if not one.name.startswith("_")])
        signature = stringify_signature(shown, show_annotation=False)
        signature = re.sub(r"<class '([\w.]+)'>", r"\1", signature)
    return signature, returned


def leave_out_fields(app, what, name, thing, skip, options):
    """Skip the fields of named tuples, which the docstring of the class describes."""
    return True if type(thing).__name__ == "_tuplegetter" else None


def escape_initials(app, what, name, thing, options, lines):
    """Keep "Y. Wu, K. He, 2018", and symbols such as "T.", from being items of a list."""
    lines[:] = [re.sub(r"^(\s*[A-Z])\.(?= |$)", r"\1\\.", line) for line in lines]


class LinksToReference(SphinxTransform):
    """Names of bnfast in the text of a guide lead to the reference.

    Pages of other libraries, which have some of the same names, say ``bnfast.`` before bnfast's.
    """

    default_priority = 100
    of_others = (
        *("api/", "site/"),
        *("autograd", "data_sets", "from_frameworks", "keras", "onnx", "pytorch"),
    )

    def apply(self, **_):
        """Wrap literals that are names into references."""
        page = self.env.docname
        for literal in list(self.document.findall(nodes.literal)):
            text = literal.astext().removesuffix("()")
            name = text.removeprefix("bnfast.")
            if name not in bnfast.__all__ or (name == text and page.startswith(self.of_others)):
                continue
            node = literal
            while isinstance(node, nodes.literal | nodes.inline):
                node = node.parent
            if isinstance(node, nodes.reference | addnodes.pending_xref | nodes.title):
                continue
            reference = addnodes.pending_xref(
                "",
                literal.deepcopy(),
                refdomain="py",
                reftype="obj",
                reftarget=f"bnfast.{name}",
                refexplicit=True,
                refdoc=page,
                refwarn=True,
            )
            literal.replace_self(reference)


class Navigation(SphinxDirective):
    """The navigation of the site, from the headings and bullets of a page."""

    required_arguments = 1

    def run(self):
        """Return a hidden toctree for each heading."""
        _, path = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(path)
        parts = []
        for section in Path(path).read_text(encoding="utf-8").split("\n## ")[1:]:
            caption, _, text = section.partition("\n")
            pages = [in_site(link, Path(path)) for link in BULLET.findall(text)]
            parts += ["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""]
        return self.parse_text_to_nodes("\n".join(parts))


class Commands(SphinxDirective):
    """The commands of ``python -m bnfast``, as their ``--help`` describes them."""

    def run(self):
        """Return a section for each command."""
        sections = []
        for name in _cli.COMMANDS:
            _, parser = _cli.command(name)
            parser.prog = f"python -m bnfast {name}"
            parser.formatter_class = partial(parser.formatter_class, width=80)
            section = nodes.section(ids=[name], names=[name])
            section += nodes.title(text=name)
            section += nodes.literal_block(text=parser.format_help(), language="text")
            self.state.document.note_explicit_target(section)
            sections.append(section)
        return sections


def setup(app):
    """Make all of the above known to Sphinx."""
    import_integrations()
    app.connect("source-read", read_source)
    app.connect("include-read", read_included)
    app.connect("autodoc-process-signature", signature_of_class)
    app.connect("autodoc-process-docstring", escape_initials, priority=600)  # after numpydoc
    app.connect("autodoc-skip-member", leave_out_fields)
    app.add_transform(LinksToReference)
    app.add_directive("navigation", Navigation)
    app.add_directive("commands", Commands)
