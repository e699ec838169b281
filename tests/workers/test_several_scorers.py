"""A run whose quality is a gate and a second scorer: who is asked, what is stored, and what reads it."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import func, select

from persyn.analysis import plan, tables, trace
from persyn.config import QualityTable, load_config
from persyn.dataset import export
from persyn.db import grid, lookup
from persyn.db.catalog import Run, Scorer
from persyn.db.connect import Database
from persyn.db.results import Assignment, Response, Score, answers_assignment
from persyn.db.work import Job
from persyn.errors import UsageError
from persyn.runs import pipeline, run_file, transport
from persyn.stages import scoring
from persyn.student import evaluations
from tests.one_database import SQLITE
from tests.run_files import write_run
from tests.whole_runs import work

#: Half of the responses are right; of some nobody knows.
SCORER = """
import hashlib

def is_right(messages, response, answer, meta):
    first = hashlib.sha256(response.encode()).digest()[0]
    return None if first < 16 else first < 128

def words(messages, response, answer, meta):
    return len(response.split())
"""
GATE = 'kind = "python"\nmodel = "several_scorers:is_right"\ngate = true'
WEIGHT = 0.5
FEW = 16


def scored(weight: float = WEIGHT) -> str:
    return f'kind = "fake"\nweight = {weight}'


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "several_scorers.py").write_text(SCORER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)


def write(folder: Path, parts: Sequence[str] = (GATE, scored()), more: str = "", **options: object) -> Path:
    file = write_run(folder, prompts=FEW, strategy="static", **{"alpha": 0, **options})
    tables = "".join(f"[[quality]]\n{part}\n" for part in parts)
    file.write_text(file.read_text().replace('[quality]\nkind = "fake"\n', tables) + more)
    return file


def is_right(text: str) -> bool | None:
    first = hashlib.sha256(text.encode()).digest()[0]
    return None if first < 16 else first < 128


def n_jobs(database: Database, run_id: int) -> int:
    with database.read() as session:
        of_run = Job.run_id == run_id, Job.stage == "score"
        return session.scalars(select(func.count()).where(*of_run)).one()


def test_a_gate_decides_first_and_the_other_scorer_reads_what_passed(database: Database, tmp_path: Path) -> None:
    run_id = work(database, tmp_path, write(tmp_path, alpha=0.4))

    with database.read() as session:
        run = session.get_one(Run, run_id)
        gate, other = lookup.quality_scorers(session, run)
        assert [gate.kind, other.kind] == ["python", "fake"]
        rows = session.execute(
            select(Response.id, Response.text, Score.scorer_id, Score.value, Score.failure).join(Score)
        ).all()
        by_response: dict[int, dict[int, float | None]] = {}
        for row in rows:
            by_response.setdefault(row.id, {})[row.scorer_id] = row.value
        texts = {row.id: row.text for row in rows}
        assert len(by_response) == 36
        for response_id, values in by_response.items():
            right = is_right(texts[response_id])
            assert (other.id in values) == (right is True)
            quality = values[run.quality_scorer_id]
            if right is None or not right:
                assert quality == (None if right is None else 0)
            else:
                assert quality == pytest.approx(1 + 1 / (1 + math.exp(-WEIGHT * (values[other.id] or 0))), abs=1e-12)
        failures = {row.failure for row in rows if row.scorer_id == run.quality_scorer_id and row.failure}
        assert {failure.split(": ")[:2][1] for failure in failures} == {"python"}

        cells = grid.read(session, run)
        qualities = {row.id: by_response[row.id][run.quality_scorer_id] for row in rows}
        assert sorted(cells.quality[~np.isnan(cells.quality)].tolist()) == sorted(
            value for value in qualities.values() if value is not None
        )
        found = tables.scores(session, run).to_pylist()
        assert {row["measure"] for row in found} == {"quality", "quality.1", "quality.2", "learnability"}
        assert (np.isnan(cells.rewards()) == np.isnan(cells.quality)).all()
        assert not np.isnan(cells.learnability).any()
        traced = trace.trace(session, run, int(cells.prompt_ids[0]))
        kinds = {"quality": "combined", "quality.1": "python", "quality.2": "fake", "learnability": "fake"}
        assert all(kinds[row["measure"]] == row["scorer"] for row in traced.scores)
        shares = plan.of_run(session, run).shares
        assert {share.scores_to_make for share in shares if share.stage == "calibrate"} == {0}
    export.write(database, run_id, tmp_path / "dataset")
    assert "python as a gate, 0.5 fake" in (tmp_path / "dataset" / "README.md").read_text().replace("\\", "")


@SQLITE
def test_scores_are_shared_with_runs_that_combine_them_otherwise(database: Database, tmp_path: Path) -> None:
    work(database, tmp_path, write(tmp_path))
    with database.read() as session:
        before = session.scalar(select(func.count()).select_from(Score).join(Scorer).where(Scorer.kind != "combined"))

    other = work(database, tmp_path, write(tmp_path, (GATE, scored(2.0)), name="other"))
    single = write(tmp_path, name="single")
    single.write_text(
        single.read_text().replace("[[quality]]\n" + scored(), "").replace(GATE, GATE[: GATE.index("gate")])
    )
    single.write_text(single.read_text().replace("[[quality]]", "[quality]"))
    alone = work(database, tmp_path, single)

    assert [n_jobs(database, run_id) for run_id in (other, alone)] == [0, 0]
    with database.read() as session:
        after = session.scalar(select(func.count()).select_from(Score).join(Scorer).where(Scorer.kind != "combined"))
        assert after == before
        assert not np.isnan(grid.read(session, session.get_one(Run, other)).quality).all()


@SQLITE
def test_a_sum_is_that_of_the_raw_values(database: Database, tmp_path: Path) -> None:
    words = 'kind = "python"\nmodel = "several_scorers:words"\nweight = -0.25'
    run_id = work(database, tmp_path, write(tmp_path, (words, scored(2.0))))
    with database.read() as session:
        run = session.get_one(Run, run_id)
        of_words, fake = lookup.quality_scorers(session, run)
        rows = session.execute(select(Score.response_id, Score.scorer_id, Score.value)).all()
        values = {(row.response_id, row.scorer_id): row.value for row in rows}
        for response_id in {row.response_id for row in rows}:
            expected = -0.25 * values[response_id, of_words.id] + 2.0 * values[response_id, fake.id]
            assert values[response_id, run.quality_scorer_id] == pytest.approx(expected, abs=1e-12)


@SQLITE
def test_rejection_sampling_keeps_what_passes_the_gate(database: Database, tmp_path: Path) -> None:
    run_id = work(database, tmp_path, write(tmp_path, more='[generation]\nsamples = 4\nkeep = "correct"\n'))
    with database.read() as session:
        kept = session.scalars(
            select(Response.text).join(Assignment, answers_assignment()).where(Assignment.run_id == run_id)
        ).all()
        rejected = session.scalars(select(Assignment.rejected).where(Assignment.run_id == run_id)).all()
        assert len(kept) + sum(rejected) == FEW
        assert len(kept) > FEW / 2
        assert all(is_right(text or "") for text in kept)
    manifest = export.write(database, run_id, tmp_path / "dataset")
    assert (manifest.wrong, manifest.rejected) == (0, sum(rejected))


@SQLITE
def test_the_best_of_several_samples_is_that_of_the_highest_combined_quality(
    database: Database, tmp_path: Path
) -> None:
    run_id = work(database, tmp_path, write(tmp_path, more="[generation]\nsamples = 3\n"))
    with database.read() as session:
        run = session.get_one(Run, run_id)
        rows = session.execute(
            select(Assignment.prompt_id, Assignment.sample.label("kept"), Response.sample, Score.value)
            .join(
                Response, (Response.prompt_id == Assignment.prompt_id) & (Response.teacher_id == Assignment.teacher_id)
            )
            .outerjoin(Score, (Score.response_id == Response.id) & (Score.scorer_id == run.quality_scorer_id))
            .order_by(Response.sample)
        ).all()
    by_prompt: dict[int, list[tuple[float, int]]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt_id, []).append((-1.0 if row.value is None else row.value, -row.sample))
    assert {row.prompt_id: row.kept for row in rows} == {
        prompt_id: -max(found)[1] for prompt_id, found in by_prompt.items()
    }
    assert {len(found) for found in by_prompt.values()} == {3}


@SQLITE
def test_two_equal_scorers_are_refused(database: Database, tmp_path: Path) -> None:
    file = write(tmp_path, (scored(), scored(2.0)))
    with pytest.raises(UsageError, match="items 1 and 2 are the same scorer: fake"), database.write() as session:
        pipeline.start_run(session, run_file.read(file), actor="me")


@SQLITE
def test_a_student_is_evaluated_by_one_of_the_scorers(database: Database, tmp_path: Path) -> None:
    with database.write() as session:
        run = pipeline.start_run(session, run_file.read(write(tmp_path)), actor="me")
        found = evaluations._table(run, "python")
        assert found is not None
        assert (found.kind, found.model) == ("python", "several_scorers:is_right")
        assert evaluations._table(run, "math") == QualityTable("math")
        for by, said in (
            (None, "combines python, fake; choose one with --by"),
            ("judge", "has no scorer of kind judge"),
        ):
            with pytest.raises(UsageError, match=said):
                evaluations._table(run, by)


@SQLITE
def test_a_student_is_not_evaluated_by_one_of_two_scorers_of_a_kind(database: Database, tmp_path: Path) -> None:
    words = 'kind = "python"\nmodel = "several_scorers:words"\nweight = 0.5'
    with database.write() as session:
        run = pipeline.start_run(session, run_file.read(write(tmp_path, (GATE, words))), actor="me")
        with pytest.raises(UsageError, match=r"has 2 scorers of kind python .*:is_right, several_scorers:words"):
            evaluations._table(run, "python")


@SQLITE
def test_the_transport_of_each_scorer_can_be_changed(database: Database, tmp_path: Path) -> None:
    with database.write() as session:
        run = pipeline.start_run(session, run_file.read(write(tmp_path)), actor="me")
        changed = transport.change_one(session, run, "quality.2", {"latency_seconds": 0.5}, actor="me")
        assert [each.key for each in changed] == ["quality[1].options.latency_seconds"]
        other = lookup.quality_scorers(session, run)[1]
        assert scoring.spec_in(session, run, other).options["latency_seconds"] == 0.5
        for model, said in (("quality", "it has quality.1, quality.2, router"), ("quality.3", "has no quality.3")):
            with pytest.raises(UsageError, match=said):
                transport.change_one(session, run, model, {"gpus": 1}, actor="me")
        assert pipeline.start_run(session, load_config(run.config), actor="me").id == run.id
        with pytest.raises(UsageError, match=r"another configuration \(changed: quality\[1\]\.weight"):
            pipeline.start_run(session, run_file.read(write(tmp_path, (GATE, scored(2.0)))), actor="me")
