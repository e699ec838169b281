"""What the site needs beyond the pages of this folder, for MkDocs: pages from elsewhere, their links, and formulas."""

from __future__ import annotations

import html
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml import converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_log = logging.getLogger("mkdocs.hooks")

ROOT = Path(__file__).parent.parent

#: Where a page from outside docs/ stands in the repository: where in the site. Those of docs/ keep their place.
ELSEWHERE = {
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    **{f"studies/{page.name}": f"studies/{page.name}" for page in sorted((ROOT / "studies").glob("*.md"))},
}
_AT_HOME = {uri: place for place, uri in ELSEWHERE.items()}

#: A link's text, its place and its anchor; a picture is one too.
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s:#]+)(#[^()\s]*)?\)")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Have each `*` of the navigation name the pages it stands for."""
    here = {path.relative_to(config.docs_dir).as_posix() for path in Path(config.docs_dir).rglob("*.md")}
    config.nav = _named(config.nav, sorted(here | set(ELSEWHERE.values())))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take in the pages from outside docs/."""
    for place, uri in ELSEWHERE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / place)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have links that hold in the repository hold in the site."""
    return _LINK.sub(lambda link: _in_site(link, page.file.src_uri, files), markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Draw formulas as MathML, which a browser needs no script for."""
    return _FORMULA.sub(_drawn, content)


def _named(nav: Any, pages: list[str]) -> Any:
    """Part of a navigation, with the pages that patterns stand for in their place."""
    if isinstance(nav, dict):
        return {title: _named(part, pages) for title, part in nav.items()}
    if not isinstance(nav, list):
        return nav
    named: list[Any] = []
    for part in nav:
        if isinstance(part, str) and "*" in part:
            named += [page for page in pages if Path(page).match(part)]
        else:
            named.append(_named(part, pages))
    return named


def _in_site(link: re.Match[str], uri: str, files: Files) -> str:
    """A link of the page at `uri`; what is in the repository and not in the site keeps its text alone."""
    text, target, anchor = link[1], link[2], link[3] or ""
    place = posixpath.normpath(posixpath.join(posixpath.dirname(_AT_HOME.get(uri, f"docs/{uri}")), target))
    aim = ELSEWHERE.get(place, place.removeprefix("docs/"))
    if files.get_file_from_path(aim):
        return f"[{text}]({posixpath.relpath(aim, posixpath.dirname(uri) or '.')}{anchor})"
    return text if (ROOT / place).exists() else link[0]


def _drawn(formula: re.Match[str]) -> str:
    drawn = converter.convert(html.unescape(formula[2]), display="block" if formula[1] == "div" else "inline")
    if "\\" in drawn:
        _log.warning("A formula has a command that is not known: %s", formula[2])
    return drawn
