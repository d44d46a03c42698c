"""How the documentation is built: `make docs`. Nothing is fetched, and every warning is an error."""

import re
import sys
from pathlib import Path
from typing import Any

from docutils.nodes import Element, Node
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import aiotracker

sys.path.insert(0, str(Path(__file__).parent))
from from_code import expanded

project = "aiotracker"
copyright = "2026, aiotracker contributors"
version = release = "0.1"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3
myst_enable_extensions = ["attrs_block", "colon_fence"]

# Single backticks of docstrings lead to what they name, where that is documented, and are code where it is not.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", "(?s).*"),
    ("py:.*", r"(?!aiotracker\b).*"),  # of other libraries, whose pages are not fetched
    ("py:.*", r".*\b_\w+(\..*)?"),  # of ours, for us alone
    ("py:.*", r".*\.[DRPT]"),  # type variables
]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

smartquotes = False  # would make one dash of the two before an option

html_theme = "furo"
html_title = "aiotracker"
html_copy_source = False
html_show_sphinx = False


def _public(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: Element) -> Node | None:
    """Leads what an annotation says, such as `aiotracker._core.task.Task`, to its public name."""
    target = str(node.get("reftarget", ""))
    name = target.rpartition(".")[2]
    if name not in aiotracker.__all__ or target == f"aiotracker.{name}":
        return None
    domain = env.domains.python_domain
    found: Any = domain.resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], f"aiotracker.{name}", node, content
    )
    return found  # type: ignore[no-any-return]  # docutils has no types


def _read(app: Sphinx, name: str, source: list[str]) -> None:
    source[0] = expanded(source[0])
    if name.endswith("/index"):  # lists pages in an order of its own, then all others
        pages = {page.stem for page in Path(app.srcdir, name).parent.glob("*.md")} - {"index"}
        others = sorted(pages - set(source[0].split()))
        source[0] = "\n".join([source[0].rstrip().removesuffix("```").rstrip(), *others, "```", ""])


_as_written: dict[str, list[str]] = {}  # docstrings of properties


def _keep(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    if what == "property" and "Raises:" not in lines:
        _as_written[name] = list(lines)


def _restore(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    # Napoleon takes what stands before the first colon for a type, which no docstring here means.
    if name in _as_written:
        lines[:] = _as_written[name]


def _outdated(app: Sphinx, env: BuildEnvironment, added: set[str], changed: set[str], removed: set[str]) -> list[str]:
    # What is made from the code is made each time: Sphinx sees only that the page itself has not changed.
    return [name for name in env.found_docs if "<!-- from code:" in Path(env.doc2path(name)).read_text()]


def _signature(
    app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    # Where there is a ParamSpec, which Sphinx cannot read, names would keep their modules and a tilde.
    if signature is not None and "~P" in signature:
        signature = re.sub(r"~(?:\w+\.)*~?", "", signature)
    return signature, returned


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", _signature)
    app.connect("env-get-outdated", _outdated)
    app.connect("source-read", _read)
    app.connect("autodoc-process-docstring", _keep, priority=400)  # before Napoleon's
    app.connect("autodoc-process-docstring", _restore, priority=600)  # ... and after it
    app.connect("missing-reference", _public)
