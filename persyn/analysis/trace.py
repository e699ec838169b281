"""Collect the provenance and uses of a prompt's responses in a run."""

from __future__ import annotations

import math
from typing import Any

from msgspec import Struct
from sqlalchemy import and_, case, func, or_, select
from sqlalchemy.orm import Session, aliased

from persyn.config import load_config
from persyn.db import grid, lookup
from persyn.db.catalog import Prompt, Run, RunPrompt, RunTeacher, Scorer, Teacher
from persyn.db.results import Assignment, Fallback, Response, Router, RouterScore, Score, answers_assignment
from persyn.db.trained import Training
from persyn.db.work import Event, Job, JobState, Load
from persyn.errors import UsageError, shorten

TraceRow = dict[str, Any]
#: Candidates listed for an ambiguous prompt.
_MOST_MEANT = 5
#: A longer number cannot be an id in the store.
_DIGITS = 19


class Trace(Struct, frozen=True):
    """The history of a prompt in a run."""

    prompt_id: int
    role: str
    text: str
    #: The file it came from, and its id there.
    source: str
    source_id: str | None
    #: The assigned teacher; None before assignment.
    teacher: str | None
    assignment: TraceRow
    #: The choices whose response met a condition of [fallback], with the condition as `cause`.
    choices: list[TraceRow]
    #: The custom strategy with the digest of its file; empty if there is none.
    strategy: TraceRow
    #: The run's router with the digest of its files; empty before it is fitted.
    router: TraceRow
    #: One row per teacher, best first.
    router_scores: list[TraceRow]
    #: The responses of the run's teachers, with their rewards and origin.
    responses: list[TraceRow]
    #: The raw scores of these responses, with their scorers.
    scores: list[TraceRow]
    #: The events of the jobs that produced them.
    events: list[TraceRow]
    #: Each run with this prompt, its assigned teacher, and the students trained on its dataset; filters may have
    #: excluded the response from that dataset.
    uses: list[TraceRow]

    @property
    def decided_by_rewards(self) -> bool:
        """Whether the best calibration response was kept; otherwise a router or a strategy decided."""
        first = self.choices[0] if self.choices else self.assignment
        return str(first.get("reason", "")).startswith("calibration")

    @property
    def has_learnability(self) -> bool:
        """Whether a response has a learnability."""
        return any(row["learnability"] is not None for row in self.responses)

    @property
    def by_reward(self) -> list[TraceRow]:
        """The first calibration response of each teacher, highest reward first; those without a reward last."""
        first = [row for row in self.responses if row["sample"] == 0]
        return sorted(first, key=lambda row: -math.inf if row["reward"] is None else row["reward"], reverse=True)


def beginning(text: str, length: int) -> str:
    """A text, or its beginning with the length of the whole."""
    return text if len(text) <= length else f"{text[:length]}… ({len(text):,} characters)"


def find(session: Session, run: Run, given: str) -> tuple[int, list[int]]:
    """Find a prompt of a run by its id in the store, its id in its file, or its content hash.

    Returns its id in the store, and the ids of other prompts that share its id in their files. Raises `UsageError` when
    there is none, and when several match but none by its id in the store.
    """
    of_run = select(Prompt.id).join(RunPrompt, and_(RunPrompt.prompt_id == Prompt.id, RunPrompt.run_id == run.id))
    ids = given, given.rpartition("#")[0] or given  # a row's id may end in the sample
    by_file = of_run.where(or_(Prompt.source_id.in_(ids), Prompt.content_hash.in_(ids))).order_by(Prompt.id)
    found = list(session.scalars(by_file.limit(_MOST_MEANT + 1)))
    number = int(given) if given.isascii() and given.isdigit() and len(given) < _DIGITS else None
    if number is not None and session.scalars(of_run.where(Prompt.id == number)).one_or_none() is not None:
        return number, [prompt_id for prompt_id in found if prompt_id != number]
    if len(found) == 1:
        return found[0], []
    if found:
        listed = ", ".join(map(str, found[:_MOST_MEANT])) + (", ..." if len(found) > _MOST_MEANT else "")
        raise UsageError(f"several prompts of run {run.name!r} have the id {given!r}; give one by prompt_id: {listed}")
    raise UsageError(
        f"run {run.name!r} has no prompt with the prompt_id or file id {shorten(given)}; "
        "the rows of a dataset contain both"
    )


def trace(session: Session, run: Run, prompt_id: int) -> Trace:
    """Collect a prompt's history in a run; raise `UsageError` when the run has no such prompt."""
    place = session.execute(
        select(Prompt.text, Prompt.source, Prompt.source_id, RunPrompt.role)
        .join(RunPrompt, RunPrompt.prompt_id == Prompt.id)
        .where(RunPrompt.run_id == run.id, Prompt.id == prompt_id)
    ).one_or_none()
    if place is None:
        raise UsageError(f"run {run.name!r} has no prompt {prompt_id}; the rows of a dataset contain their prompt_id")
    assignment = _rows(
        session,
        select(
            Teacher.name,
            Assignment.reason,
            Assignment.score,
            Assignment.margin,
            Assignment.sample,
            Assignment.rejected,
            Assignment.job_id,
            Assignment.created_at,
            Assignment.choice,
        )
        .join(Teacher, Teacher.id == Assignment.teacher_id)
        .where(Assignment.run_id == run.id, Assignment.prompt_id == prompt_id),
    )
    responses, scores = _rows(session, _responses(run, prompt_id)), _rows(session, _scores(session, run, prompt_id))
    _add_worth(session, run, prompt_id, responses)
    kept = _kept(session, run, prompt_id)
    for row in responses:
        row["is_kept"] = row["response_id"] in kept
    jobs = {row["job_id"] for row in [*assignment, *responses, *scores] if row["job_id"] is not None}
    return Trace(
        prompt_id=prompt_id,
        role=place.role,
        text=place.text,
        source=place.source,
        source_id=place.source_id,
        teacher=assignment[0].pop("name") if assignment else None,
        assignment=assignment[0] if assignment else {},
        choices=_rows(session, _choices(run, prompt_id)),
        strategy=_function(run),
        router=next(iter(_rows(session, _router(run))), {}),
        router_scores=_rows(session, _router_scores(run, prompt_id)),
        responses=responses,
        scores=scores,
        events=_rows(session, _events(jobs)),
        uses=_rows(session, _uses(prompt_id)),
    )


def _choices(run: Run, prompt_id: int) -> Any:
    columns = (getattr(Fallback, name) for name in ("cause", "failure", "reason", "score", "margin", "sample"))
    return (
        select(Fallback.choice, Teacher.name.label("teacher"), *columns, Fallback.created_at)
        .join(Teacher, Teacher.id == Fallback.teacher_id)
        .where(Fallback.run_id == run.id, Fallback.prompt_id == prompt_id)
        .order_by(Fallback.choice)
    )


def _kept(session: Session, run: Run, prompt_id: int) -> set[int]:
    """The ids of the responses to a prompt that are rows of the run's unfiltered dataset."""
    rows = select(Response.id).join(Assignment, lookup.in_dataset(run))
    return set(
        session.scalars(
            rows.where(Assignment.run_id == run.id, Assignment.prompt_id == prompt_id, Response.text.is_not(None))
        )
    )


def _function(run: Run) -> TraceRow:
    strategy = load_config(run.config).strategy
    if not strategy.model:
        return {}
    return {"model": strategy.model, "revision": strategy.revision, "options": strategy.options}


def _router(run: Run) -> Any:
    return select(
        Router.kind,
        Router.fingerprint,
        Router.backbone,
        Router.revision,
        Router.tune,
        Router.path,
        Router.sha256,
        Router.created_at,
    ).where(Router.id == run.router_id)


def _router_scores(run: Run, prompt_id: int) -> Any:
    return (
        select(Teacher.name.label("teacher"), RouterScore.score)
        .join(Teacher, Teacher.id == RouterScore.teacher_id)
        .where(RouterScore.router_id == run.router_id, RouterScore.prompt_id == prompt_id)
        .order_by(RouterScore.score.desc())
    )


def _responses(run: Run, prompt_id: int) -> Any:
    asked_by = aliased(Run)
    worker = func.coalesce(_holder(Response), Job.owner)
    return (
        select(
            Teacher.name.label("teacher"),
            Response.text,
            Response.reasoning,
            Response.failure,
            Response.finish_reason,
            Response.response_tokens.label("tokens"),
            Response.reasoning_tokens,
            Response.seconds,
            Response.seed,
            Response.engine,
            Response.origin,
            Teacher.model,
            Teacher.revision,
            Teacher.template_hash,
            Teacher.fingerprint.label("teacher_fingerprint"),
            Response.id.label("response_id"),
            Response.sample,
            Response.job_id,
            asked_by.name.label("asked_by_run"),
            worker.label("worker"),
            _load(Load.gpus, worker).label("gpus"),
            _load(Load.log, worker).label("engine_log"),
            Response.created_at,
        )
        .join(Teacher, Teacher.id == Response.teacher_id)
        .join(RunTeacher, and_(RunTeacher.teacher_id == Teacher.id, RunTeacher.run_id == run.id))
        .outerjoin(Job, Job.id == Response.job_id)
        .outerjoin(asked_by, asked_by.id == Job.run_id)
        .where(Response.prompt_id == prompt_id)
        .order_by(RunTeacher.position, Response.sample)
    )


def _scores(session: Session, run: Run, prompt_id: int) -> Any:
    """Select the scores of a run's responses to a prompt; of a combined quality, its parts' too."""
    measures = lookup.measures(session, run)
    return (
        select(
            Teacher.name.label("teacher"),
            Response.sample,
            case(measures, value=Score.scorer_id).label("measure"),
            Scorer.kind.label("scorer"),
            Scorer.model,
            Scorer.revision,
            Scorer.fingerprint.label("scorer_fingerprint"),
            Score.value,
            Score.n_tokens,
            Score.reasoning_value,
            Score.reasoning_n_tokens,
            Score.statistics,
            Score.failure,
            Score.detail,
            Score.response_id,
            Score.job_id,
            func.coalesce(_holder(Score), Job.owner).label("worker"),
            Score.created_at,
        )
        .join(Response, Response.id == Score.response_id)
        .join(Teacher, Teacher.id == Response.teacher_id)
        .join(RunTeacher, and_(RunTeacher.teacher_id == Teacher.id, RunTeacher.run_id == run.id))
        .join(Scorer, Scorer.id == Score.scorer_id)
        .outerjoin(Job, Job.id == Score.job_id)
        .where(Response.prompt_id == prompt_id, Scorer.id.in_(measures))
        .order_by(RunTeacher.position, Response.sample, Scorer.id)
    )


def _holder(made: type[Response] | type[Score]) -> Any:
    """The worker that held the job when a row was written; another may have taken it over since."""
    return (
        select(Event.actor)
        .where(Event.job_id == made.job_id, Event.to_state == JobState.RUNNING.value, Event.at <= made.created_at)
        .order_by(Event.id.desc())
        .limit(1)
        .correlate(made)
        .scalar_subquery()
    )


def _load(column: Any, worker: Any) -> Any:
    """A column of the model load behind a response: its worker's latest load for that queue."""
    loaded_for = aliased(Job)
    return (
        select(column)
        .join(loaded_for, loaded_for.id == Load.job_id)
        .where(Load.owner == worker, loaded_for.queue == Job.queue, Load.at <= Response.created_at)
        .order_by(Load.id.desc())
        .limit(1)
        .correlate(Job, Response)
        .scalar_subquery()
    )


def _add_worth(session: Session, run: Run, prompt_id: int, responses: list[TraceRow]) -> None:
    """Add the quality, learnability and reward of their cell to the grid's responses; None for others."""
    for row in responses:
        row |= {"quality": None, "learnability": None, "reward": None}
    cells = grid.read(session, run, prompt_ids=(prompt_id, prompt_id))
    if not len(cells.prompt_ids):
        return
    combined = cells.rewards()
    names: dict[int, str] = dict(
        session.execute(select(Teacher.id, Teacher.name).join(RunTeacher).where(RunTeacher.run_id == run.id)).all()
    )
    column_of = {names[teacher_id]: column for column, teacher_id in enumerate(cells.teacher_ids)}
    for row in responses:
        if row["sample"] < load_config(run.config).run.samples:
            column = column_of[row["teacher"]]
            for name, matrix in (
                ("quality", cells.quality),
                ("learnability", cells.learnability),
                ("reward", combined),
            ):
                value = float(matrix[0, column])
                row[name] = None if math.isnan(value) else value


def _events(jobs: set[int]) -> Any:
    return (
        select(Event.at, Event.actor, Event.job_id, Event.fence, Event.from_state, Event.to_state, Event.detail)
        .where(Event.job_id.in_(jobs))
        .order_by(Event.id)
    )


def _uses(prompt_id: int) -> Any:
    return (
        select(
            Run.name.label("run"),
            RunPrompt.role,
            Teacher.name.label("teacher"),
            Response.text.is_not(None).label("is_answered"),
            Training.id.label("training_id"),
            Training.path.label("student"),
        )
        .select_from(RunPrompt)
        .join(Run, Run.id == RunPrompt.run_id)
        .outerjoin(Assignment, and_(Assignment.run_id == Run.id, Assignment.prompt_id == RunPrompt.prompt_id))
        .outerjoin(Teacher, Teacher.id == Assignment.teacher_id)
        .outerjoin(Response, answers_assignment())
        .outerjoin(Training, and_(Training.run_id == Run.id, Response.text.is_not(None)))
        .where(RunPrompt.prompt_id == prompt_id)
        .order_by(Run.id, Training.id)
    )


def _rows(session: Session, query: Any) -> list[TraceRow]:
    return [dict(row._mapping) for row in session.execute(query)]
