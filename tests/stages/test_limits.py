"""Assignments within the limits of [strategy]."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from sqlalchemy import delete, func, select, update

import persyn
from persyn.analysis import compare, verdict
from persyn.analysis import limits as words
from persyn.config import load_config
from persyn.dataset import export
from persyn.db import grid
from persyn.db.catalog import Role, Run, RunPrompt, Teacher
from persyn.db.connect import Database
from persyn.db.results import Assignment, Response, RouterScore, Score
from persyn.db.work import Event
from persyn.errors import UsageError
from persyn.runs import run_file
from persyn.stages import assign, limits
from tests.factories import MadeRun, make_config, make_response, make_router, make_run
from tests.one_database import POSTGRESQL
from tests.run_files import write_run

TEACHERS = ("a", "b", "c")
#: Too few calibration prompts to tell whether routing pays.
CALIBRATION, TARGETS = 48, 40


def make(database: Database, *, knows: bool = True, routed: bool = True, holdout: int = 0, **strategy: Any) -> MadeRun:
    """A run to be assigned. Of six prompts, a is right on three, b on two, and c on one; a response has two tokens.

    knows:  whether the router's scores say which teacher is right; otherwise they always favour c.
    routed: whether all prompts have scores.
    """
    with database.write() as session:
        made = make_run(
            session,
            teachers=TEACHERS,
            prompts=CALIBRATION + holdout + TARGETS,
            calibration=CALIBRATION,
            holdout=holdout,
            stage="assign",
        )
        run = session.get_one(Run, made.id)
        run.router_id = make_router(session, made)
        run.config = {**run.config, "strategy": {**run.config["strategy"], "when_unsure": "route", **strategy}}
        for place, prompt_id in enumerate(made.prompt_ids):
            right = 0 if place % 6 < 3 else 1 if place % 6 < 5 else 2
            for k, teacher_id in enumerate(made.teacher_ids):
                is_of_grid = place < CALIBRATION + holdout
                score = float(k == (right if knows else 2)) * 4
                if is_of_grid:
                    response_id = make_response(session, prompt_id, teacher_id, "two words")
                    for scorer_id, value in (
                        (run.quality_scorer_id, float(k == right)),
                        (run.learnability_scorer_id, -5.0),
                    ):
                        session.add(
                            Score(response_id=response_id, scorer_id=scorer_id, value=value, n_tokens=5, detail={})
                        )
                if is_of_grid or routed:
                    session.add(
                        RouterScore(
                            router_id=run.router_id,
                            prompt_id=prompt_id,
                            teacher_id=teacher_id,
                            score=score,
                            cross_fitted=score if place < CALIBRATION else None,
                        )
                    )
        return made


def plan(database: Database, made: MadeRun) -> int:
    with database.write() as session:
        return assign.plan(session, session.get_one(Run, made.id))


def assigned(database: Database) -> list[tuple[str, str, float | None]]:
    """(reason, teacher, margin) of each prompt outside the grid, in order."""
    with database.read() as session:
        rows = session.execute(
            select(Assignment.reason, Teacher.name, Assignment.margin)
            .join(RunPrompt, RunPrompt.prompt_id == Assignment.prompt_id)
            .join(Teacher, Teacher.id == Assignment.teacher_id)
            .where(RunPrompt.role == Role.TARGET)
            .order_by(Assignment.prompt_id)
        )
        return [(reason, teacher, margin) for reason, teacher, margin in rows]


def said(database: Database, made: MadeRun) -> list[str]:
    with database.read() as session:
        return words.sentences(session, session.get_one(Run, made.id))


def test_without_room_at_its_best_teacher_a_prompt_goes_to_the_next(database: Database) -> None:
    # Of 40 prompts, 21 are best answered by a, 13 by b, and 6 by c.
    made = make(database, capacity={"a": 15})

    assert plan(database, made) == 0
    found = assigned(database)
    counts = Counter(teacher for _, teacher, _ in found)
    assert counts["a"] == 15
    assert counts["b"] >= 13
    assert counts["c"] >= 6
    # A prompt that its best teacher has no room for: the chosen teacher's score is 4 lower.
    assert Counter((reason, margin) for reason, _, margin in found) == {
        ("router: head", 4.0): 34,
        ("limits: router: head", -4.0): 6,
    }
    lines = said(database, made)
    # At alpha 0.4 and with equal learnability a right response has reward 0.6, and a wrong one 0.
    assert lines[0] == (
        "within limits: an expected reward of 0.510 per prompt over 40 prompts, for 80 response tokens; without costs "
        "and limits, 0.600, for 80 response tokens, and 6 prompts would have another teacher"
    )
    assert lines[1] == "the limit of 15 prompts for a binds: one more is worth 0.6 of reward"
    assert lines[2].startswith("a unit of the router's scores (log-odds) counts as 0.15 of reward")
    assert len(lines) == 3


def test_a_budget_in_dollars_is_kept_and_its_price_is_said(database: Database) -> None:
    made = make(database, budget=0.1)
    price(database, made)

    plan(database, made)

    # 40 responses for 0.08 dollars, and 0.02 more for ten of a.
    assert Counter(teacher == "a" for _, teacher, _ in assigned(database)) == {True: 10, False: 30}
    assert said(database, made)[1] == "the budget of $0.10 binds: one more US dollar would buy 300 of expected reward"


def price(database: Database, made: MadeRun) -> None:
    """A response of a costs 0.004 dollars, of the others 0.002."""
    with database.write() as session:
        for teacher_id, dollars in zip(made.teacher_ids, (2000.0, 1000.0, 1000.0), strict=True):
            teacher = session.get_one(Teacher, teacher_id)
            teacher.price_in, teacher.price_out = 0.0, dollars


def test_less_money_buys_less_reward_on_the_hold_out(database: Database) -> None:
    made = make(database, holdout=12)  # a is right on six of them, b on four, c on two
    price(database, made)

    with database.read() as session:
        found = compare.compare(session, session.get_one(Run, made.id)).frontier

    # Whoever is right costs 6 * 0.004 + 6 * 0.002 dollars; a alone is twice as expensive as the others.
    assert [round(point.cost, 6) for point in found] == pytest.approx([3.0, 8 / 3, 2.5, 13 / 6, 2.0, 2.0])
    assert [point.reward.mean for point in found] == pytest.approx([0.6, 0.5, 0.45, 0.35, 0.3, 0.3])
    # Six prompts are worth 0.6 each to a, for 0.002 dollars more: 0.3 per dollar and 1,000 prompts.
    assert [point.price for point in found[1:]] == pytest.approx([0.3] * 5, rel=1e-4)
    assert found[0].shares == {"a": 0.5, "b": 1 / 3, "c": 1 / 6}


def test_a_router_of_no_use_buys_nothing_and_routes_nothing(database: Database) -> None:
    made = make(database, knows=False, routed=False, min_share={"c": 0.1})

    assert plan(database, made) == 0  # no job: nothing has to be routed
    assert Counter((reason, teacher, margin) for reason, teacher, margin in assigned(database)) == {
        ("means: the router is of no measured use", "a", None): 36,
        ("limits: means: the router is of no measured use", "c", None): 4,
    }
    # The teachers' mean rewards are 0.3, 0.2 and 0.1.
    assert said(database, made)[1] == "the least of 4 prompts for c binds: one fewer is worth 0.2 of reward"


def test_equal_rewards_of_all_responses_are_assigned_by_lot(database: Database) -> None:
    made = make(database, routed=False, max_share=0.5)
    with database.write() as session:
        session.execute(update(Score).values(value=1.0))

    plan(database, made)

    counts = Counter(teacher for _, teacher, _ in assigned(database))
    assert set(counts) == set(TEACHERS)  # the first one does not get all that it has room for
    assert max(counts.values()) < 20


def test_the_means_are_said_to_decide_where_scores_count_for_nothing(database: Database) -> None:
    made = make(database, knows=False, max_share=0.5)

    plan(database, made)

    with database.read() as session:
        found = verdict.if_any(session, run := session.get_one(Run, made.id), grid.read(session, run))
    assert found is not None
    assert found.decided == (
        "decided: the teachers' mean rewards assign the remaining prompts, within the limits of [strategy]"
    )


def test_room_for_the_remaining_prompts_alone_may_not_suffice(database: Database) -> None:
    made = make(database, capacity={"a": 20, "b": 20, "c": 0})
    with database.read() as session:
        said = limits.require(session, session.get_one(Run, made.id))
    assert said == [
        "calibration prompts that get no reward are assigned with the others, and the limits of [strategy] may be too "
        "tight for that; if none got one, capacity and max_share leave room for 40 of 88 prompts"
    ]

    with database.write() as session:
        of_first = select(Response.id).where(Response.prompt_id == made.prompt_ids[0])
        session.execute(delete(Score).where(Score.response_id.in_(of_first)))
    with pytest.raises(UsageError, match="leave room for 40 of 41 prompts"):
        plan(database, made)

    with database.write() as session:
        run = session.get_one(Run, made.id)
        run.config = {**run.config, "strategy": {**run.config["strategy"], "capacity": {"a": 48}}}
        assert limits.require(session, run) == []


def test_prompts_are_routed_first_and_only_once(database: Database) -> None:
    made = make(database, routed=False, max_share=0.4)

    assert plan(database, made) > 0
    assert assigned(database) == []


def decided(database: Database, made: MadeRun) -> tuple[str | None, bool]:
    """What is said of the decision, and whether the manifest of a dataset names the router."""
    with database.read() as session:
        run = session.get_one(Run, made.id)
        found = verdict.if_any(session, run, grid.read(session, run))
        return found and found.decided, export._router(session, run) is not None


def test_scores_count_where_the_verdict_is_not_to_route_and_no_teacher_may_answer_all(database: Database) -> None:
    # 48 calibration prompts never tell, so that without limits a would answer all of them.
    made = make(database, when_unsure="static", max_share={"a": 0.5})

    plan(database, made)

    assert Counter((reason, teacher) for reason, teacher, _ in assigned(database)) == {
        ("router: head", "a"): 20,
        ("router: head", "b"): 13,
        ("router: head", "c"): 6,
        ("limits: router: head", "b"): 1,
    }
    assert decided(database, made) == (
        "decided: the router's scores, as far as they predict rewards, assign the remaining prompts, within the limits "
        "of [strategy]; the verdict is about a answering all of them, without costs and limits",
        True,
    )


def test_where_scores_are_of_no_use_the_means_decide_and_not_the_verdict(database: Database) -> None:
    made = make(database, knows=False, when_unsure="static", max_share={"a": 0.5})

    plan(database, made)

    means = "means: the router is of no measured use"
    found = Counter((reason, teacher) for reason, teacher, _ in assigned(database))
    assert found == {(means, "a"): 20, (f"limits: {means}", "b"): 20}
    assert not decided(database, made)[1]


@pytest.mark.parametrize("limit", [{"max_share": {"b": 0.5}}, {"min_share": {"a": 0.5}}, {"budget": 0.08}])
def test_the_verdict_decides_where_the_best_teacher_may_answer_all(database: Database, limit: dict[str, Any]) -> None:
    made = make(database, when_unsure="static", **limit)  # 40 responses of 2 tokens are 0.08 thousand

    plan(database, made)

    assert {(reason, teacher) for reason, teacher, _ in assigned(database)} == {("verdict: cannot tell", "a")}
    assert decided(database, made) == (
        "decided on the verdict 'cannot tell': the teachers' mean rewards assign the remaining prompts, within the "
        "limits of [strategy]",
        False,
    )


def test_with_a_weight_of_costs_scores_count(database: Database) -> None:
    made = make(database, when_unsure="static", cost_weight=0.1)

    plan(database, made)

    assert {reason for reason, _, _ in assigned(database)} == {"router: head"}


def test_the_assignment_is_one_transaction_and_the_same_after_a_kill(database: Database) -> None:
    made = make(database, capacity={"a": 15}, min_share={"c": 0.2})
    with database.write() as session:
        assign.plan(session, session.get_one(Run, made.id))
        session.rollback()
    assert assigned(database) == []

    plan(database, made)
    first = assigned(database)
    with database.write() as session:
        session.execute(delete(Assignment))
        session.execute(delete(Event))
    plan(database, made)

    assert assigned(database) == first


def write(folder: Path, *given: str, seconds: float = 0.0) -> Path:
    """A run file with limits, and prices of 12, 48 and 192 dollars for a thousand responses of the fake engine.

    seconds: how long it takes to route a prompt.
    """
    # With this seed, the fake router's scores happen to predict rewards.
    text = (file := write_run(folder, prompts=120, seed=0)).read_text()
    text = text.replace('when_unsure = "route"', "\n".join(['when_unsure = "route"', *given]))
    slow = f'engine = "fake"\noptions = {{ latency_seconds = {seconds} }}\n[strategy]'
    text = text.replace('engine = "fake"\n[strategy]', slow)
    for name, price in {"ada": 1000, "bob": 4000, "cyd": 16000}.items():
        text = text.replace(f'family = "{name}"\np', f'price_in = 0\nprice_out = {price}\nfamily = "{name}"\np')
    file.write_text(text)
    return file


@POSTGRESQL
def test_a_run_killed_while_it_routes_keeps_its_limits_in_the_end(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    file = write(tmp_path, "budget = 4.0", "capacity = { bob = 30 }", "min_share = { cyd = 0.05 }", seconds=0.03)
    told = {**os.environ, "PERSYN_HOME": str(tmp_path / "home"), "PERSYN_DATABASE_URL": database_url}
    persyn_command = [sys.executable, "-m", "persyn.cli", "run"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*persyn_command, "start", str(file)], env=told, start_new_session=True, **quiet)
    deadline = time.monotonic() + 90
    while n_routed(database) < 10:
        assert process.poll() is None
        assert time.monotonic() < deadline, "no prompt was routed"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert n_routed(database) < 108

    subprocess.run([*persyn_command, "resume", "test"], env=told, check=True, **quiet)

    counts = Counter(teacher for _, teacher, _ in assigned(database))
    shown = subprocess.run([*persyn_command, "status", "test"], env=told, check=True, capture_output=True, text=True)
    assert counts.total() == 108
    assert counts["bob"] <= 30
    assert counts["cyd"] >= 6  # 5 % of 108, rounded up
    assert 0.012 * counts["ada"] + 0.048 * counts["bob"] + 0.192 * counts["cyd"] <= 4.0 + 1e-6
    assert "within limits: an expected reward of " in shown.stdout
    who = "the router's scores, as far as they predict rewards, assign the remaining prompts"
    assert f"{who}, within the limits of [strategy]" in shown.stdout


def n_routed(database: Database) -> int:
    """Prompts outside the grid that have scores."""
    with database.read() as session:
        prompts = select(func.count(RouterScore.prompt_id.distinct())).select_from(RouterScore)
        prompts = prompts.join(RunPrompt, RunPrompt.prompt_id == RouterScore.prompt_id)
        return session.scalars(prompts.where(RunPrompt.role == Role.TARGET)).one()


def test_a_budget_that_cannot_be_kept_is_refused_with_the_least_that_is_possible(database: Database) -> None:
    made = make(database, budget=0.079)

    with pytest.raises(UsageError) as refused:
        plan(database, made)

    # 40 responses of two tokens each.
    assert str(refused.value).startswith(
        "the limits of [strategy] cannot be kept together: the least possible cost is 0.08 (1,000 response tokens), "
        "and the budget 0.079. To use others, start a run under another name"
    )
    assert assigned(database) == []


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("capacity = { ada = 50, bob = 40, cyd = 17 }", "capacity and max_share leave room for 107 of 108 prompts"),
        ("min_share = 0.4", "min_share is for 132 prompts together, and there are 108"),
        (
            "min_share = { ada = 0.5 }\nmax_share = 0.4",
            "teacher ada has to answer at least 54 of 108 prompts, and at most 43",
        ),
    ],
)
def test_numbers_that_conflict_are_refused_at_the_start(tmp_path: Path, given: str, says: str) -> None:
    with persyn.open(f"sqlite:///{tmp_path / 'p.db'}", home=tmp_path) as store:
        with pytest.raises(UsageError, match=says):
            store.start(write(tmp_path, given))
        assert store.runs() == []


def test_costs_need_prices_of_all_teachers_or_of_none(tmp_path: Path) -> None:
    file = write(tmp_path, "cost_weight = 1.0")
    file.write_text(file.read_text().replace("price_out = 4000", ""))
    says = "compare costs, and bob has no price_in and price_out"
    with persyn.open(f"sqlite:///{tmp_path / 'p.db'}", home=tmp_path) as store, pytest.raises(UsageError, match=says):
        store.start(file)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("capacity = { dan = 5 }", r"`strategy.capacity` names dan; the teachers are ada, bob, cyd"),
        ("max_share = 1.5", "`strategy.max_share` must be"),
        ("budget = -1", "`strategy.budget` must be a number >= 0, got -1"),
    ],
)
def test_a_limit_that_means_nothing_is_an_error_of_the_run_file(tmp_path: Path, given: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        run_file.read(write(tmp_path, given))


def test_limits_are_only_for_the_routers_strategy(tmp_path: Path) -> None:
    file = write(tmp_path, "max_share = 0.5")
    file.write_text(file.read_text().replace('kind = "persyn"', 'kind = "static"'))

    with pytest.raises(UsageError, match="is only for strategy persyn, whose expected rewards are known; got static"):
        run_file.read(file)


def test_a_run_file_without_limits_is_frozen_as_it_was_before_there_were_any() -> None:
    config = make_config()

    assert set(config.frozen()["strategy"]) == {
        "kind", "when_unsure", "ratio", "beta", "model", "revision", "gpus", "options",
    }  # fmt: skip
    limited = replace(config, strategy=replace(config.strategy, budget=2.0))
    assert load_config(limited.frozen()) == limited
    assert limited.digest() != config.digest()
