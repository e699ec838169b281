"""Fixtures with a run whose figures can be computed by hand, and whose texts contain markup."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from persyn.db.catalog import Prompt, Run, RunState, Teacher
from persyn.db.connect import Database
from persyn.db.results import Response, Score
from persyn.db.results import RouterScore as RouterScoreRow
from persyn.report import document, drawing, figures, gather
from persyn.report.drawing import Picture
from persyn.report.facts import Report
from tests.factories import MadeRun, make_assignment, make_job, make_response, make_router, make_run

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
#: Each attempts an injection: into HTML, SVG, Markdown or a terminal.
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</pre></details></article><h1>mine</h1>",
    "</text></svg><iframe src='//x'></iframe>",
    "{{ 7 * 7 }}{% raw %}",
    "```\n# mine\n````\n<b>bold</b>",
    "| a | b |\n| --- | --- |\n\\| \\\\| c |",
    "[link](javascript:alert(1)) ![i](//x) <//x.y> https://x.y www.x.y `code` *em* _em_ ~~s~~ &lt; $x^2$",
    "- item\n1. one\n> quote\n# head\n===\n---",
    "\x1b[31mred\x07 \u202eright-to-left \u2066 \u2028 id='figure_1' url(#x)",
)
#: Quality of teachers a and b on two calibration and four hold-out prompts, and nats per token.
QUALITY = [(1, 0), (1, 0), (1, 0), (1, 0), (0, 1), (0, 1)]
LEARNABILITY = (-2.0, -1.0)
#: Router scores; the last hold-out prompt is misrouted.
ROUTER = [(1, 0), (1, 0), (2, 0), (1, 0), (-1, 3), (5, 0)]
TOKENS = (10, 20)


@dataclass(frozen=True, slots=True)
class Store:
    """An open store, its run, and the run's facts."""

    database: Database
    made: MadeRun
    report: Report


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """The run on each kind of database, read-only."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('report') / 'persyn.db'}"
    else:
        url = request.getfixturevalue("postgres").create("report", template="migrated")
    yield from _store(url)


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Report]:
    """The facts of the run, from one kind of database."""
    for store in _store(f"sqlite:///{tmp_path_factory.mktemp('facts') / 'persyn.db'}"):
        yield store.report


@pytest.fixture(scope="session")
def pictures(report: Report) -> list[Picture]:
    """All figures of the run."""
    return figures.pictures(report)


@pytest.fixture(scope="session")
def drawn(pictures: list[Picture]) -> dict[str, str]:
    """The figures as SVG, by name."""
    return {picture.name: drawing.svg(picture) for picture in pictures}


@pytest.fixture(scope="session")
def html(report: Report, pictures: list[Picture]) -> str:
    """The HTML report of the run."""
    return document.html(report, pictures)


def _store(url: str) -> Iterator[Store]:
    database = Database(url)
    if url.startswith("sqlite"):
        database.upgrade()
    with database.write() as session:
        made = _make(session)
    with database.read() as session:
        report = gather.gather(session, session.get_one(Run, made.id))
    yield Store(database, made, report)
    database.close()


def _make(session: Session) -> MadeRun:
    """Create eight prompts, six of them in a scored grid, a router, prices, and two jobs."""
    made = make_run(session, prompts=8, calibration=2, holdout=4, stage="generate")
    for teacher_id, name in zip(made.teacher_ids, HOSTILE, strict=False):
        # Run files cannot contain such names, but direct writes to the store can.
        session.execute(update(Teacher).where(Teacher.id == teacher_id).values(name=name))
    run = session.get_one(Run, made.id)
    run.router_id = make_router(session, made, backbone=HOSTILE[0], metrics={"versions": {"torch": HOSTILE[7]}})
    run.state = RunState.DONE
    for number, prompt_id in enumerate(made.prompt_ids):
        text, topic = HOSTILE[number % len(HOSTILE)], HOSTILE[2 + number % 2]
        values = {"text": f"{number}: {text}", "meta": {'no "path"': "x", "topic": topic, "n": number}}
        session.execute(update(Prompt).where(Prompt.id == prompt_id).values(values))
    for number, quality in enumerate(QUALITY):
        _cell(session, run, made, number, quality)
    for prompt_id, k in zip(made.prompt_ids, (0, 0, 0, 0, 1, 1, 0, 1), strict=True):
        make_assignment(session, made.id, prompt_id, made.teacher_ids[k], margin=0.2)
    make_response(session, made.prompt_ids[6], made.teacher_ids[0], HOSTILE[5], response_tokens=10, prompt_tokens=100)
    make_response(session, made.prompt_ids[7], made.teacher_ids[1], None, failure=f"refused: {HOSTILE[0]}")
    session.execute(update(Response).values(job_id=_jobs(session, made)))
    session.execute(update(Teacher).values(price_in=1.0, price_out=10.0, license=HOSTILE[6]))
    return made


def _cell(session: Session, run: Run, made: MadeRun, number: int, quality: tuple[int, int]) -> None:
    prompt_id = made.prompt_ids[number]
    for k, teacher_id in enumerate(made.teacher_ids):
        text = f"{HOSTILE[(number + k) % len(HOSTILE)]} by {k}"
        counts = {"response_tokens": TOKENS[k], "prompt_tokens": 100}
        reasoned = {} if k else {"reasoning": f"{text}, or not", "reasoning_tokens": 4}
        response_id = make_response(session, prompt_id, teacher_id, text, **counts, **reasoned)
        likelihood = {"value": 5 * LEARNABILITY[k], "n_tokens": 5}
        session.add_all(
            [
                Score(response_id=response_id, scorer_id=run.quality_scorer_id, value=quality[k], detail={}),
                Score(response_id=response_id, scorer_id=run.learnability_scorer_id, detail={}, **likelihood),
                RouterScoreRow(
                    router_id=run.router_id, prompt_id=prompt_id, teacher_id=teacher_id, score=ROUTER[number][k]
                ),
            ]
        )


def _jobs(session: Session, made: MadeRun) -> int:
    """Create a job of ten rows over a hundred seconds and one over their second half; return the first id."""
    ended = {"state": "done", "n_prompts": 10, "finished_at": NOON + timedelta(seconds=100)}
    first = make_job(session, made.id, started_at=NOON, **ended)
    make_job(session, made.id, started_at=NOON + timedelta(seconds=50), **ended)
    return first
