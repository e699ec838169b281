"""Work a whole run in this process, and check what every finished run must satisfy."""

from __future__ import annotations

from pathlib import Path

from persyn.analysis import audit
from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.runs import pipeline, run_file
from persyn.settings import Settings
from persyn.workers.runner.worker import Worker
from tests.sql.test_views import require_alike


def work(database: Database, folder: Path, file: Path) -> int:
    """Start the run of a file and work it to its end."""
    with database.write() as session:
        run_id = pipeline.start_run(session, run_file.read(file), actor="me").id
    return go_on(database, folder, run_id)


def go_on(database: Database, folder: Path, run_id: int) -> int:
    """Work a run to its end: it is done, misses no row, is consistent, and the views have the rewards that it used."""
    Worker(database, Settings(str(database.url), folder), run_id=run_id).run()
    with database.read() as session:
        run = session.get_one(Run, run_id)
        assert run.state is RunState.DONE, run.error
        assert {
            stage: counts.pending for stage, counts in pipeline.progress(session, run).items() if counts.pending
        } == {}
        assert [str(found) for found in audit.audit(session, run)] == []
        require_alike(session, run)
    return run_id
