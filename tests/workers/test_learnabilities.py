"""Runs with other definitions of learnability than the mean log-likelihood."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import func, null, select, update

from persyn.analysis import tables
from persyn.analysis.compare import Reward, compare
from persyn.config import load_config
from persyn.db import grid
from persyn.db.catalog import Run, Scorer, Student
from persyn.db.connect import Database
from persyn.db.results import Response, Score
from persyn.errors import UsageError
from persyn.ingest import versions
from persyn.method.learnability import LEARNABILITIES
from persyn.runs import pipeline, run_file
from tests import whole_runs
from tests.factories import make_config
from tests.one_database import POSTGRESQL, SQLITE
from tests.run_files import write_run


def work(database: Database, folder: Path, name: str = "first", **options: Any) -> int:
    return whole_runs.work(database, folder, write_run(folder, name=name, prompts=12, **options))


def scorers(database: Database) -> list[dict[str, Any]]:
    """The options of the student's scorers."""
    with database.read() as session:
        found = session.scalars(select(Scorer).where(Scorer.student_id.is_not(None)).order_by(Scorer.id))
        return [scorer.options for scorer in found]


def count(database: Database, model: Any) -> int:
    with database.read() as session:
        return session.scalars(select(func.count()).select_from(model)).one()


@POSTGRESQL
def test_a_run_follows_a_definition_and_compares_the_others_without_scoring_again(
    database: Database, tmp_path: Path
) -> None:
    run_id = work(database, tmp_path, learnability="ifd")

    assert scorers(database) == [{"statistics": ["alone"]}]
    with database.read() as session:
        run = session.get_one(Run, run_id)
        cells = grid.read(session, run)
        stored = session.execute(
            select(Score.value, Score.statistics)
            .join(Response)
            .where(Response.prompt_id == int(cells.prompt_ids[0]), Response.teacher_id == int(cells.teacher_ids[0]))
            .where(Score.scorer_id == run.learnability_scorer_id)
        ).one()
        ratio = stored.value / stored.statistics["answer"]["alone"]
        assert cells.learnability[0, 0] == pytest.approx(ratio if ratio <= 1 else 0.0)

        found = compare(session, run)
        assert (found.learnability, found.is_own) == ("ifd", True)
        assert [note for note in found.notes if note.startswith("car:")] == [
            "car: needs the student's loss; this learnability is no log-likelihood"
        ]
        other = compare(session, run, Reward(learnability="lowest_share"))
        assert (other.learnability, other.is_own) == ("lowest_share", False)
        assert "car" in {fact.strategy for fact in other.strategies}
        for name in set(LEARNABILITIES) - {"local_log_likelihood"}:
            table = tables.rewards(session, run, Reward(learnability=name))
            assert len(set(table["learnability"].to_pylist())) > 10
        with pytest.raises(UsageError, match="learnability local_log_likelihood needs the statistics local"):
            grid.read(session, run, learnability="local_log_likelihood")


@SQLITE
def test_scores_of_an_earlier_version_are_refused_and_another_run_scores_the_responses_again(
    database: Database, tmp_path: Path
) -> None:
    first = work(database, tmp_path)
    with database.write() as session:
        run = session.get_one(Run, first)
        student, table = session.get_one(Student, run.student_id), load_config(run.config).student
        # What is part of every pass needs no other scores.
        same = versions.learnability(session, student, table, "rank_surprisal_ratio")
        assert same == run.learnability_scorer_id
        session.execute(update(Score).values(statistics=null()))
    before, responses = count(database, Score), count(database, Response)
    with database.read() as session:
        run = session.get_one(Run, first)
        own = grid.read(session, run).learnability
        with pytest.raises(
            UsageError,
            match="needs the statistics rank, .* was stored by an earlier version of PerSyn without. Start a run with "
            r'another name and \[run\] learnability = "rank_surprisal_ratio": it uses the stored responses',
        ):
            compare(session, run, Reward(learnability="rank_surprisal_ratio"))

    second = work(database, tmp_path, "second", learnability="rank_surprisal_ratio")

    assert scorers(database) == [{}, {"statistics": ["tokens"]}]
    assert count(database, Score) - before == own.size
    assert count(database, Response) == responses
    with database.read() as session:
        # The first run keeps its scores.
        assert grid.read(session, session.get_one(Run, first)).learnability.tolist() == own.tolist()
        assert np.isfinite(grid.read(session, session.get_one(Run, second)).learnability).all()


@SQLITE
def test_a_frozen_configuration_without_a_definition_is_the_mean_log_likelihood(
    database: Database, tmp_path: Path
) -> None:
    config = run_file.read(write_run(tmp_path))
    with database.write() as session:
        run = pipeline.start_run(session, config, actor="me")
        run.config = {**run.config, "run": {k: v for k, v in run.config["run"].items() if k != "learnability"}}
        session.flush()
        assert grid.measure(run).kind.name == "log_likelihood"
        # The same run file still starts the same run.
        assert pipeline.start_run(session, config, actor="me").id == run.id


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"learnability": "rsr"}, "`run.learnability` is 'rsr'; allowed: 'log_likelihood', 'lowest_window'"),
        ({"learnability": "ifd", "learnability_per": "response"}, "is only for learnability log_likelihood, got ifd"),
        ({"learnability": "ifd", "strategy": "car"}, "strategy car needs the student's loss, which learnability ifd"),
    ],
)
def test_what_cannot_be_combined_is_refused(tmp_path: Path, table: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        run_file.read(write_run(tmp_path, **table))


def test_a_divisor_of_something_else_than_a_log_likelihood_is_refused() -> None:
    run = Run(name="run", config=make_config(learnability_per="response").frozen(), learnability_scorer_id=1)

    with pytest.raises(UsageError, match="learnability ifd has no divisor, got per character"):
        grid.measure(run, learnability="ifd", per="character")
    with pytest.raises(UsageError, match="there is no learnability named 'idf'; did you mean 'ifd'"):
        grid.measure(run, learnability="idf")
    # The run's own divisor does not apply.
    assert grid.measure(run, learnability="lowest_share").per == "token"
