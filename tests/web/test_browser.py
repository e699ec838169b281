"""The console in a real browser: scripts, keyboard use, small screens and dark mode."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from persyn.db.connect import Database
from persyn.web.safety import Access
from tests import chromium
from tests.factories import make_response
from tests.web.stores import MadeStore, fill, named
from tests.web.test_pages import pages

HOSTILE = """'"><img src=x onerror="window.probe=1"><script>window.probe=1</script><a href="javascript:probe=1">x</a>"""


@dataclass(frozen=True, slots=True)
class Site:
    """A served console and the content of its store."""

    address: str
    database: Database
    made: MadeStore

    @property
    def run(self) -> str:
        """The URL of its run."""
        return f"{self.address}{pages(self.made)[1]}"

    def paths(self) -> list[str]:
        """One path of each kind of page."""
        found = pages(self.made)
        return [*found[:5], *found[-5:-3], found[-1]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    store = Database(f"sqlite:///{tmp_path_factory.mktemp('site')}/persyn.db")
    store.upgrade()
    made = fill(store, lambda text: f"{text} {HOSTILE}")
    with chromium.console(store, Access(admin="me@desk")) as address:
        yield Site(address, store, made)
    store.close()


@pytest.fixture
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A separate window, configured with `window(...)`. Errors reported by the browser fail the test."""
    marker = request.node.get_closest_marker("window")
    context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **(marker.kwargs if marker else {})})
    errors: list[str] = []
    opened = context.new_page()
    opened.on("console", lambda said: errors.append(said.text) if said.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("dialog", lambda dialog: errors.append(f"dialog: {dialog.message}"))
    yield opened
    context.close()
    # The browser reports every missing page and rejected request.
    assert [error for error in errors if "status of 40" not in error] == []


def test_nothing_of_the_store_runs_and_nothing_is_asked_of_elsewhere(site: Site, page: Page) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(site.run)
    page.locator("main img").first.wait_for(state="attached", timeout=60_000)  # drawn in the background
    for path in site.paths():
        page.goto(site.address + path)
        assert page.evaluate("window.probe") is None
        assert page.locator("main img:not([src^='/runs/']), main script").count() == 0
        assert re.search("onerror|onload", page.locator("main").inner_text())
    assert {url.startswith(f"{site.address}/") for url in asked} == {True}


def test_what_would_become_markup_all_the_same_could_not_run(site: Site, browser: Browser) -> None:
    """The content security policy is the second barrier: unescaped markup would not be executed."""
    page = browser.new_page()
    page.goto(site.address)
    refused = page.evaluate(
        """() => new Promise((resolve) => {
            document.addEventListener("securitypolicyviolation", (event) => resolve(event.effectiveDirective));
            document.body.insertAdjacentHTML("beforeend", '<b onclick="window.probe=1">x</b>');
            document.querySelector("b").click();
        })"""
    )
    assert refused.startswith("script-src")
    assert page.evaluate("window.probe") is None
    page.close()


def test_a_keyboard_reaches_everything_and_shows_where_it_is(site: Site, page: Page) -> None:
    page.goto(f"{site.run}/prompts")
    page.keyboard.press("Tab")
    skip = page.locator("a.skip")
    assert skip.evaluate("element => element === document.activeElement && element.getBoundingClientRect().left >= 0")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"

    wanted = page.locator("main :is(a, button, input, select, [tabindex='0'])").count()
    reached = 0
    for _ in range(wanted):
        page.keyboard.press("Tab")
        style = page.evaluate(
            "(({outlineStyle, outlineWidth}) => [outlineStyle, outlineWidth])(getComputedStyle(document.activeElement))"
        )
        assert style == ["solid", "3px"]
        reached += page.evaluate("document.activeElement.closest('main') !== null")
    assert reached == wanted


def test_a_search_needs_no_mouse(site: Site, page: Page) -> None:
    page.goto(f"{site.run}/prompts")
    page.get_by_label("Text, or id").focus()
    page.keyboard.type("4 plus 4")
    page.keyboard.press("Enter")
    page.wait_for_url("**text=4+plus+4**")
    assert page.locator("tbody tr").count() == 1
    page.locator("tbody a").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/prompts/{site.made.run.prompt_ids[4]}")


@pytest.mark.parametrize("width", [pytest.param(380, id="phone"), pytest.param(600, id="twice as large")])
def test_only_tables_scroll_sideways(site: Site, page: Page, width: int) -> None:
    """A window of 1,200 pixels at 200% zoom has 600."""
    page.set_viewport_size({"width": width, "height": 800})
    for path in site.paths():
        page.goto(site.address + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path


@pytest.mark.window(viewport={"width": 380, "height": 800})
def test_on_a_phone_a_row_is_a_card_that_shows_every_figure_whole(site: Site, page: Page) -> None:
    page.goto(site.address)
    boxes = page.locator(".cards")
    assert boxes.count() == 1
    assert boxes.first.evaluate("box => box.scrollWidth <= box.clientWidth")
    reward = page.locator("tbody tr").nth(1).locator("td[data-label=reward]")
    assert reward.inner_text() == "0.600"
    assert reward.evaluate("cell => getComputedStyle(cell, '::before').content") == '"reward"'


@pytest.mark.window(viewport={"width": 380, "height": 800})
def test_on_a_phone_a_long_answer_stays_within_the_window(site: Site, page: Page) -> None:
    long = "select 1 as n, replace(hex(zeroblob(3000)), '00', 'word ') as text union all select 2, 'short'"
    page.goto(f"{site.address}/sql?query={quote(long)}")
    height = page.get_by_role("region", name="Answer").evaluate("box => box.getBoundingClientRect().height")
    assert 0 < height <= 600


def brightness(page: Page, of: str) -> float:
    """The brightness of a colour of the body, 0 to 255."""
    numbers: list[int] = page.evaluate(f"getComputedStyle(document.body).{of}.match(/\\d+/g).map(Number)")
    return sum(numbers[:3]) / 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_dark_where_the_system_is_and_everybody_can_read_it(site: Site, page: Page, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    page.goto(site.run)
    assert (brightness(page, "backgroundColor") < brightness(page, "color")) == (scheme == "dark")
    for path in site.paths():
        page.goto(site.address + path)
        found = Axe().run(page).response["violations"]
        assert [
            (path, rule["id"], node["html"], node["failureSummary"])
            for rule in found
            if rule["impact"] in ("serious", "critical")
            for node in rule["nodes"]
        ] == []


def test_a_page_that_is_open_follows_the_run_and_leaves_the_reader_alone(site: Site, page: Page) -> None:
    page.goto(site.run)
    done = page.locator("#now tbody tr", has_text="generate").locator("td.n").nth(1)
    before = int(done.inner_text())
    page.evaluate("document.querySelector('h1').dataset.here = 'still'; scrollTo(0, 100)")
    with site.database.write() as session:
        make_response(session, site.made.run.prompt_ids[6], site.made.run.teacher_ids[0], "Twelve.")
    page.wait_for_function(
        "wanted => document.querySelector('#now').innerText.includes(wanted)",
        arg=f"\t{before + 1}\t",
        timeout=20_000,
    )
    assert page.evaluate("document.querySelector('h1').dataset.here") == "still"
    assert page.evaluate("scrollY") == 100
    page.get_by_role("link", name="Pause").click()
    assert page.evaluate("document.body.dataset.live") is None


@pytest.mark.window(java_script_enabled=False)
def test_without_scripts_every_page_can_be_read(site: Site, page: Page) -> None:
    page.goto(site.run)
    assert page.locator("h1").inner_text() == f"Run {named(f'maths {HOSTILE}')}"
    assert page.locator("noscript meta[http-equiv=refresh]").count() or "refresh" in page.content()
    page.get_by_role("link", name="Prompts").click()
    assert page.locator("tbody tr").count() == 8
