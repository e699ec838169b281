"""Permanent errors are tried once, transient ones up to the limit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.work import Event, Job, JobState
from persyn.runs import pipeline, run_file
from persyn.settings import Settings
from persyn.workers.runner.worker import Worker
from tests.run_files import write_run


@pytest.fixture
def database(migrated: Path, tmp_path: Path) -> Any:
    shutil.copy(migrated, tmp_path / "persyn.db")
    store = Database(f"sqlite:///{tmp_path / 'persyn.db'}")
    yield store
    store.close()


def worked(database: Database, folder: Path, first_teacher: str) -> tuple[str, int]:
    """Work a run with this first teacher; return why it failed, and the maximum number of attempts of its jobs."""
    file = write_run(folder, options={"response_words": 3})
    text = file.read_text().replace('model = "ada"\nengine = "fake"\ngpus = 0', first_teacher)
    file.write_text(text.replace("options = { response_words = 3 }", "", 1))
    wanted = run_file.read(file)
    with database.write() as session:
        run_id = pipeline.start_run(session, wanted, actor="me").id
    Worker(database, Settings(str(database.url), folder), run_id=run_id).run()
    with database.read() as session:
        run = session.get_one(Run, run_id)
        assert run.state is RunState.FAILED
        claims = select(func.count()).select_from(Event).join(Job, Job.id == Event.job_id)
        failed = Event.to_state == JobState.RUNNING, Job.error.is_not(None)
        return str(run.error), max(session.scalars(claims.where(*failed).group_by(Job.id)))


SERVER = 'model = "m"\nengine = "openai"\ngpus = 0\noptions = {{ base_url = "{url}"{more} }}'


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        (
            SERVER.format(url="http://127.0.0.1:9", more=', api_key_env = "NO_SUCH_KEY"'),
            "NO_SUCH_KEY is not set or is empty",
        ),
        (SERVER.format(url="ftp://127.0.0.1:9", more=""), "not an http(s) URL"),
    ],
)
def test_a_teacher_that_never_loads_is_tried_once(database: Database, tmp_path: Path, teacher: str, said: str) -> None:
    error, attempts = worked(database, tmp_path, teacher)
    assert said in error
    assert attempts == 1
