"""Second choices, job by job: who is asked next, what is recorded, and that nothing is lost or asked twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event, func, select, update

from persyn.analysis import audit, second_choices, trace
from persyn.config import load_config
from persyn.db.catalog import Prompt, Role, Run, RunPrompt, RunState, Teacher
from persyn.db.connect import Database
from persyn.db.results import Assignment, Fallback, Response, Score
from persyn.db.work import Event, Job, JobState
from persyn.jobs import queue
from persyn.llm.protocols import Failed, Generate, Generated, Judge, Judged, Result
from persyn.runs import pipeline
from persyn.stages import assign, fallback, unassigned
from persyn.stages.batch import Done
from persyn.stages.registry import STAGES
from tests.factories import MadeRun, make_assignment, make_response, make_run
from tests.one_database import SQLITE
from tests.stages.test_limits import make as make_limited

TEACHERS = ("a", "b", "c")
#: What a teacher may reply with, besides a text.
CUT = "cut off at max_tokens"
Reply = Callable[[str, int], str]
"""What a teacher says to the prompt of some number."""


class Jobs:
    """Works the jobs of a run in this process, in a worker's transactions, and notes what was asked.

    reply: a text, `CUT`, or a failure that begins with "!".
    judge: the quality of a response.
    """

    def __init__(
        self, database: Database, made: MadeRun, reply: Reply, judge: Callable[[str], float] | None = None
    ) -> None:
        self.database, self.made, self.reply, self.judge = database, made, reply, judge
        self.asked: list[tuple[str, int]] = []
        self.judged: list[tuple[int, int | None]] = []
        with database.read() as session:
            self.names = {each: session.get_one(Teacher, each).name for each in made.teacher_ids}

    def plan(self) -> None:
        with self.database.write() as session:
            pipeline.advance(session, self.made.id, actor="me")

    def one(self) -> bool:
        with self.database.write() as session:
            job = queue.claim(session, owner="me", run_id=self.made.id)
            if job is None:
                return False
            batch = STAGES[job.stage].load(session, job)
        done = [Done(request, self._answer(request, job), "test") for request in batch.requests]
        with self.database.write() as session:
            assert queue.hold(session, job)
            STAGES[job.stage].save(session, job, done)
            pipeline.complete(session, job, owner="me")
        return True

    def rest(self) -> None:
        while self.one():
            pass

    def all(self) -> None:
        self.plan()
        self.rest()
        with self.database.read() as session:
            run = session.get_one(Run, self.made.id)
            assert (run.state, run.error) == (RunState.DONE, None)
            assert [str(found) for found in audit.audit(session, run)] == []

    def _answer(self, request: Any, job: queue.Claim) -> Result:
        if isinstance(request, Judge):
            assert self.judge is not None
            self.judged.append((request.id, job.scorer_id))
            return Judged(request.id, self.judge(request.response), 1)
        assert isinstance(request, Generate)
        assert job.teacher_id is not None
        teacher, prompt_id = self.names[job.teacher_id], request.id // 100
        self.asked.append((teacher, prompt_id))
        said = self.reply(teacher, self.made.prompt_ids.index(prompt_id))
        if said.startswith("!"):
            return Failed(request.id, said[1:])
        return Generated(request.id, said, "length" if said == CUT else "stop", 5, 7, 0.1)


def make(database: Database, table: dict[str, Any], *, prompts: int = 2, **generation: Any) -> MadeRun:
    """A run whose prompts are all assigned to a; b and c are next."""
    with database.write() as session:
        made = make_run(session, teachers=TEACHERS, prompts=prompts, stage="generate")
        run = session.get_one(Run, made.id)
        run.config = {**run.config, "strategy": {"kind": "random"}, "fallback": table, "generation": generation}
        run.learnability_scorer_id = None
        for prompt_id in made.prompt_ids:
            further = made.teacher_ids[1:]
            first = unassigned.first_sample(run)
            make_assignment(session, made.id, prompt_id, made.teacher_ids[0], score=2.0, further=further, sample=first)
        return made


def assigned(database: Database, made: MadeRun) -> list[tuple[str, int, str]]:
    """(teacher, number of the choice, reason) of each prompt."""
    with database.read() as session:
        columns = Teacher.name, Assignment.choice, Assignment.reason
        found = select(*columns).join(Teacher, Teacher.id == Assignment.teacher_id).order_by(Assignment.prompt_id)
        return [tuple(row) for row in session.execute(found.where(Assignment.run_id == made.id))]


def left(database: Database, made: MadeRun) -> list[tuple[int, str, str, str | None]]:
    """(number of the choice, teacher, cause, failure) of the responses that were not used."""
    with database.read() as session:
        columns = Fallback.choice, Teacher.name, Fallback.cause, Fallback.failure
        found = select(*columns).join(Teacher, Teacher.id == Fallback.teacher_id)
        of_run = found.where(Fallback.run_id == made.id).order_by(Fallback.prompt_id, Fallback.choice)
        return [tuple(row) for row in session.execute(of_run)]


@SQLITE
@pytest.mark.parametrize(
    ("said", "conditions"),
    [
        ("!refused: no", {"refused": "refused", "failed": "failed"}),
        ("!too_long: 9 tokens, the model takes 8", {"too_long": "too_long", "failed": "failed"}),
        ("!killed_engine: it died", {"failed": "failed"}),
        (CUT, {"truncated": "truncated"}),
        ("fine", {}),
    ],
)
@pytest.mark.parametrize("condition", ["failed", "truncated", "refused", "too_long"])
def test_a_response_is_left_under_the_conditions_that_it_meets(
    database: Database, said: str, conditions: dict[str, str], condition: str
) -> None:
    made = make(database, {"on": [condition]}, prompts=1)
    Jobs(database, made, lambda teacher, _: said if teacher == "a" else "fine").all()

    if condition in conditions:
        failure = said[1:] if said.startswith("!") else None
        assert left(database, made) == [(1, "a", conditions[condition], failure)]
        assert assigned(database, made) == [("b", 2, f"fallback: {condition}")]
    else:
        assert left(database, made) == []
        assert assigned(database, made) == [("a", 1, "router")]


def test_of_several_responses_one_with_a_text_is_enough_to_return_to_their_teacher(database: Database) -> None:
    said = {"a": ["!refused: no"] * 2, "b": ["!refused: no", CUT], "c": ["!refused: no"] * 2}
    made = make(database, {"attempts": 2}, prompts=1, samples=2, keep="all")
    Jobs(database, made, lambda teacher, prompt: said[teacher].pop(0)).all()

    assert assigned(database, made) == [("b", 2, fallback.USED_UP)]
    assert [failure for *_, failure in left(database, made)] == ["refused: no", None, "refused: no"]


def test_a_prompt_goes_on_until_a_response_is_used_or_none_is_left(database: Database) -> None:
    replies = {
        ("a", 0): "!refused: no",  # b answers
        ("a", 1): "!refused: no",  # c answers
        ("b", 1): CUT,
        ("a", 2): "!refused: no",  # nobody does; b's response has a text
        ("b", 2): CUT,
        ("c", 2): "!empty: nothing",
        ("a", 3): "!refused: no",  # nobody has a text
        ("b", 3): "!refused: no",
        ("c", 3): "!refused: no",
    }
    made = make(database, {"attempts": 2}, prompts=5)
    jobs = Jobs(database, made, lambda teacher, prompt: replies.get((teacher, prompt), f"{teacher} knows"))
    jobs.all()

    assert assigned(database, made) == [
        ("b", 2, "fallback: failed"),
        ("c", 3, "fallback: truncated"),
        ("b", 2, fallback.USED_UP),
        ("a", 1, fallback.USED_UP),
        ("a", 1, "router"),
    ]
    assert len(jobs.asked) == len(set(jobs.asked)) == 2 + 3 + 3 + 3 + 1  # of prompts 0 to 4
    with database.read() as session:
        run = session.get_one(Run, made.id)
        assert second_choices.sentences(session, run) == [
            "9 responses met a condition of [fallback] (failed 7, truncated 2; a 4, b 3, c 2), and 3 prompts have "
            "another teacher",
            "for 2 prompts no further teacher was left or had room; they keep their first response with a text",
        ]
        found = trace.trace(session, run, made.prompt_ids[1])
        assert [(row["choice"], row["teacher"], row["cause"]) for row in found.choices] == [
            (1, "a", "failed"),
            (2, "b", "truncated"),
        ]
        assert found.choices[0]["score"] == 2.0
        assert (found.teacher, found.assignment["choice"], found.assignment["score"]) == ("c", 3, None)
        events = session.scalars(select(Event.detail).where(Event.run_id == made.id, Event.job_id.is_(None))).all()
        assert [each["fallback"] for each in events if "fallback" in each] == [
            {"failed": 4},
            {"failed": 1, "truncated": 2},
            {"failed": 2},
        ]


@SQLITE
def test_no_more_teachers_are_asked_than_attempts_allow(database: Database) -> None:
    made = make(database, {"attempts": 1}, prompts=1)
    jobs = Jobs(database, made, lambda teacher, _: "!refused: no")
    jobs.all()

    assert [teacher for teacher, _ in jobs.asked] == ["a", "b"]
    assert assigned(database, made) == [("a", 1, fallback.USED_UP)]
    with database.write() as session:  # a choice that nobody recorded
        session.execute(update(Assignment).values(choice=4))
        found = [(each.rule, each.found) for each in audit.audit(session, session.get_one(Run, made.id))]
        assert found == [("choice", "it has choice 4, and 2 choices are recorded as not used")]


@SQLITE
def test_without_another_teacher_a_prompt_keeps_its_failure(database: Database) -> None:
    made = make(database, {}, prompts=1)
    with database.write() as session:
        session.execute(update(Assignment).values(further=[]))
    Jobs(database, made, lambda teacher, _: "!refused: no").all()

    assert left(database, made) == [(1, "a", "failed", "refused: no")]
    assert assigned(database, made) == [("a", 1, fallback.USED_UP)]


def test_a_response_of_another_run_is_left_and_used_without_a_request(database: Database) -> None:
    made = make(database, {"attempts": 2}, prompts=1)
    with database.write() as session:
        make_response(session, made.prompt_ids[0], made.teacher_ids[0], None, failure="refused: no")
        make_response(session, made.prompt_ids[0], made.teacher_ids[1], CUT, finish_reason="length")
        make_response(session, made.prompt_ids[0], made.teacher_ids[2])
    jobs = Jobs(database, made, lambda teacher, _: "!never asked")
    jobs.all()

    assert jobs.asked == []
    assert assigned(database, made) == [("c", 3, "fallback: truncated")]


@SQLITE
def test_of_several_rows_none_may_be_usable(database: Database) -> None:
    made = make(database, {}, samples=2, keep="all")
    said = {"a": iter([CUT, CUT, CUT, "fine"])}  # of the first prompt, then of the second
    jobs = Jobs(database, made, lambda teacher, _: next(said.get(teacher, iter(["fine"]))))
    jobs.all()

    assert assigned(database, made) == [("b", 2, "fallback: truncated"), ("a", 1, "router")]


@SQLITE
def test_a_teacher_without_a_correct_sample_is_left(database: Database) -> None:
    made = make(database, {"on": ["wrong"], "attempts": 1}, samples=2, keep="correct")
    jobs = Jobs(database, made, lambda teacher, prompt: f"{teacher} {prompt}", judge=lambda text: float(text == "b 0"))
    jobs.all()

    assert assigned(database, made) == [("b", 2, "fallback: wrong"), ("a", 1, fallback.USED_UP)]
    with database.read() as session:
        rejected = session.scalars(select(Assignment.rejected).order_by(Assignment.prompt_id)).all()
        assert rejected == [False, True]


class Interrupted(Exception):
    """The process ends here, as far as the database can tell."""


@contextmanager
def interrupted(database: Database, statement: str) -> Iterator[None]:
    """Break off the transaction at the first statement that begins so."""

    def look(*arguments: Any) -> None:
        if arguments[2].startswith(statement):
            raise Interrupted

    event.listen(database.engine, "before_cursor_execute", look)
    try:
        yield
    finally:
        event.remove(database.engine, "before_cursor_execute", look)


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO fallbacks",
        "UPDATE assignments SET teacher_id",
        "UPDATE assignments SET further",
        "INSERT INTO jobs",
    ],
)
def test_a_move_that_is_interrupted_is_made_again_as_a_whole(database: Database, statement: str) -> None:
    made = make(database, {"attempts": 2}, prompts=20)
    jobs = Jobs(database, made, lambda teacher, prompt: "fine" if (prompt + ord(teacher)) % 3 == 0 else "!refused: no")
    jobs.plan()
    with pytest.raises(Interrupted), interrupted(database, statement):
        jobs.rest()
    with database.write() as session:  # its lease expires
        queue.sweep(session, actor="me", dead_owners=["me"])
        assert session.scalars(select(func.count()).select_from(Fallback)).one() == 0
    jobs.all()

    kept = {teacher for teacher, _, _ in assigned(database, made)}
    assert kept == {"a", "b", "c"}
    with database.read() as session:
        texts = (
            select(func.count())
            .select_from(Assignment)
            .join(
                Response, (Response.prompt_id == Assignment.prompt_id) & (Response.teacher_id == Assignment.teacher_id)
            )
        )
        assert session.scalars(texts.where(Response.text.is_not(None))).one() == 20
    # What was not saved is asked again: the last job, once.
    repeated = len(jobs.asked) - len(set(jobs.asked))
    assert repeated <= 8


def test_responses_are_scored_as_their_jobs_end_and_wrong_ones_are_left(database: Database) -> None:
    made = make(database, {"on": ["wrong"]}, prompts=20, check=True)
    jobs = Jobs(database, made, lambda teacher, prompt: f"{teacher} {prompt}", judge=lambda text: float(text != "a 3"))
    jobs.plan()
    assert jobs.one()
    with database.read() as session:
        waiting = select(Job.scorer_id).where(Job.state == JobState.QUEUED)
        assert {each is None for each in session.scalars(waiting)} == {True, False}  # both kinds can be claimed
    jobs.all()

    assert len(jobs.judged) == len(set(jobs.judged)) == 21
    assert [row for row in assigned(database, made) if row[1] > 1] == [("b", 2, "fallback: wrong")]
    assert left(database, made) == [(1, "a", "wrong", None)]


def test_stored_responses_are_scored_once_beside_new_ones(database: Database) -> None:
    made = make(database, {"on": ["failed"]}, prompts=20, check=True)
    with database.write() as session:
        for prompt_id in made.prompt_ids[::2]:
            make_response(session, prompt_id, made.teacher_ids[0], "stored")
    jobs = Jobs(database, made, lambda teacher, prompt: f"{teacher} {prompt}", judge=lambda text: 1.0)
    jobs.plan()
    with database.write() as session:
        session.execute(update(Job).where(Job.scorer_id.is_not(None)).values(priority=1))
    assert jobs.one()  # a's responses, which a job that follows is to score
    with database.write() as session:
        session.execute(update(Job).where(Job.follows_job_id.is_not(None)).values(priority=2))
        session.execute(update(Job).where(Job.teacher_id.is_not(None)).values(priority=2))
        planned = queue.claim(session, owner="other", run_id=made.id)
        assert planned is not None
        assert planned.follows_job_id is None
        batch = STAGES["generate"].load(session, planned)
        assert {request.response for request in batch.requests if isinstance(request, Judge)} == {"stored"}
        assert queue.release(session, planned, owner="other")
    jobs.all()

    assert len(jobs.judged) == len(set(jobs.judged)) == 20
    with database.read() as session:
        assert session.scalars(select(func.count()).select_from(Score)).one() == 20


@SQLITE
def test_a_further_choice_keeps_capacities(database: Database) -> None:
    # Of 40 prompts, 21 are best answered by a, 13 by b, and 6 by c.
    made = make_limited(database, capacity={"b": 15, "c": 7})
    with database.write() as session:
        run = session.get_one(Run, made.id)
        run.config = {**run.config, "fallback": {"attempts": 2}}
        run.stage = "assign"
        assert assign.plan(session, run) == 0
        run.stage = "generate"
    given = Jobs(database, made, lambda teacher, _: "!refused: no" if teacher == "a" else "fine")
    given.all()

    with database.read() as session:
        targets = set(session.scalars(select(RunPrompt.prompt_id).where(RunPrompt.role == Role.TARGET)))
        asked = [teacher for teacher, prompt_id in given.asked if prompt_id in targets]
        assert {name: asked.count(name) for name in "abc"} == {"a": 21, "b": 15, "c": 7}
        of_targets = select(func.count()).where(Assignment.prompt_id.in_(targets))
        assert session.scalars(of_targets.where(Assignment.choice == 2)).one() == 2 + 1


def test_a_run_without_fallback_stores_no_further_teachers(database: Database) -> None:
    made = make_limited(database, capacity={"a": 15})
    with database.write() as session:
        run = session.get_one(Run, made.id)
        assert load_config(run.config).fallback is None
        assign.plan(session, run)
        assert set(session.scalars(select(Assignment.further))) == {None}
        assert session.scalars(select(func.count()).where(Prompt.id.in_(made.prompt_ids))).one() > 0
