"""The facts of a report on a grid small enough to compute by hand."""

from __future__ import annotations

from datetime import timedelta

import pytest

from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.errors import UsageError
from persyn.report import document, figures, gather
from tests.factories import make_assignment, make_job, make_prompt, make_response, make_run
from tests.report.conftest import HOSTILE, NOON, Store

A, B = HOSTILE[:2]


def test_teachers_stand_where_their_means_are(store: Store) -> None:
    report = store.report
    assert [
        (t.teacher, t.quality and t.quality.mean, t.learnability and t.learnability.mean) for t in report.means
    ] == [
        (A, pytest.approx(4 / 6), pytest.approx(-2.0)),
        (B, pytest.approx(2 / 6), pytest.approx(-1.0)),
    ]
    a = report.means[0]
    assert a.quality is not None
    assert a.quality.low < 4 / 6 < a.quality.high
    assert a.learnability is not None
    assert (a.learnability.low, a.learnability.high) == (-2.0, -2.0)  # all prompts have the same value


def test_rewards_are_spread_as_they_are(store: Store) -> None:
    report = store.report
    # At alpha 0.4, a has 0.6 on four prompts and 0 on two; b has 0.4 and 1.
    assert report.rewards is not None
    assert [teacher.mean for teacher in report.rewards.teachers] == pytest.approx([0.4, 0.6])
    places = [{place: n for place, n in enumerate(t.counts) if n} for t in report.rewards.teachers]
    assert places == [{0: 2, 14: 4}, {9: 4, 23: 2}]  # 24 bins from 0 to 1


def test_the_router_is_measured_on_the_hold_out(store: Store) -> None:
    report = store.report
    assert report.hits is not None
    assert (report.hits.n_prompts, report.hits.router, report.hits.static, report.hits.random) == (
        4,
        [0.75, 1.0],
        [0.5, 1.0],
        [0.5, 1.0],
    )
    assert sum(bin_.n_preferences for bin_ in report.reliability) == 4
    # Two were predicted with 0.98 and 0.99 and equal weight; one was correct.
    assert report.reliability[-1].observed_frequency == pytest.approx(0.5)
    assert report.reliability[-1].predicted == pytest.approx((0.98201 + 0.99331) / 2, abs=1e-4)


def test_who_wins_goes_by_alpha_and_equals_share(store: Store) -> None:
    report = store.report
    assert report.alphas is not None
    by_alpha = {point.alpha: point for point in report.alphas.points}
    assert by_alpha[0.0].winners == pytest.approx([4 / 6, 2 / 6])
    assert by_alpha[0.5].winners == pytest.approx([2 / 6, 4 / 6])  # ties on four prompts
    assert by_alpha[1.0].winners == [0.0, 1.0]
    assert (by_alpha[0.0].best, by_alpha[1.0].best) == (0, 1)
    assert by_alpha[0.4].strategies["persyn"] == pytest.approx((0.6 + 0.6 + 1 + 0) / 4)
    assert report.comparison is not None
    assert report.comparison.alpha == 0.4


def test_prompts_are_counted_by_group_and_teacher(store: Store) -> None:
    report = store.report
    # The first field's name cannot be addressed, "n" is not a text, and "topic" has two values.
    assert report.groups is not None
    assert report.groups.field == "topic"
    shared = dict(zip(report.groups.groups, zip(*report.groups.prompts, strict=True), strict=True))
    # a has prompts 0 to 3 and 6, b has 4, 5 and 7; the topics alternate.
    assert shared == {HOSTILE[2]: (3, 1), HOSTILE[3]: (2, 2)}


def test_any_field_groups_prompts_and_its_rare_values_are_taken_together(database: Database) -> None:
    with database.write() as session:
        big = make_run(session, name="many", prompts=0)
        for number in range(20):
            level = number if number < 14 else 0
            prompt_id = make_prompt(session, f"many {number}", meta={"level": level} if number != 13 else {})
            make_assignment(session, big.id, prompt_id, big.teacher_ids[number % 2])
    with database.read() as session:
        found = gather.gather(session, session.get_one(Run, big.id), group_by="level").groups

    assert found is not None
    assert found.groups[0] == "0"  # seven prompts
    assert [sum(column) for column in zip(*found.prompts, strict=True)] == [7, *[1] * 11, 2]
    assert found.groups[-1] == "(others)"


@pytest.mark.parametrize(("field", "said"), [("colour", "has a field 'colour'"), ('a"b', "quote")])
def test_a_field_that_cannot_group_is_refused(store: Store, field: str, said: str) -> None:
    with store.database.read() as session, pytest.raises(UsageError, match=said):
        gather.gather(session, session.get_one(Run, store.made.id), group_by=field)


def test_what_was_spent_is_in_tokens_and_in_dollars(store: Store) -> None:
    report = store.report
    assert report.savings is not None
    # Six grid prompts with 10 + 20 tokens and one more with 10, of 8 x 30.
    assert (report.savings.tokens, report.savings.tokens_generate_all) == (190, 240)
    # A dollar per million prompt tokens, 100 each, and ten per million response tokens.
    assert report.savings.cost == pytest.approx((6 * (200 + 300) + 200) / 1e6)
    assert report.savings.cost_generate_all == pytest.approx(8 * (200 + 300) / 1e6)


def test_what_a_run_spent_that_is_not_done_is_what_it_spent_so_far(database: Database) -> None:
    with database.write() as session:
        made = make_run(session, prompts=4, calibration=1)
        job_id = make_job(session, made.id)
        for teacher_id in made.teacher_ids:
            make_response(session, made.prompt_ids[0], teacher_id, response_tokens=10, job_id=job_id)
    with database.read() as session:
        found = gather.gather(session, session.get_one(Run, made.id))

    assert found.savings is not None
    assert "The teachers generated 20 tokens so far, about 25% of the 80 that" in " ".join(document.headlines(found))
    assert figures.savings(found.savings).says == "This run so far, response tokens: 20 of about 80."


def test_where_there_is_no_grid_that_is_why_nothing_can_be_saved(database: Database) -> None:
    with database.write() as session:
        made = make_run(session, prompts=1)
        make_assignment(session, made.id, made.prompt_ids[0], made.teacher_ids[0])
        make_response(session, made.prompt_ids[0], made.teacher_ids[0], response_tokens=10)
    with database.read() as session:
        absent = gather.gather(session, session.get_one(Run, made.id)).absent

    assert absent["savings"] == "there is no calibration grid to estimate generate-all from"


def test_work_is_spread_over_the_time_of_its_job(store: Store) -> None:
    report = store.report
    assert report.timeline is not None
    (stage,) = report.timeline.stages
    assert (report.timeline.seconds, stage.stage) == (100.0, "generate")
    half = len(stage.rows) // 2
    assert (sum(stage.rows[:half]), sum(stage.rows[half:])) == pytest.approx((5.0, 15.0))


def test_a_stage_that_is_not_done_is_not_drawn_as_if_it_were(database: Database) -> None:
    with database.write() as session:
        made = make_run(session, prompts=40)
        times = {"started_at": NOON, "finished_at": NOON + timedelta(seconds=100)}
        make_job(session, made.id, state="done", n_prompts=10, **times)
        make_job(session, made.id, n_prompts=30)
    with database.read() as session:
        timeline = gather.gather(session, session.get_one(Run, made.id)).timeline

    assert timeline is not None
    picture = figures.progress(timeline)
    assert list(picture.figure.axes[0].lines[0].get_ydata())[-1] == 0.25
    assert picture.says == "In 100.0 seconds: generate 10 of 40 rows."


@pytest.mark.parametrize(("state", "said"), [(RunState.DONE, "40 rows"), (RunState.CANCELLED, "40 of 70 rows")])
def test_what_was_planned_again_counts_once(database: Database, state: RunState, said: str) -> None:
    with database.write() as session:
        made = make_run(session, prompts=40, stage="generate")
        session.get_one(Run, made.id).state = state
        times = {"started_at": NOON, "finished_at": NOON + timedelta(seconds=100)}
        make_job(session, made.id, state="cancelled", n_prompts=30)
        for n_prompts in (10, 30):
            make_job(session, made.id, state="done", n_prompts=n_prompts, **times)
    with database.read() as session:
        timeline = gather.gather(session, session.get_one(Run, made.id)).timeline

    assert timeline is not None
    assert figures.progress(timeline).says == f"In 100.0 seconds: generate {said}."


def test_a_job_that_ended_as_it_began_has_its_rows(database: Database) -> None:
    """The run's last job, at its last instant: its stage has no other job."""
    with database.write() as session:
        made = make_run(session, prompts=40)
        end = NOON + timedelta(seconds=100)
        make_job(session, made.id, stage="calibrate", state="done", n_prompts=10, started_at=NOON, finished_at=end)
        make_job(session, made.id, stage="assign", state="done", n_prompts=30, started_at=end, finished_at=end)
    with database.read() as session:
        timeline = gather.gather(session, session.get_one(Run, made.id)).timeline

    assert timeline is not None
    assert figures.progress(timeline).says == "In 100.0 seconds: calibrate 10 rows, assign 30 rows."


def test_examples_show_the_chosen_response_beside_the_best_of_the_others(store: Store) -> None:
    report, made = store.report, store.made
    first, second, alone = report.examples

    assert (first.prompt_id, first.text) == (made.prompt_ids[0], f"0: {HOSTILE[0]}")
    assert (first.chosen.teacher, first.chosen.text, first.chosen.reward) == (A, f"{HOSTILE[0]} by 0", 0.6)
    assert first.best_other is not None
    assert (first.best_other.teacher, first.best_other.quality, first.best_other.reward) == (B, 0.0, 0.4)
    assert second.chosen.teacher == B
    # Only b was asked about the last prompt, and failed: no example.
    assert (alone.prompt_id, alone.role, alone.best_other) == (made.prompt_ids[6], "target", None)


def test_failures_are_counted_by_their_first_word(store: Store) -> None:
    report = store.report
    assert [(f.stage, f.reason, f.rows) for f in report.failures] == [("generate", "refused", 1)]


def test_a_run_that_has_just_begun_has_a_report_of_what_is_missing(database: Database) -> None:
    with database.write() as session:
        made = make_run(session, prompts=4, calibration=1, holdout=1)
    with database.read() as session:
        found = gather.gather(session, session.get_one(Run, made.id))

    assert (found.comparison, found.hits, found.alphas, found.rewards, found.timeline, found.savings) == (None,) * 6
    assert (found.examples, found.groups, found.router) == ([], None, None)
    assert set(found.absent) == {
        "strategies",
        "the router on the hold-out",
        "the router curve",
        "shares by group",
        "savings",
        "work over time",
    }
    assert figures.pictures(found) == []
    said = "The run is not done: it is running in stage calibrate, with 4 rows"
    assert said in document.html(found, [])
    assert said in document.markdown(found, []).replace("\\", "")
