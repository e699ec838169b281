"""The views agree with PerSyn's own computations, on both databases."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select, text, update
from sqlalchemy.orm import Session

from persyn.analysis import summary
from persyn.config import On, Per
from persyn.db import grid
from persyn.db.catalog import Run, Teacher
from persyn.db.connect import Database
from persyn.db.results import Response, Score
from persyn.method import rewards
from persyn.method.learnability import LEARNABILITIES
from persyn.method.rewards import Normalisation
from persyn.runs import pipeline
from persyn.stages.registry import STAGES
from tests.factories import make_config, make_response, make_run
from tests.sql import by_hand

TEACHERS = ("a", "b", "c", "d", "e")
CALLS = [{"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": [3]}'}}]


def rows(session: Session, query: str, **values: Any) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in session.execute(text(query), values)]


def fill_grid(session: Session, run: Run, prompt_ids: list[int], teacher_ids: list[int], samples: int) -> None:
    """Few distinct scores, so that ties are frequent; some are missing, failed, or have no tokens."""
    draw = random.Random(5)
    for prompt_id in prompt_ids:
        for teacher_id, sample in itertools.product(teacher_ids, range(samples)):
            if draw.random() < 0.1:
                continue
            text = "\N{SNOWMAN}" * draw.randint(1, 9)
            reasoning = "\N{SNOWMAN}" * draw.randint(1, 9) if draw.random() < 0.6 else None
            parts = {"reasoning": reasoning, "tool_calls": CALLS if (prompt_id + teacher_id) % 3 == 0 else None}
            response = make_response(session, prompt_id, teacher_id, text, sample=sample, **parts)
            if draw.random() < 0.9:
                value = draw.choice((0.0, 1.0, draw.gauss(0, 5)))
                session.add(Score(response_id=response, scorer_id=run.quality_scorer_id, value=value, detail={}))
            tokens = draw.choice((0, 1, 3, 7))
            nats = {"value": draw.choice((-3.0, -9.5)), "n_tokens": tokens} if draw.random() < 0.9 else {"failure": "x"}
            nats["statistics"] = {"answer": draw_statistics(draw, tokens)}
            if reasoning and "value" in nats:
                n = draw.choice((0, 2, 5))
                nats |= {"reasoning_value": draw.choice((-2.0, -8.5)), "reasoning_n_tokens": n}
                nats["statistics"]["reasoning"] = draw_statistics(draw, n)
            session.add(Score(response_id=response, scorer_id=run.learnability_scorer_id, detail={}, **nats))


def draw_statistics(draw: random.Random, n_tokens: int) -> dict[str, float]:
    """Those of a part of a response; a part without tokens has no lowest window."""
    names = "squares", "lowest", "rank", "n_first", "entropy", "alone", "local", "lowest_window"
    drawn = {name: draw.choice((-1, 1)) * draw.uniform(1, 9) for name in names[: 8 if n_tokens else 7]}
    return drawn | {"n_lowest": float(n_tokens > 0)}


@pytest.mark.parametrize(
    ("how", "per", "on", "samples", "learnability"),
    [
        ("minmax", "token", "both", 1, "log_likelihood"),
        ("rank", "character", "both", 1, "log_likelihood"),
        ("minmax", "response", "both", 3, "log_likelihood"),
        ("minmax", "character", "answer", 1, "log_likelihood"),
        ("rank", "response", "answer", 1, "log_likelihood"),
        ("minmax", "token", "reasoning", 2, "log_likelihood"),
        ("rank", "character", "reasoning", 1, "log_likelihood"),
        *[("minmax", "token", "both", 1, name) for name in LEARNABILITIES if name != "log_likelihood"],
        ("rank", "token", "answer", 2, "lowest_window"),
        ("minmax", "token", "reasoning", 1, "lowest_window"),
        ("rank", "token", "reasoning", 1, "ifd"),
    ],
)
def test_the_reward_matrix_is_that_of_the_rewards(
    database: Database, how: Normalisation, per: Per, on: On, samples: int, learnability: str
) -> None:
    with database.write() as session:
        made = make_run(session, teachers=TEACHERS, prompts=25, calibration=15, holdout=5)
        run = session.get_one(Run, made.id)
        measure = {"learnability": learnability, "learnability_per": per, "learnability_on": on}
        run.config = make_config("run", TEACHERS, alpha=0.3, normalise=how, samples=samples, **measure).frozen()
        fill_grid(session, run, made.prompt_ids, made.teacher_ids, samples + 1)  # the run ignores the last one
    with database.read() as session:
        cells = grid.read(session, session.get_one(Run, made.id))
        seen = rows(session, "SELECT prompt_id, position, quality, learnability, reward FROM v_reward_matrix")
        why = rows(session, "SELECT prompt_id, position, learnability FROM v_why_teacher WHERE role <> 'target'")
    expected = rewards.combine(cells.quality, cells.learnability, alpha=0.3, how=how)
    of_view = np.full((3, *expected.shape), np.nan)
    row_of = {prompt_id: row for row, prompt_id in enumerate(cells.prompt_ids)}
    for prompt_id, position, *numbers in seen:
        of_view[:, row_of[prompt_id], position] = [np.nan if number is None else number for number in numbers]
    assert (~np.isnan(expected)).sum() > 20
    np.testing.assert_allclose(of_view, [cells.quality, cells.learnability, expected], rtol=0, atol=1e-9)
    of_why = np.full(expected.shape, np.nan)
    for prompt_id, position, number in why:
        of_why[row_of[prompt_id], position] = np.nan if number is None else number
    np.testing.assert_allclose(of_why, cells.learnability, rtol=0, atol=1e-9)


def test_the_characters_of_calls_are_those_of_their_names_and_arguments(database: Database) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "météo", "arguments": '{"ville": "Besançon"}'}}
    with database.write() as session:
        made = make_run(session, teachers=("a", "b"), prompts=1, calibration=1)
        run = session.get_one(Run, made.id)
        run.config = make_config("run", ("a", "b"), learnability_per="character").frozen()
        for teacher_id, calls in zip(made.teacher_ids, ([call, call], None), strict=True):
            response = make_response(session, made.prompt_ids[0], teacher_id, "Été.", tool_calls=calls)
            score = {"value": -112.0, "n_tokens": 9, "detail": {}}
            session.add(Score(response_id=response, scorer_id=run.learnability_scorer_id, **score))
    with database.read() as session:
        # 4 of the text, and twice 5 and 21 of the calls.
        expected = [-112 / 56, -112 / 4]
        assert grid.read(session, session.get_one(Run, made.id)).learnability.tolist() == [expected]
        for view in ("v_reward_matrix", "v_why_teacher"):
            found = rows(session, f"SELECT learnability FROM {view} ORDER BY position")
            assert [value for (value,) in found] == expected


def test_of_z_scores_the_reward_matrix_gives_no_reward_rather_than_another(database: Database) -> None:
    with database.write() as session:
        by_hand.fill(session)
        session.get_one(Run, 1).config = make_config("first", normalise="zscore").frozen()
    with database.read() as session:
        seen = rows(session, "SELECT reward, quality FROM v_reward_matrix WHERE run = 'first' AND prompt_id = 1")
    assert sorted(seen, key=str) == [(None, 0.0), (None, 1.0)]


def test_what_a_teacher_cost_is_unknown_when_one_of_its_responses_has_no_count(database: Database) -> None:
    with database.write() as session:
        by_hand.fill(session)
    dollars = "SELECT dollars FROM v_teacher_cost WHERE run = 'first' AND teacher = 'ada'"
    with database.read() as session:
        assert rows(session, dollars) == [(pytest.approx(0.00026),)]
    with database.write() as session:
        one = session.scalars(
            select(Response).join(Teacher).where(Teacher.name == "ada", Response.text.is_not(None)).limit(1)
        ).one()
        one.response_tokens = None
    with database.read() as session:
        assert rows(session, dollars) == [(None,)]
        (ada, _) = summary.facts(session, session.get_one(Run, 1)).teachers
        assert ada.cost is None


def test_a_response_that_ended_inside_its_reasoning_counts_as_unfinished(database: Database) -> None:
    with database.write() as session:
        by_hand.fill(session)
        session.execute(update(Response).where(Response.failure == "empty").values(failure="unfinished_reasoning: cut"))
    with database.read() as session:
        query = "SELECT teacher, failed, reasoned, unfinished, reasoning_tokens FROM v_teacher_cost WHERE run = 'first'"
        assert rows(session, f"{query} ORDER BY position") == [("ada", 0, 2, 0, 32), ("bob", 2, 0, 1, 0)]
        written = "SELECT prompt_id, reasoning, reasoning_tokens FROM v_dataset WHERE run = 'first' ORDER BY prompt_id"
        assert rows(session, written) == [(1, "Hm.", 12), (2, None, None), (3, None, None), (4, "Hm.", 20)]


def test_progress_is_what_status_says_at_every_stage(database: Database) -> None:
    with database.write() as session:
        by_hand.fill(session)
        make_run(session, name="empty", prompts=0)
    for stage in STAGES:
        with database.write() as session:
            session.execute(update(Run).values(stage=stage))
        with database.read() as session:
            for run in session.scalars(select(Run)):
                require_alike(session, run)


def test_progress_counts_every_sample_of_a_cell(database: Database) -> None:
    with database.write() as session:
        by_hand.fill(session)
        session.get_one(Run, 1).config = make_config("first", samples=3).frozen()
        make_response(session, 1, 1, sample=1)
        make_response(session, 2, 2, None, failure="empty", sample=2)
    for stage in STAGES:
        with database.write() as session:
            session.execute(update(Run).values(stage=stage))
        with database.read() as session:
            run = session.get_one(Run, 1)
            require_alike(session, run)
            counts = pipeline.progress(session, run)["calibrate"]
            # 3 prompts, 2 teachers, 3 samples; 5 first responses and 1 second one; 2 failures
            assert (counts.total, counts.done, counts.failed, counts.pending) == (18, 6, 2, 10)


def require_alike(session: Session, run: Run) -> None:
    """Require that the views of progress, missing rows and failures agree with `pipeline.progress`."""
    said = pipeline.progress(session, run)
    progress = "SELECT stage, total, done, failed, pending FROM v_progress WHERE run = :run ORDER BY place"
    assert rows(session, progress, run=run.name) == [
        (name, counts.total, counts.done, counts.failed, counts.pending) for name, counts in said.items()
    ]
    for view, count in (("v_missing", "pending"), ("v_failures", "failed")):
        listed = rows(session, f"SELECT stage, count(*) FROM {view} WHERE run = :run GROUP BY stage", run=run.name)
        owed = {name: getattr(counts, count) for name, counts in said.items() if getattr(counts, count)}
        assert {name: n for name, n in listed if name in said} == owed


def test_both_databases_give_the_views_the_same_columns(database: Database) -> None:
    with database.read() as session:
        for view, columns in COLUMNS.items():
            assert list(session.execute(text(f"SELECT * FROM {view}")).keys()) == columns.split()


#: Users rely on them: columns may be added, but never removed.
COLUMNS = {
    "v_dataset": "run prompt_id role source source_id history prompt answer response reasoning teacher model revision "
    "template_hash reason score margin finish_reason prompt_tokens response_tokens reasoning_tokens seed engine "
    "origin response_id job_id created_at sample",
    "v_progress": "run place stage total done failed pending",
    "v_teacher_cost": "run position teacher assigned responses failed prompt_tokens response_tokens reasoned "
    "unfinished reasoning_tokens dollars response_tokens_if_all dollars_if_all",
    "v_reward_matrix": "run prompt_id role position teacher response_id quality learnability reward responses",
    "v_why_teacher": "run prompt_id role position teacher router_score router_rank quality learnability is_chosen "
    "reason margin",
    "v_missing": "run place stage prompt_id teacher scorer sample",
    "v_failures": "run place stage prompt_id teacher scorer reason failure response_id job_id created_at",
    "v_jobs": "run job_id stage teacher scorer queue state first_prompt_id last_prompt_id n_prompts attempts fence "
    "worker error created_at started_at finished_at seconds",
    "v_events": "run event_id at actor job_id stage teacher scorer from_state to_state fence detail",
    "v_uses": "prompt_id run role teacher reason response_id is_answered training_id training_path trained_at",
    "v_evaluations": "student run training_id evaluation_id prompts_file scorer prompts judged failed mean created_at "
    "finished_at",
}
