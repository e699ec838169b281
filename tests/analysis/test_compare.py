"""Comparisons of strategies on a grid small enough to compute by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sqlalchemy import delete, func, select, update

from persyn.analysis import custom_strategy
from persyn.analysis.compare import Comparison, Reward, compare
from persyn.db import grid
from persyn.db.catalog import Prompt, Run, Teacher
from persyn.db.connect import Database
from persyn.db.results import Response, RouterScore, Score
from persyn.errors import UsageError
from persyn.router import strategy
from tests.factories import make_response, make_router, make_run

#: Quality of teachers a and b on two calibration prompts and four hold-out prompts.
QUALITY = [(1, 0), (1, 0), (1, 0), (1, 0), (0, 1), (0, 1)]
#: Router scores; the last hold-out prompt is misrouted.
ROUTER = [(1, 0), (1, 0), (2, 0), (1, 0), (-1, 3), (5, 0)]
#: Nats per token, opposed to quality.
LEARNABILITY = (-2.0, -1.0)
TOKENS = (10, 20)


@pytest.fixture
def run_id(database: Database) -> int:
    """A run of eight prompts, six of them in a scored grid, with a router and prices."""
    with database.write() as session:
        made = make_run(session, prompts=8, calibration=2, holdout=4)
        run = session.get_one(Run, made.id)
        run.router_id = make_router(session, made)
        for prompt_id, quality, scores in zip(made.prompt_ids, QUALITY, ROUTER, strict=False):
            for k, teacher_id in enumerate(made.teacher_ids):
                response_id = make_response(
                    session, prompt_id, teacher_id, response_tokens=TOKENS[k], prompt_tokens=100
                )
                session.add_all(
                    [
                        Score(response_id=response_id, scorer_id=run.quality_scorer_id, value=quality[k], detail={}),
                        Score(
                            response_id=response_id,
                            scorer_id=run.learnability_scorer_id,
                            value=5 * LEARNABILITY[k],
                            n_tokens=5,
                            detail={},
                        ),
                        RouterScore(
                            router_id=run.router_id, prompt_id=prompt_id, teacher_id=teacher_id, score=scores[k]
                        ),
                    ]
                )
        session.execute(update(Teacher).values(price_in=1.0, price_out=10.0))
        return made.id


def facts(database: Database, run_id: int, alpha: float) -> Comparison:
    with database.read() as session:
        return compare(session, session.get_one(Run, run_id), Reward(alpha))


def test_rewards_regrets_and_the_way_that_is_closed(database: Database, run_id: int) -> None:
    found = facts(database, run_id, 0.0)
    by_name = {fact.strategy: fact for fact in found.strategies}

    assert (found.n_holdout, found.n_calibration) == (4, 2)
    # static always takes a, which is right on two of four prompts; the router is right on three.
    assert {name: fact.reward.mean for name, fact in by_name.items()} == pytest.approx(
        {"static": 0.5, "car": 0.5, "random": 0.5, "persyn": 0.75, "oracle": 1.0}
    )
    assert {name: fact.regret.mean for name, fact in by_name.items()} == pytest.approx(
        {"static": 0.5, "car": 0.5, "random": 0.5, "persyn": 0.25, "oracle": 0.0}
    )
    closed = by_name["persyn"].gap_closed
    assert closed is not None
    assert closed.mean == pytest.approx(0.5)  # half the way from 0.5 to 1
    assert closed.low <= 0.5 <= closed.high
    assert [fact.strategy for fact in found.strategies][:2] == ["oracle", "persyn"]


def test_a_prompt_that_only_one_teacher_answered_compares_nobody(database: Database, run_id: int) -> None:
    with database.write() as session:
        last = session.scalars(select(Response).order_by(Response.prompt_id.desc(), Response.teacher_id)).first()
        assert last is not None
        session.execute(delete(Score).where(Score.response_id == last.id))
    found = facts(database, run_id, 0.0)
    by_name = {fact.strategy: fact for fact in found.strategies}

    # Of the four hold-out prompts the misrouted one, which static gets wrong too, is left out.
    assert found.n_holdout == 3
    assert by_name["static"].reward.mean == pytest.approx(2 / 3)
    assert by_name["persyn"].reward.mean == by_name["oracle"].reward.mean == pytest.approx(1.0)


def test_a_comparison_of_a_grid_that_is_not_scored_yet_says_so(database: Database, run_id: int) -> None:
    for stage, is_partial in (("score", True), ("fit_router", False)):
        with database.write() as session:
            session.get_one(Run, run_id).stage = stage
        assert facts(database, run_id, 0.0).is_partial is is_partial


def test_tokens_and_money_are_the_whole_runs(database: Database, run_id: int) -> None:
    by_name = {fact.strategy: fact for fact in facts(database, run_id, 0.0).strategies}

    grid = 6 * (10 + 20)
    assert {name: fact.tokens for name, fact in by_name.items()} == pytest.approx(
        {
            "static": grid + 2 * 10,
            "car": grid + 2 * 10,
            "persyn": grid + 2 * (3 * 10 + 20) / 4,
            "random": 8 * 15,
            "oracle": 8 * 30,
        }
    )
    # A dollar per million prompt tokens, ten per million response tokens.
    assert by_name["random"].cost == pytest.approx(8 * (100 + 15 * 10) / 1e6)
    assert by_name["persyn"].shares == pytest.approx({"a": 0.75, "b": 0.25})


def test_a_cost_that_is_not_known_of_every_teacher_is_none(database: Database, run_id: int) -> None:
    with database.write() as session:
        session.execute(update(Teacher).where(Teacher.name == "b").values(price_out=None))
        session.execute(update(Teacher).where(Teacher.name == "a").values(params_b=2.0))
        session.execute(update(Teacher).where(Teacher.name == "b").values(params_b=1.0))
    by_name = {fact.strategy: fact for fact in facts(database, run_id, 0.0).strategies}
    # Only strategies that never ask b have a known cost.
    assert by_name["strong"].cost == pytest.approx(8 * (100 + 10 * 10) / 1e6)
    assert {name for name, fact in by_name.items() if fact.cost is not None} == {"strong"}
    assert by_name["oracle"].tokens == 8 * 30


def test_another_alpha_is_computed_from_raw_scores(database: Database, run_id: int) -> None:
    by_name = {fact.strategy: fact for fact in facts(database, run_id, 1.0).strategies}
    assert by_name["static"].shares == {"b": 1.0}  # the most learnable
    assert by_name["static"].reward.mean == by_name["oracle"].reward.mean == 1.0
    assert by_name["static"].gap_closed is None
    assert by_name["static"].learnability.mean == pytest.approx(-1.0)


@pytest.mark.parametrize(("per", "learnability"), [("token", -1.0), ("character", -1.25), ("response", -5.0)])
def test_learnability_is_per_token_per_character_or_of_the_whole(
    database: Database, run_id: int, per: Any, learnability: float
) -> None:
    """Each response is "Yes." and has five tokens."""
    with database.read() as session:
        found = compare(session, session.get_one(Run, run_id), Reward(1.0, per=per))

    assert found.learnability_per == per
    assert {f.strategy: f for f in found.strategies}["static"].learnability.mean == pytest.approx(learnability)


@pytest.mark.parametrize(
    ("on", "per", "teacher", "learnability"),
    [
        ("answer", "token", "b", -5 / 5),
        ("reasoning", "token", "a", -3 / 3),
        ("reasoning", "character", "a", -3 / 6),
        ("both", "token", "b", (-5 - 9) / (5 + 4)),
        ("both", "character", "a", (-10 - 3) / (4 + 6)),
        ("both", "response", "a", -10 - 3),
    ],
)
def test_learnability_is_of_the_answer_the_reasoning_or_both(
    database: Database, run_id: int, on: Any, per: Any, teacher: str, learnability: float
) -> None:
    """The most learnable teacher: of a and b, the answers have -10 and -5 nats, the reasoning -3 of 3 and -9 of 4."""
    with database.write() as session:
        session.execute(update(Response).values(reasoning="Hmm..."))
        first = select(Response.id).join(Teacher).where(Teacher.name == "a")
        is_learnability = Score.scorer_id == session.get_one(Run, run_id).learnability_scorer_id
        for is_a, nats, tokens in ((True, -3.0, 3), (False, -9.0, 4)):
            of = Score.response_id.in_(first) if is_a else Score.response_id.not_in(first)
            parts = {"reasoning_value": nats, "reasoning_n_tokens": tokens}
            session.execute(update(Score).where(is_learnability, of).values(parts))
    with database.read() as session:
        found = compare(session, session.get_one(Run, run_id), Reward(1.0, per=per, on=on))

    static = {fact.strategy: fact for fact in found.strategies}["static"]
    assert (static.shares, found.learnability_on) == ({teacher: 1.0}, on)
    assert static.learnability.mean == pytest.approx(learnability)
    assert not found.is_own


def test_without_reasoning_both_is_the_answer_and_reasoning_is_refused(database: Database, run_id: int) -> None:
    with database.read() as session:
        run = session.get_one(Run, run_id)
        assert grid.read(session, run, on="both").learnability.tolist() == grid.read(session, run).learnability.tolist()
        assert (
            grid.read(session, run, on="answer").learnability.tolist() == grid.read(session, run).learnability.tolist()
        )
        with pytest.raises(UsageError, match="run run has no scored reasoning to compute learnability on; use answer"):
            compare(session, run, Reward(on="reasoning"))
        with pytest.raises(UsageError, match="on must be one of answer, reasoning, both, got 'all'"):
            grid.read(session, run, on="all")  # type: ignore[arg-type]


def test_an_interval_holds_the_mean_and_is_the_same_each_time(database: Database, run_id: int) -> None:
    once, again = facts(database, run_id, 0.0), facts(database, run_id, 0.0)
    assert once == again
    for fact in once.strategies:
        assert 0.0 <= fact.reward.low <= fact.reward.mean <= fact.reward.high <= 1.0
        assert 0.0 <= fact.regret.low <= fact.regret.mean <= fact.regret.high <= 1.0
        # At alpha 0 the reward is the quality.
        assert fact.quality == fact.reward
        assert -2.0 <= fact.learnability.low <= fact.learnability.mean <= fact.learnability.high <= -1.0
    oracle = once.strategies[0]
    assert (oracle.reward.low, oracle.reward.high) == (1.0, 1.0)  # all four values are 1, so every draw gives the same
    assert (oracle.regret.low, oracle.regret.high) == (0.0, 0.0)
    static = next(fact.reward for fact in once.strategies if fact.strategy == "static")
    # Two of four prompts are right; draws with 0 of 4 and 4 of 4 each have a probability of 1/16.
    assert (static.low, static.high) == (0.0, 1.0)


def test_a_function_of_ones_own_is_told_the_calibration_and_asked_about_the_hold_out(
    database: Database, run_id: int
) -> None:
    with database.write() as session:
        run = session.get_one(Run, run_id)
        table = {"kind": "python", "model": "mine:best", "revision": "sha256:1", "options": {"trust": 2}}
        run.config = {**run.config, "strategy": table}
        first, second = select(Prompt.id).where(Prompt.text == "run: prompt 0?"), Prompt.text == "run: prompt 1?"
        session.execute(update(Prompt).where(second).values(meta={"topic": "sums"}))
        # Only a's response to the first prompt has a quality.
        others = Response.prompt_id.in_(first), Response.teacher_id != select(func.min(Teacher.id)).scalar_subquery()
        lost = Score.response_id.in_(select(Response.id).where(*others)), Score.scorer_id == run.quality_scorer_id
        session.execute(delete(Score).where(*lost))

    with database.read() as session:
        question = custom_strategy.read(session, session.get_one(Run, run_id), Reward(1.0, "rank", "response"))

    assert question is not None
    spec, known = question.spec, strategy.unpack(question.spec.options["known"])
    assert (spec.engine, spec.model, spec.revision, spec.options["options"]) == (
        "strategy",
        "mine:best",
        "sha256:1",
        {"trust": 2},
    )
    assert [prompt["meta"] for prompt in known.prompts] == [{}, {"topic": "sums"}]
    assert known.prompts[0]["messages"] == [{"role": "user", "content": "run: prompt 0?"}]
    np.testing.assert_array_equal(known.quality, [[1, np.nan], [1, 0]])
    np.testing.assert_array_equal(known.learnability, [[-10, -5], [-10, -5]])  # of the whole response
    # The first prompt has one scored response, so no reward; on the second b is more learnable.
    np.testing.assert_array_equal(known.rewards, [[np.nan, np.nan], [0, 1]])
    assert (known.teachers, known.price_in.tolist(), known.price_out.tolist()) == (["a", "b"], [1, 1], [10, 10])
    assert [route.messages[0]["content"] for route in question.routes] == [f"run: prompt {n}?" for n in range(2, 6)]


def test_what_cannot_be_had_is_said(database: Database, run_id: int) -> None:
    assert facts(database, run_id, 0.0).notes == [
        f"{kind}: needs params_b of every teacher" for kind in ("strong", "mix", "family-strong")
    ]
    with database.write() as session:
        run = session.get_one(Run, run_id)
        run.config = {**run.config, "strategy": {"kind": "python", "model": "mine:best"}}
    assert facts(database, run_id, 0.0).notes[-1] == "mine:best: 'persyn compare run' evaluates it"
    with database.read() as session:
        run = session.get_one(Run, run_id)
        found = compare(session, run, scores={"mine:best": "prompt 3: strategy_error: KeyError: 'topic'"})
    assert found.notes[-1] == "mine:best: prompt 3: strategy_error: KeyError: 'topic'"
    with database.write() as session:
        session.get_one(Run, run_id).router_id = None
        bare = make_run(session, name="bare").id
    assert facts(database, run_id, 0.0).notes[-1] == "persyn: the run has no router"
    with pytest.raises(UsageError, match="run 'bare' has no scored hold-out prompts"):
        facts(database, bare, 0.0)
