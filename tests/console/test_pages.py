"""What each page says of a store whose every figure is known."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from urllib.parse import quote
from xml.etree import ElementTree

import pytest
from sqlalchemy import func, select, update

from console.pages import number
from persyn.db import Base
from persyn.db.catalog import Run, RunState, Teacher
from persyn.db.connect import Database
from persyn.db.results import Response, Score
from persyn.db.work import Event, Job, JobState
from tests.console.conftest import Filled, client
from tests.console.stores import MadeStore, fill, named
from tests.factories import make_config, make_response

INLINE = {"a", "bdi", "strong", "span", "time", "code"}


class Read(HTMLParser):
    """A page's text without tags and spare blanks, its links, and the tags and attributes it is made of."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.links: dict[str, str] = {}
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str | None]] = set()
        self._href: str | None = None
        self.feed(html)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(attrs)
        self.words.append("" if tag in INLINE else " ")
        if tag == "a":
            self._href = dict(attrs)["href"]

    def handle_endtag(self, tag: str) -> None:
        self._href = None if tag == "a" else self._href
        self.words.append("" if tag in INLINE else " ")

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self._href is not None:
            self.links[data.strip()] = self._href


def rows(html: str) -> list[str]:
    """The rows of a page's tables, each as a line."""
    return [Read(row).text for row in re.findall(r"<tr.*?</tr>", html, re.S)]


def ids(html: str) -> list[int]:
    return [int(number) for number in re.findall(r"/prompts/(\d+)\"", html)]


def test_the_first_page_lists_runs_the_newest_first(filled: Filled) -> None:
    html = filled.console.get("/").text
    _, failed, maths = rows(html)
    assert failed.startswith("failed failed stage calibrate, job 9: no memory calibrate student 10 ")
    assert maths.startswith("maths running generate student 8 ")
    assert re.search(r"\d\d:\d\d:\d\d UTC", maths)


def test_a_run_says_how_far_it_is_who_works_and_what_came_out(database: Database) -> None:
    made = fill(database)
    html = client(database).get("/runs/maths").text
    found = rows(html)
    # 6 of 8 assigned prompts are over, 1 of them failed.
    assert any(row.startswith("generate 6 75% 8 5 1 2 ") for row in found)
    # ada wrote 1 text and 1 failure in the 10 s that the stage goes on: 0.2 a second, so the other 2 take 10 s.
    (pace,) = (re.fullmatch(r"ada (0\.\d+) (0\.\d+)", row) for row in found if re.match(r"ada 0\.", row))
    assert pace is not None
    assert float(pace[1]) == pytest.approx(0.2, rel=0.3)
    assert any(re.match(rf"vm:417 {made.running_job} ada 3 1\d s (5\d s|1 min)", row) for row in found)
    assert "1 job to be tried again after: bob fell over" in Read(html).text
    # Shares of 8: ada has 4 calibration prompts and 3 targets. Tokens: 4 x 10 + 4.
    assert any(row.startswith("ada 7 88% 7 1.000 \u22122.000 0.600 44") for row in found)
    assert any(row.startswith("bob 1 12% 1 0.000 \u22121.000 0.400 40") for row in found)
    assert "router 0.750 1.000 0.600 0.100" in found
    # All teachers on all prompts: (10 + 10) x 8.
    assert "84 tokens written of about 160 that all teachers would have written (52%)" in Read(html).text
    # On both hold-out prompts ada has 0.6 and bob 0.4, and the router chooses ada.
    assert any(row.startswith("persyn 0.600 0.60 to 0.60") for row in found)
    assert 'data-live="2.0"' in html


def test_a_run_says_what_it_costs_and_in_which_unit_it_measures(database: Database) -> None:
    made = fill(database)
    with database.write() as session:
        for teacher_id, price in zip(made.run.teacher_ids, (1e4, 2e4), strict=True):
            teacher = session.get_one(Teacher, teacher_id)
            teacher.price_in, teacher.price_out = 0.0, price
        session.execute(update(Response).values(prompt_tokens=1))
        run = session.get_one(Run, made.run.id)
        run.config = make_config("maths", ("ada", "bob"), learnability_per="character").frozen()
    text = Read(client(database).get("/runs/maths").text).text
    assert "learnability (nats per character)" in text
    # A hundredth of a dollar for each of ada's 44 tokens, two for each of bob's 40; of all 8 prompts 80 and 80.
    assert "1.24 dollars of about 2.4 (52%)." in text


def test_a_page_that_is_held_does_not_look_again(filled: Filled) -> None:
    html = filled.console.get("/runs/maths?live=off").text
    assert "data-live" not in html
    assert "Go on looking" in html


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("text=4+plus", [4]),
        ("text=WHAT+IS+5", [5]),
        ("text=q-6", [6]),
        ("text=%25", []),
        ("text=_", []),
        ("text=%5C", []),
        ("text=/", []),
        ("text='%3B+drop+table+prompts%3B--", []),
        ("role=holdout", [2, 3]),
        ("teacher=bob", [7]),
        ("teacher=bob&role=holdout", []),
        ("reason=router", [4, 5, 6, 7]),
        ("standing=answered", [0, 1, 2, 3, 4]),
        ("standing=failed", [5]),
        ("standing=waiting", [6, 7]),
        ("standing=unassigned", []),
        ("failure=any", [5]),
        ("failure=too_long", [5]),
        ("failure=refused", []),
        ("margin_from=0.2&margin_to=0.5", [0, 1, 2, 3, 4]),
        ("order=margin&reason=router", [6, 7, 4, 5]),
    ],
)
def test_prompts_are_searched_filtered_and_sorted(filled: Filled, query: str, wanted: list[int]) -> None:
    html = filled.console.get(f"/runs/maths/prompts?{query}").text
    assert ids(html) == [filled.made.run.prompt_ids[number] for number in wanted]


@pytest.mark.parametrize(
    ("query", "is_filtered"), [("", False), ("text=&role=&margin_from=", False), ("role=target", True)]
)
def test_all_prompts_are_offered_where_some_are_shown(filled: Filled, query: str, is_filtered: bool) -> None:
    assert ("all prompts" in Read(filled.get(f"/runs/maths/prompts?{query}")).links) == is_filtered


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((None, "\u2013"), (float("nan"), "\u2013"), (1234567, "1,234,567"), (12345.6, "12,346"), (9999.9, "10,000")),
        *((0.123456, "0.1235"), (-1.5, "\u22121.5"), (0.00001234, "1.234e\u221205"), (float("inf"), "inf")),
    ],
)
def test_numbers_are_short_and_readable(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_a_search_for_a_percent_sign_finds_it_and_nothing_else(database: Database) -> None:
    made = fill(database, lambda text: text.replace("What is 3", "How much is 3% of 50_000 \\"))
    console = client(database)
    for text in ("3%", "50_0", "\\", "how MUCH"):
        assert ids(console.get(f"/runs/maths/prompts?text={quote(text)}").text) == [made.run.prompt_ids[3]]


@pytest.mark.parametrize("order", ["id", "margin"])
def test_page_after_page_comes_to_every_prompt_once(
    filled: Filled, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """Four of them have the same margin: the place of a page is not the margin alone."""
    monkeypatch.setattr("console.prompts._PAGE", 3)
    seen, at = [], f"/runs/maths/prompts?order={order}"
    for _ in range(3):
        html = filled.get(at)
        seen += ids(html)
        at = Read(html).links.get("next page", "")
    assert at == ""
    assert sorted(seen) == filled.made.run.prompt_ids


@pytest.mark.parametrize(
    "query",
    [
        *("role=nobody", "after=x", "after=-1", f"after={2**63}", f"after={'9' * 5000}", "margin_from=x", "order=1"),
        *("after=1&margin=x", f"text={'x' * 30_000}"),
    ],
)
def test_what_cannot_be_asked_is_said_so(filled: Filled, query: str) -> None:
    answer = filled.console.get(f"/runs/maths/prompts?{query}")
    assert answer.status_code == 400
    assert "given was" in answer.text


def test_a_prompt_is_shown_with_scores_responses_and_events(filled: Filled) -> None:
    html = filled.console.get(f"/runs/maths/prompts/{filled.made.run.prompt_ids[0]}").text
    text, found = Read(html).text, rows(html)
    assert "given to ada, reason calibration, score 0.6, margin 0.2" in text
    assert "reference answer 0" in text
    assert "meta topic sums" in text
    assert "system Be brief. user What is 0 plus 0?" in text
    assert "ada 1.500 0.000 chosen: calibration" in found
    assert "bob \u22120.250 1.750" in found
    # Likelihoods of -4 and -2 over 2 tokens.
    assert "ada chosen It is 1.0. reward 0.6 quality 1 learnability \u22122 tokens 10" in text
    assert "bob It is 0.0. reward 0.4 quality 0 learnability \u22121 tokens 10" in text
    assert any(row.startswith("ada log_likelihood \u22124 2") for row in found)
    assert "maths calibration ada yes \u2013 \u2013" in found
    assert "vm:7" in text
    assert any(row.endswith('done me@desk {"why": "it is over"}') for row in found)


def test_a_response_that_failed_says_why(filled: Filled) -> None:
    assert (
        "failed: too_long: 9,213 tokens"
        in Read(filled.console.get(f"/runs/maths/prompts/{filled.made.run.prompt_ids[5]}").text).text
    )


@pytest.mark.parametrize(
    "path",
    [
        *("/runs/nope", "/runs/nope/prompts", "/runs/maths/x", "/runs/maths/prompts/999999", "/runs/maths/prompts/x"),
        *(f"/runs/maths/prompts/{2**63}", f"/runs/maths/prompts/{'9' * 5000}"),
    ],
)
def test_what_is_not_there_is_said_so(filled: Filled, path: str) -> None:
    assert filled.console.get(path).status_code == 404


@pytest.mark.parametrize(
    "path", ["/runs/%00", "/runs/maths/prompts?text=%00", "/runs/maths/prompts?failure=a%00b", "/sql?query=%00"]
)
def test_a_nul_character_is_in_no_address(filled: Filled, path: str) -> None:
    answer = filled.console.get(path)
    assert answer.status_code == 400
    assert "NUL" in answer.text


def test_failures_are_grouped_by_reason_and_lead_to_their_prompts(filled: Filled) -> None:
    console = filled.console
    html = console.get("/runs/maths/failures").text
    assert any(row.startswith("generate too_long 1 prompts") for row in rows(html))
    assert ids(console.get("/runs/maths/prompts?failure=too_long").text) == [filled.made.run.prompt_ids[5]]
    found = rows(console.get("/runs/failed/failures").text)
    assert found[1].startswith("calibrate failed no memory 2 ")
    assert found[2].startswith("calibrate failed no disk 1 ")


def test_what_failed_for_another_run_is_no_failure_of_this_one(database: Database) -> None:
    """Responses are shared by runs: bob failed at a prompt that is ada's here, and a score of her answer elsewhere."""
    made = fill(database)
    with database.write() as session:
        target, ada, bob = made.run.prompt_ids[4], *made.run.teacher_ids
        make_response(session, target, bob, None, failure="refused")
        answer = select(Response.id).where(Response.prompt_id == target, Response.teacher_id == ada)
        session.add(Score(response_id=session.scalars(answer).one(), scorer_id=1, failure="timeout", detail={}))
        assert session.get_one(Run, made.run.id).quality_scorer_id == 1
        in_grid = session.scalars(select(Score).order_by(Score.response_id).limit(1)).one()
        in_grid.value, in_grid.failure = None, "not_finite: nan"
    console = client(database)
    assert "refused" not in console.get("/runs/maths/failures").text
    for failure in ("refused", "timeout"):
        assert ids(console.get(f"/runs/maths/prompts?failure={failure}").text) == []
    first, sixth = made.run.prompt_ids[0], made.run.prompt_ids[5]
    assert ids(console.get("/runs/maths/prompts?failure=not_finite").text) == [first]
    assert ids(console.get("/runs/maths/prompts?failure=any").text) == [first, sixth]


def secret(html: str) -> str:
    found = re.search(r'name="form_secret" value="([^"]+)"', html)
    assert found is not None
    return found[1]


def states(database: Database) -> set[JobState]:
    with database.read() as session:
        jobs = select(Job.state).join(Run, Run.id == Job.run_id).where(Run.name == "failed")
        return set(session.scalars(jobs))


def test_with_admin_failed_jobs_are_tried_again_in_that_persons_name_and_else_nothing(database: Database) -> None:
    fill(database)
    console = client(database, admin="me@desk")
    form = {"form_secret": secret(console.get("/runs/failed/failures").text)}
    for forged in ({}, {"form_secret": ""}, {"form_secret": "x"}, {"form_secret": "\u00e9"}):
        assert console.post("/runs/failed/retry", data=forged).status_code == 403
    without = client(database, form_secret=form["form_secret"])
    assert without.post("/runs/failed/retry", data=form).status_code == 403
    assert "<form" not in without.get("/runs/failed/failures").text
    assert states(database) == {JobState.FAILED}

    answer = console.post("/runs/failed/retry", data=form, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/runs/failed")
    assert states(database) == {JobState.QUEUED}
    with database.write() as session:
        last = session.scalars(select(Event).order_by(Event.id.desc()).limit(1)).one()
        assert (last.actor, last.to_state) == ("me@desk", "running")
        session.scalars(select(Run).where(Run.name == "failed")).one().state = RunState.DONE
    # A run that is done has nothing to try again.
    assert console.post("/runs/failed/retry", data=form).status_code == 409


def test_with_admin_rows_that_failed_for_a_reason_are_asked_again(database: Database) -> None:
    fill(database)
    console = client(database, admin="me@desk")
    with database.write() as session:
        run = session.scalars(select(Run).where(Run.name == "maths")).one()
        run.state = RunState.FAILED
        failed = session.scalars(select(Response).where(Response.failure.is_not(None))).one()
        failed_id, reason = failed.id, str(failed.failure).partition(":")[0]
        score = session.scalars(select(Score).where(Score.scorer_id == run.quality_scorer_id).limit(1)).one()
        score.value, score.failure = None, "crashed: it ended twice"
    shown = console.get("/runs/maths/failures").text
    assert f'name="rows" value="{reason}"' in shown
    # It has learned from its grid, and asks none of that again.
    assert "<bdi>crashed</bdi>" in shown
    assert 'value="crashed"' not in shown
    assert 'name="rows"' not in client(database).get("/runs/maths/failures").text
    form = {"form_secret": secret(shown)}

    assert console.post("/runs/maths/retry", data={**form, "rows": "no_such"}).status_code == 409
    assert console.post("/runs/maths/retry", data={**form, "rows": reason}, follow_redirects=False).status_code == 303

    with database.read() as session:
        assert session.get(Response, failed_id) is None
        assert session.scalars(select(Run.state).where(Run.name == "maths")).one() is RunState.RUNNING
    # One that is at work has no such button, and takes no such form.
    assert 'name="rows"' not in console.get("/runs/maths/failures").text
    assert console.post("/runs/maths/retry", data={**form, "rows": reason}).status_code == 409


def pages(made: MadeStore) -> list[str]:
    name, failed = quote(made.name, safe=""), quote(made.failed, safe="")
    hostile = "&".join(f"{key}={quote(HOSTILE)}" for key in ("text", "teacher", "reason", "failure"))
    return [
        "/",
        f"/runs/{name}",
        f"/runs/{name}/prompts",
        f"/runs/{name}/prompts?{hostile}",
        *(f"/runs/{name}/prompts/{prompt_id}" for prompt_id in made.run.prompt_ids),
        f"/runs/{name}/failures",
        f"/runs/{failed}",
        f"/runs/{failed}/failures",
        f"/sql?query={quote('select text, meta from prompts')}",
        f"/sql?query={quote(HOSTILE)}",
        f"/runs/{quote(named(HOSTILE))}",
        f"/runs/{name}/prompts?role={quote(HOSTILE)}",
    ]


def test_looking_changes_nothing(filled: Filled) -> None:
    def count() -> dict[str, int]:
        with filled.database.read() as session:
            tables = Base.metadata.sorted_tables
            return {table.name: session.scalars(select(func.count()).select_from(table)).one() for table in tables}

    before, console = count(), filled.console
    assert {console.get(path).status_code for path in pages(filled.made)} == {200, 400, 404}
    assert console.get("/runs/failed/retry").status_code == 405
    assert count() == before
    assert states(filled.database) == {JobState.FAILED}


HOSTILE = (
    """"'><xss-probe data-probe=1 onload=alert(1)></xss-probe><script>alert(1)<\\/script><!-- {{ 1111*1111 }} &amp;"""
)


def test_no_text_of_the_store_becomes_markup(database: Database) -> None:
    """Names, prompts, responses, metadata, reasons, errors, workers: each with an attack behind it, on every page."""
    made = fill(database, lambda text: f"{text} {HOSTILE}")
    console, shown, figures = client(database, admin=f"me {HOSTILE}"), 0, set[str | None]()
    for path in pages(made):
        html = console.get(path).text
        page = Read(html)
        assert "xss-probe" not in page.tags
        assert not {name for name, _ in page.attributes} & {"data-probe", "onload"}
        assert html.count("<script") == 1  # our own
        assert "1234321" not in page.text
        assert all((value or "/").startswith(("/", "#", "?")) for name, value in page.attributes if name == "href")
        shown += "xss-probe" in page.text
        figures |= {value for name, value in page.attributes if name == "src" and ".svg" in (value or "")}
    assert shown == len(pages(made))
    assert len(figures) > 5
    for figure in figures:
        root = ElementTree.fromstring(console.get(figure or "").text)
        assert not [one for one in root.iter() if "probe" in one.tag or "script" in one.tag]
        assert not {name for one in root.iter() for name in one.attrib} & {"onload", "data-probe"}


def test_the_figures_are_those_of_the_report_and_tell_what_is_seen(filled: Filled) -> None:
    page = Read(filled.get("/runs/maths"))
    assert ("alt", "Of 8 prompts: ada 88%, bob 12%.") in page.attributes
    sources = [value or "" for name, value in page.attributes if name == "src" and value and ".svg" in value]
    assert any(source.startswith("/runs/maths/figures/teacher-shares.svg?v=") for source in sources)
    for source in sources:
        answer = filled.console.get(source)
        assert answer.headers["content-type"] == "image/svg+xml"
        assert "script-src" not in answer.headers["content-security-policy"]
        assert ElementTree.fromstring(answer.text).tag.endswith("svg")
    assert filled.console.get("/runs/maths/figures/nothing.svg").status_code == 404
