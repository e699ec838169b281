"""The documentation site is complete, equal to the pages on a code host, and self-contained."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from playwright.sync_api import Browser

from docs import hooks

PAGES = {
    **{page.relative_to(hooks.ROOT / "docs").as_posix(): page for page in (hooks.ROOT / "docs").rglob("*.md")},
    **{uri: hooks.ROOT / place for place, uri in hooks.ELSEWHERE.items()},
}
#: The elements of a page that contain its text.
ELEMENTS = re.compile(r"<(h\d|p|ul|ol|li|table|tr|th|td|pre|code|em|strong|img)\b")


def build(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(site)],
        cwd=source,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    done = build(hooks.ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


def article(site: Path, uri: str) -> str:
    """The content of a page, without navigation."""
    page = (site / uri).with_suffix(".html").read_text()
    return page[page.index("<article") : page.index("</article>")]


@pytest.mark.parametrize("uri", sorted(PAGES))
def test_a_page_has_the_same_parts_as_on_a_code_host(site: Path, uri: str) -> None:
    # Formulas are rendered differently, so they are left out on both sides.
    source = re.sub(r"^```math\n.*?^```\n", "", PAGES[uri].read_text(), flags=re.DOTALL | re.MULTILINE)
    there = MarkdownIt().enable("table").render(source)
    assert Counter(ELEMENTS.findall(article(site, uri))) == Counter(ELEMENTS.findall(there))


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        taken = re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=\"?((?:https?:)?//[^\s\">]+)", page.read_text()
        )
        assert not taken, page


def test_formulas_are_drawn_without_a_script(site: Path) -> None:
    method = article(site, "method.md")
    assert method.count('display="block"') == (hooks.ROOT / "docs/method.md").read_text().count("```math")
    assert "<mfrac>" in method
    assert not re.search(r"\$|\\\(|\\\[", method)


def test_links_out_of_the_documentation_hold(site: Path) -> None:
    assert 'href="studies/real_grids.html"' in article(site, "method.md")
    assert 'href="../adr/0017-preferences-are-weighted.html"' in article(site, "studies/real_grids.md")
    assert 'href="run-file.html#fake"' in article(site, "contributing.md")
    assert re.search(r"are in\s+<code>deploy/</code>;", article(site, "operations.md")), "what is not there is no link"


def test_a_fault_stops_the_build_and_is_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("docs", "studies", "deploy"):
        shutil.copytree(hooks.ROOT / name, source / name)
    for name in ("mkdocs.yml", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(hooks.ROOT / name, source)
    faults = "[a](gone.md) [b](../gone.md) [c](store.md#gone) [d](/store.md) $\\gone$\n"
    (source / "docs/report.md").write_text(f"# Report\n\n{faults}")
    (source / "docs/lost.md").write_text("# In no navigation\n")

    done = build(source, tmp_path / "site")

    assert done.returncode == 1
    for named in ("'gone.md'", "'../gone.md'", "'store.md#gone'", "'/store.md'", "\\gone", "lost.md"):
        assert named in done.stderr
    assert done.stderr.count("WARNING") == 6, "and nothing else is"


def test_it_is_read_and_searched_from_a_folder(site: Path, browser: Browser) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844})
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: pytest.fail(str(error)))

    for uri in ("index", "method", "store", "run-file", "tutorial"):
        page.goto(f"{(site / uri).as_uri()}.html")
        assert page.evaluate("document.documentElement.scrollWidth") == 390, f"{uri} is wider than a phone"
    page.set_viewport_size({"width": 1280, "height": 900})
    page.locator("input[name=query]").click()
    page.keyboard.type("poison prompt", delay=20)
    page.locator(".md-search-result__link", has_text="Glossary").first.wait_for()

    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)
    context.close()
