"""The documentation as a site: ``ci/docs``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import fastres

ROOT = Path(__file__).parents[1]
#: Where links to files that are not pages go.
REPOSITORY = "https://github.com/fastres/fastres/blob/main/"
#: Pages that are files of the repository's first folder.
PAGES = {"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}

project = "fastres"
author = copyright = "the fastres developers"
release = version = fastres.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.mermaid"]
exclude_patterns = ["_build"]

myst_heading_anchors = 3

autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = "fastres"
html_static_path = ["_static", "site.css"]
html_css_files = ["site.css"]
# ci/docs puts it there; without it, browsers get it from a network.
if (ROOT / "docs" / "_static" / "mermaid").exists():
    mermaid_use_local = "mermaid/mermaid.esm.min.mjs"
mermaid_height = "auto"


def setup(app: Any) -> None:
    app.connect("source-read", read)


def read(app: Any, name: str, source: list[str]) -> None:
    """Links of a page as the site has them."""
    path = ROOT / "docs" / f"{name}.md"
    if name in PAGES:
        path = ROOT / PAGES[name]
        source[0] = path.read_text("utf-8")
    source[0] = re.sub(
        r"\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)", lambda link: target(path, link), source[0]
    )


def target(page: Path, link: re.Match[str]) -> str:
    """A link to another page, or to the repository."""
    file, anchor = (page.parent / link[1]).resolve(), link[2] or ""
    if file.parent == ROOT / "docs" and file.suffix == ".md":
        return f"]({file.name}{anchor})"
    for name, path in PAGES.items():
        if file == ROOT / path:
            return f"]({name}.md{anchor})"
    if file.suffix in (".svg", ".png"):
        return link[0]
    return f"]({REPOSITORY}{file.relative_to(ROOT)}{anchor})"
