"""Rejection sampling: a teacher is asked for several samples of a prompt, and one is kept by its quality."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, func, select, update

from persyn.analysis import summary
from persyn.dataset import export
from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.results import Assignment, Response, Score
from persyn.errors import UsageError
from persyn.runs import pipeline, run_file
from tests.one_database import POSTGRESQL, SQLITE
from tests.run_files import write_run
from tests.whole_runs import go_on, work

#: A quarter of the responses are right; "correct" needs a quality that says so.
SCORER = """
import hashlib

def is_right(messages, response, answer, meta):
    return float(hashlib.sha256(response.encode()).digest()[0] < 64)
"""
FEW = 24


def write(folder: Path, table: str, **options: Any) -> Path:
    file = write_run(folder, prompts=FEW, strategy="static", **options)
    file.write_text(file.read_text() + f"[generation]\n{table}\n")
    return file


Sampled = list[tuple[int, str | None, float | None]]


def samples(database: Database, run_id: int) -> dict[int, tuple[int | None, bool, Sampled]]:
    """{prompt: its kept sample, whether it is rejected, (sample, text, quality) of its teacher's responses}."""
    found: dict[int, tuple[int | None, bool, Sampled]] = {}
    with database.read() as session:
        run = session.get_one(Run, run_id)
        for row in session.execute(
            select(Assignment.prompt_id, Assignment.sample, Assignment.rejected, Response, Score.value)
            .join(
                Response,
                (Response.prompt_id == Assignment.prompt_id) & (Response.teacher_id == Assignment.teacher_id),
            )
            .outerjoin(Score, (Score.response_id == Response.id) & (Score.scorer_id == run.quality_scorer_id))
            .where(Assignment.run_id == run_id)
            .order_by(Response.sample)
        ):
            _, _, several = found.setdefault(row.prompt_id, (row.sample, row.rejected, []))
            several.append((row.Response.sample, row.Response.text, row.value))
    return found


def rows(database: Database, run_id: int, folder: Path) -> tuple[list[dict[str, Any]], Any]:
    manifest = export.write(database, run_id, folder)
    return [json.loads(line) for line in (folder / "messages.jsonl").read_text().splitlines()], manifest


@POSTGRESQL
def test_the_best_of_all_samples_is_kept(database: Database, tmp_path: Path) -> None:
    run_id = work(database, tmp_path, write(tmp_path, "samples = 3", options={"fail_every": 5}))

    for kept, rejected, found in samples(database, run_id).values():
        assert not rejected
        assert [sample for sample, _, _ in found] == [0, 1, 2]
        qualities = {sample: value for sample, text, value in found if text is not None}
        assert None not in qualities.values()
        best = min((sample for sample in qualities), key=lambda sample: (-qualities[sample], sample), default=0)
        assert kept == best
    exported, manifest = rows(database, run_id, tmp_path / "dataset")
    assert {(row["prompt_id"], row["sample"]) for row in exported} == {
        (prompt_id, kept)
        for prompt_id, (kept, _, found) in samples(database, run_id).items()
        if any(text is not None for _, text, _ in found)
    }
    assert manifest.assigned == FEW == manifest.exported + sum(manifest.failed.values())


@SQLITE
def test_no_more_samples_are_asked_for_once_one_is_good_enough(database: Database, tmp_path: Path) -> None:
    run_id = work(database, tmp_path, write(tmp_path, "samples = 6\ngood_enough = 0.6"))

    lengths = set()
    for kept, _, found in samples(database, run_id).values():
        lengths.add(len(found))
        good = [sample for sample, _, value in found if value is not None and value >= 0.6]
        if good:
            assert kept == good[0] == len(found) - 1  # the last one that was asked for
        else:
            assert len(found) == 6
            assert kept == max(found, key=lambda each: each[2] or 0.0)[0]
    assert len(lengths) > 1


def test_only_correct_responses_are_kept_and_the_rest_is_counted(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rejection_scorer.py").write_text(SCORER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    file = write(tmp_path, 'samples = 4\nkeep = "correct"', options={"fail_every": 6})
    text = file.read_text().replace('kind = "fake"', 'kind = "python"\nmodel = "rejection_scorer:is_right"', 1)
    file.write_text(text)
    run_id = work(database, tmp_path, file)

    found = samples(database, run_id)
    n_rejected = n_failed = 0
    for kept, rejected, several in found.values():
        right = [sample for sample, _, value in several if value == 1]
        if right:
            assert (kept, rejected) == (right[0], False)
            assert len(several) == right[0] + 1
        else:
            assert len(several) == 4
            has_text = any(text is not None for _, text, _ in several)
            assert (kept, rejected) == ((None, True) if has_text else (0, False))
            n_rejected, n_failed = n_rejected + has_text, n_failed + (not has_text)
    assert n_rejected > 0
    exported, manifest = rows(database, run_id, tmp_path / "dataset")
    assert len(exported) == manifest.exported == FEW - n_rejected - n_failed
    assert (manifest.assigned, manifest.rejected, sum(manifest.failed.values())) == (FEW, n_rejected, n_failed)
    assert manifest.wrong == 0
    with database.read() as session:
        facts = summary.facts(session, session.get_one(Run, run_id))
    assert facts.rejected == n_rejected
    asked = sum(len(several) for _, _, several in found.values())
    assert sum(teacher.samples * teacher.assigned for teacher in facts.teachers if teacher.samples) == pytest.approx(
        asked
    )


@SQLITE
def test_every_sample_is_a_row_with_an_id_of_its_own(database: Database, tmp_path: Path) -> None:
    run_id = work(database, tmp_path, write(tmp_path, 'samples = 3\nkeep = "all"', options={"fail_every": 9}))

    exported, manifest = rows(database, run_id, tmp_path / "dataset")
    assert manifest.assigned == 3 * FEW == len(exported) + sum(manifest.failed.values())
    assert sum(manifest.failed.values()) > 0
    assert len({row["id"] for row in exported}) == len(exported)
    per_prompt = defaultdict(set)
    for row in exported:
        per_prompt[row["prompt_id"]].add(row["sample"])
    assert max(map(len, per_prompt.values())) == 3
    with database.read() as session:
        unscored = select(func.count()).select_from(Score).join(Response).where(Response.sample > 0)
        assert session.scalar(unscored) == 0


@SQLITE
def test_samples_of_the_grid_and_of_other_runs_are_not_asked_for_again(database: Database, tmp_path: Path) -> None:
    first = work(database, tmp_path, write(tmp_path, "samples = 2"))
    with database.read() as session:
        there = session.scalar(select(func.count()).select_from(Response))
    again = work(database, tmp_path, write(tmp_path, "samples = 2", name="again"))
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Response)) == there
    assert samples(database, first) == samples(database, again)


@SQLITE
def test_a_failed_sample_is_asked_for_again_and_the_choice_is_made_anew(database: Database, tmp_path: Path) -> None:
    run_id = work(database, tmp_path, write(tmp_path, "samples = 3"))
    with database.write() as session:
        prompt_id, teacher_id, kept = session.execute(
            select(Assignment.prompt_id, Assignment.teacher_id, Assignment.sample).where(Assignment.sample > 0).limit(1)
        ).one()
        best = (
            Response.prompt_id == prompt_id,
            Response.teacher_id == teacher_id,
            Response.sample == kept,
        )
        response_id = session.scalars(select(Response.id).where(*best)).one()
        text = session.scalars(select(Response.text).where(*best)).one()
        session.execute(delete(Score).where(Score.response_id == response_id))
        session.execute(update(Response).where(*best).values(text=None, failure="timeout: once"))
        assert pipeline.retry_rows(session, session.get_one(Run, run_id), ["timeout"], actor="me") == 1
    go_on(database, tmp_path, run_id)
    assert samples(database, run_id)[prompt_id][0] == kept
    assert (kept, text) in [(sample, said) for sample, said, _ in samples(database, run_id)[prompt_id][2]]


@SQLITE
def test_a_run_that_is_cancelled_in_any_round_goes_on_where_it_was(database: Database, tmp_path: Path) -> None:
    whole = work(database, tmp_path, write(tmp_path, "samples = 5\ngood_enough = 0.7", name="whole"))
    expected = samples(database, whole)
    with database.write() as session:
        session.execute(delete(Score).where(Score.response_id.in_(select(Response.id).where(Response.sample > 1))))
        session.execute(delete(Response).where(Response.sample > 1))
        session.execute(update(Assignment).values(sample=None))
        run = session.get_one(Run, whole)
        pipeline.resume(session, run, actor="me")
        assert run.state is RunState.RUNNING
    go_on(database, tmp_path, whole)
    assert samples(database, whole) == expected


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('keep = "correct"', "`generation.keep` is 'correct', but quality fake does not say what is correct"),
        ("good_enough = 0.5", 'good_enough needs keep = "best" and samples above 1'),
        ("samples = 101", "samples. must be an integer >= 1 and <= 100"),
        ('keep = "worst"', "allowed: 'best', 'correct', 'all'|allowed: "),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(tmp_path: Path, table: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run_file.read(write(tmp_path, table))
