"""The recipes of CONTRIBUTING.md: what is added as they say appears wherever its kind is listed.

Engines, scorers, strategies and formats are added in tests/test_plugins.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import Response

from persyn.analysis import audit, summary, watch
from persyn.db.catalog import Run
from persyn.db.connect import Database
from persyn.db.results import Response as StoredResponse
from persyn.report import figures, gather
from persyn.report.drawing import Picture
from persyn.runs import pipeline
from persyn.stages import generate
from persyn.stages.batch import Progress
from persyn.stages.registry import STAGES
from persyn.web import app, pages
from persyn.web.app import Page
from tests.factories import make_run
from tests.one_database import SQLITE
from tests.web.conftest import client


def _failures(run: Run) -> Any:
    return select(StoredResponse.failure).where(StoredResponse.failure.is_not(None))


def _progress(session: Session, run: Run) -> Progress:
    return Progress(total=7, done=4, failed=2)


@SQLITE
def test_a_stage_is_a_record_in_the_registry(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    review = replace(
        generate.STAGE, name="review", progress=_progress, expected=lambda session, run: 9, failures=_failures
    )
    monkeypatch.setitem(STAGES, "review", review)
    with database.write() as session:
        run_id = make_run(session, stage="review").id
    with database.read() as session:
        run = session.get_one(Run, run_id)
        assert list(pipeline.progress(session, run))[-1] == "review"
        assert str(watch.shortfalls(watch.count_rows(session, run))[-1]).startswith("review: 2 of 7 rows failed")
        assert any(finding.about == "stage review" and "9" in finding.found for finding in audit.audit(session, run))
        assert summary.facts(session, run).stages[-1].stage == "review"
        assert pipeline.needed(session, run) == ("generate", "review")


@SQLITE
def test_a_page_is_a_record(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    def show(request: Request) -> Response:
        return pages.page(request, "runs.html", runs=[], live=True)

    added = (*app.PAGES, Page("/news", show, "News"))
    monkeypatch.setattr(app, "PAGES", added)
    console = client(database)
    assert console.get("/news").status_code == 200
    assert '<a href="/news">News</a>' in console.get("/").text


@SQLITE
def test_a_figure_is_an_entry(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    with database.write() as session:
        run_id = make_run(session).id
    picture = Picture("news", "News", "Nothing new.", Figure())
    monkeypatch.setitem(figures.FIGURES, "news", lambda report: lambda: picture)
    with database.read() as session:
        report = gather.gather(session, session.get_one(Run, run_id))
    assert figures.pictures(report) == [picture]


def test_a_migration_is_written_by_alembic(tmp_path: Path) -> None:
    shutil.copytree("migrations", tmp_path / "migrations", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy("alembic.ini", tmp_path)
    where = {"PERSYN_DATABASE_URL": f"sqlite:///{tmp_path}/new.db", "PYTHONPATH": os.getcwd()}
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def alembic(*arguments: str) -> None:
        command = [sys.executable, "-m", "alembic", *arguments]
        environment = {**os.environ, **where, "PATH": tools}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    alembic("upgrade", "head")
    alembic("revision", "--autogenerate", "-m", "nothing")
    (written,) = tmp_path.glob("migrations/versions/*_nothing.py")
    # The tables of the code are those of the migrations, so there is nothing to do.
    assert "op." not in written.read_text()
