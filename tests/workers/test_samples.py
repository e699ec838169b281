"""Runs with several samples per calibration cell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import func, select

from persyn.analysis import plan, tables, trace
from persyn.db import grid
from persyn.db.catalog import Run
from persyn.db.connect import Database
from persyn.db.results import Response, Score
from persyn.db.work import Job
from persyn.errors import UsageError
from persyn.runs import pipeline, run_file
from persyn.stages import fit_router
from tests import whole_runs
from tests.one_database import POSTGRESQL, SQLITE
from tests.run_files import PROMPTS, TEACHERS, write_run

GRID = 12 * len(TEACHERS)


def work(database: Database, folder: Path, **options: Any) -> int:
    return whole_runs.work(database, folder, write_run(folder, **options))


def count(database: Database, what: Any, *where: Any) -> int:
    with database.read() as session:
        return session.scalars(select(func.count()).select_from(what).where(*where)).one()


@POSTGRESQL
def test_each_cell_has_several_samples_and_their_mean(database: Database, tmp_path: Path) -> None:
    run_id = work(database, tmp_path, samples=3, options={"fail_every": 7})

    assert count(database, Response) == 3 * GRID + PROMPTS - 12
    assert count(database, Score) == 2 * count(database, Response, Response.sample >= 0, Response.text.is_not(None)) - (
        2 * count(database, Response, Response.sample == 0, Response.text.is_not(None), Response.id > 3 * GRID)
    )
    with database.read() as session:
        run = session.get_one(Run, run_id)
        counts = pipeline.progress(session, run)["calibrate"]
        assert (counts.total, counts.pending) == (3 * GRID, 0)
        assert counts.failed > 0
        cells = grid.read(session, run)
        prompt_id, teacher_id = int(cells.prompt_ids[0]), int(cells.teacher_ids[1])
        values = session.scalars(
            select(Score.value)
            .join(Response)
            .where(Response.prompt_id == prompt_id, Response.teacher_id == teacher_id)
            .where(Score.scorer_id == run.quality_scorer_id)
        ).all()
        assert cells.quality[0, 1] == pytest.approx(np.mean(values))
        assert cells.n_responses[0, 1] == len(values)
        table = tables.rewards(session, run)
        assert table["responses"].to_pylist() == cells.n_responses.ravel().tolist()
        assert min(table["reward_error"].drop_null().to_pylist()) > 0
        assert fit_router.fit_of(session, run)[1].errors is not None
        seeds = session.scalars(select(Response.seed).where(Response.prompt_id == prompt_id)).all()
        assert len(set(seeds)) == len(seeds) >= 3 * len(TEACHERS)
        assert len(trace.trace(session, run, prompt_id).responses) == len(seeds)


@SQLITE
def test_more_samples_later_ask_only_for_the_missing_ones(database: Database, tmp_path: Path) -> None:
    first = work(database, tmp_path)
    with database.read() as session:
        before = grid.read(session, session.get_one(Run, first))
        config = run_file.read(write_run(tmp_path, name="more", samples=4))
        known = {}
        estimate = plan.of_file(session, config, known)
    asked = sum(share.ask.responses for share in estimate.shares if share.stage == "calibrate")
    assert asked == 3 * GRID
    there = count(database, Response)
    work(database, tmp_path, name="more", samples=4)

    assert count(database, Response, Response.sample > 0) == 3 * GRID
    assert count(database, Response, Response.sample == 0) >= there
    with database.read() as session:
        after = grid.read(session, session.get_one(Run, first))
    assert np.array_equal(before.quality, after.quality)  # the first run still sees one sample


@SQLITE
def test_a_batch_has_no_more_requests_than_its_limit(database: Database, tmp_path: Path) -> None:
    batch = {"base_url": "http://127.0.0.1:9/v1", "mode": "batch", "batch_requests": 7}
    file = write_run(tmp_path, samples=3, options=batch)
    text = file.read_text().replace('engine = "fake"\ngpus = 0', 'engine = "openai"\ngpus = 0')
    file.write_text(text)
    with database.write() as session:
        pipeline.start_run(session, run_file.read(file), actor="me")
        sizes = session.scalars(select(Job.n_prompts)).all()
    assert set(sizes) == {6}  # two prompts with three samples each
    assert sum(sizes) == 3 * GRID


def test_several_samples_of_a_greedy_teacher_are_refused(tmp_path: Path) -> None:
    file = write_run(tmp_path, samples=2)
    file.write_text(file.read_text() + "sampling = { temperature = 0 }\n")
    with pytest.raises(UsageError, match=r"`run.samples` is 2, but all samples of cyd would be the same"):
        run_file.read(file)
