"""The division of a model's part of a stage into jobs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from sqlalchemy import func, select

from persyn.db.connect import Database
from persyn.db.work import Job
from persyn.runs import pipeline, run_file
from tests.run_files import write_run


@pytest.mark.parametrize(
    ("prompts", "most", "sizes"),
    [
        (20, 256, {8: 2, 4: 1}),
        (2500, 256, {20: 125}),
        (2500, 15, {15: 166, 10: 1}),
        (20, 1, {1: 20}),
    ],
)
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)  # the arithmetic is the same
def test_few_prompts_are_shared_in_small_jobs(
    database: Database, tmp_path: Path, prompts: int, most: int, sizes: dict[int, int]
) -> None:
    file = write_run(tmp_path, prompts=prompts, teachers=("ada", "bob"), calibration=prompts, job_prompts=most)
    with database.write() as session:
        pipeline.start_run(session, run_file.read(file), actor="me")
    with database.read() as session:
        assert session.scalar(select(func.sum(Job.n_prompts))) == 2 * prompts
        found = session.scalars(select(Job.n_prompts))
        assert Counter(found) == {size: 2 * count for size, count in sizes.items()}
