"""Evaluate a student before and after training on prompts outside its run, and store the scored responses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from persyn.config import QualityTable, Sampling, fingerprint_of, load_config
from persyn.db import bulk, lookup
from persyn.db.catalog import Prompt, Run, Scorer
from persyn.db.connect import Database
from persyn.db.trained import Evaluation, Outcome, Training
from persyn.errors import UsageError
from persyn.ingest import versions
from persyn.ingest.layouts import NO_NAMES, Names
from persyn.llm.engines import ENGINES
from persyn.llm.identity import hub_revision, require_unchanged
from persyn.llm.options import FORM_OPTIONS
from persyn.llm.protocols import Failed, Generate, Generated, Judge, Judged, ModelSpec, Result
from persyn.settings import Settings
from persyn.stages import scoring
from persyn.stages.batch import TURNS, conversation, to_wire
from persyn.student import held_out
from persyn.student.hosting import hosted, served

#: Kinds of scorers that need no model, so that they may differ from the run's.
_ALONE = ("math", "instructions", "code")


class GenerationSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a student's responses are generated."""

    #: None if no responses are generated.
    engine: str | None
    gpus: int = 0
    options: dict[str, Any] = {}
    sampling: Sampling = Sampling(max_tokens=512, temperature=0.0)


EvaluationCallback = Callable[[str, int, int], None]
"""Called with the phase ("ask" or "judge"), the number of requests, and the number completed."""


@dataclass(frozen=True, slots=True)
class _Subject:
    """Weights to evaluate, and the spec that loads them."""

    student_id: int
    training_id: int | None
    model: str
    revision: str | None

    def spec(self, how: GenerationSettings) -> ModelSpec:
        """The spec that loads it to generate responses."""
        return ModelSpec(how.engine or "", self.model, hub_revision(self.revision), how.gpus, how.options)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request for one prompt of one evaluation."""

    evaluation_id: int
    prompt_id: int
    request: Generate | Judge


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The settings shared by all evaluations of one command."""

    #: None for the likelihood of the reference answers.
    table: QualityTable | None
    known: versions.Identities
    how: GenerationSettings
    #: The name of the prompts' files.
    name: str
    prompt_ids: list[int]
    prompts_hash: str


class Evaluator:
    """Evaluates students; finished parts are reused, and an interrupted evaluation is continued.

    names: {our field: the file's field}, for fields of the prompts' files without a common name.
    """

    def __init__(
        self, database: Database, settings: Settings, progress: EvaluationCallback, names: Names = NO_NAMES
    ) -> None:
        self._names = names
        self._database = database
        self._settings = settings
        self._progress = progress

    def evaluate(
        self,
        run_name: str,
        files: Sequence[Path],
        *,
        by: str | None,
        how: GenerationSettings,
        retry_failed: bool = False,
    ) -> list[int]:
        """Evaluate a run's student before training and after each of its trainings; return the ids of the evaluations.

        files: prompts with the fields that the scorer needs, as stored if they are stored already; prompts of the run
               itself are excluded.
        by:    a kind of scorer, or "log_likelihood" for the likelihood of the reference answers; None is the run's
               quality. One that needs a model has to be a scorer of the run.
        retry_failed: retry earlier failures.
        Raises `UsageError` for what cannot be evaluated, `EngineError` when a model cannot be loaded or crashes.
        """
        with self._database.read() as session:
            run = session.scalars(select(Run).where(Run.name == run_name)).one_or_none()
            if run is None:
                raise UsageError(f"there is no run named {run_name!r}; 'persyn run list' lists them")
            subjects = _subjects(session, run)
        for subject in subjects:
            require_unchanged(subject.model, subject.revision)
        table = _table(run, by)
        # Identifying a model may take minutes, so it happens outside the write transaction.
        known = versions.identities([], quality=table)
        with self._database.write() as session:
            wanted = _Wanted(
                table,
                known,
                _as_scored(how, run) if table else _without_generation(how, run),
                ", ".join(path.name for path in files),
                *held_out.prompts(session, run, files, table, self._names),
            )
            made = [(subject, _register(session, subject, wanted)) for subject in subjects]
        evaluation_ids = [evaluation_id for _, evaluation_id in made]
        if retry_failed:
            with self._database.write() as session:
                failed = Outcome.evaluation_id.in_(evaluation_ids), Outcome.failure.is_not(None)
                session.execute(update(Outcome).where(*failed).values(failure=None))
        if wanted.how.engine is not None:
            for subject, evaluation_id in made:
                self._ask(subject.spec(wanted.how), evaluation_id, wanted.how.sampling)
        self._judge(made, wanted)
        with self._database.write() as session:
            unfinished = Evaluation.id.in_(evaluation_ids), Evaluation.finished_at.is_(None)
            session.execute(update(Evaluation).where(*unfinished).values(finished_at=datetime.now(UTC)))
        return evaluation_ids

    def _ask(self, spec: ModelSpec, evaluation_id: int, sampling: Sampling) -> None:
        """Generate the student's missing responses."""
        unasked = _of(evaluation_id).where(Outcome.response.is_(None), Outcome.failure.is_(None))
        asked: list[_Asked] = []
        with self._database.read() as session:
            for place, row in enumerate(session.execute(unasked)):
                asked.append(
                    _Asked(evaluation_id, row.id, Generate(place, conversation(row), sampling, seed=0, tools=row.tools))
                )
        self._work("ask", spec, asked)

    def _judge(self, made: Sequence[tuple[_Subject, int]], wanted: _Wanted) -> None:
        """Score the responses that have no value; a scorer shared by several students is loaded once."""
        asked: dict[int, list[_Asked]] = {}
        specs: dict[int, ModelSpec] = {}
        with self._database.read() as session:
            for subject, evaluation_id in made:
                scorer = session.get_one(Scorer, session.get_one(Evaluation, evaluation_id).scorer_id)
                specs[scorer.id] = _spec_of_scorer(scorer, subject, wanted)
                of_scorer = asked.setdefault(scorer.id, [])
                unjudged = _of(evaluation_id).where(Outcome.value.is_(None), Outcome.failure.is_(None))
                for row in session.execute(unjudged):
                    # Without a response, the reference answer is scored.
                    text = row.answer if row.response is None else row.response
                    more = {"tools": row.tools, "answer": row.answer, "meta": to_wire(row.meta)}
                    judge = Judge(len(of_scorer), conversation(row), text, **more)
                    of_scorer.append(_Asked(evaluation_id, row.id, judge))
        for scorer_id, of_scorer in asked.items():
            self._work("judge", specs[scorer_id], of_scorer)

    def _work(self, what: str, spec: ModelSpec, asked: Sequence[_Asked]) -> None:
        """Send numbered requests to a model and store each result as it arrives."""
        if not asked:
            return
        done = 0
        self._progress(what, len(asked), done)
        with hosted(spec, self._settings) as host:
            for results in served(host, [each.request for each in asked]):
                with self._database.write() as session:
                    for result in results:
                        _store(session, asked[result.id], result)
                done += len(results)
                self._progress(what, len(asked), done)


def _subjects(session: Session, run: Run) -> list[_Subject]:
    student, table = lookup.student(session, run)
    if table.engine == "fake":
        raise UsageError(f"run {run.name} has a fake student, which cannot be evaluated")
    trainings = session.scalars(select(Training).where(Training.run_id == run.id).order_by(Training.id)).all()
    return [
        _Subject(student.id, None, student.model, student.revision),
        # Trainings whose weights were removed are skipped; their stored results are kept.
        *(
            _Subject(student.id, training.id, training.path, training.revision)
            for training in trainings
            if Path(training.path).is_dir()
        ),
    ]


def _options(run: Run) -> dict[str, Any]:
    """The run's options for scoring with the student, applied to whole responses, which are read once."""
    student = load_config(run.config).student
    assert student is not None
    return {name: value for name, value in student.options.items() if name not in ("response_tokens", "statistics")}


def _spec_of_scorer(scorer: Scorer, subject: _Subject, wanted: _Wanted) -> ModelSpec:
    if (table := wanted.table) is None:
        return scoring.spec_of(scorer, model=subject.model, gpus=wanted.how.gpus, options=wanted.how.options)
    return scoring.spec_of(scorer, model=table.model, gpus=table.gpus, options=table.options)


def _without_generation(how: GenerationSettings, run: Run) -> GenerationSettings:
    return GenerationSettings(engine=None, gpus=how.gpus, options=_options(run))


def _as_scored(how: GenerationSettings, run: Run) -> GenerationSettings:
    """Give conversations the same form as in the scoring of responses by the student."""
    form = {name: value for name, value in _options(run).items() if name in FORM_OPTIONS}
    return msgspec.structs.replace(how, options=form | how.options)


def _table(run: Run, by: str | None) -> QualityTable | None:
    """The scorer's table; None for the likelihood of the reference answers."""
    if by == held_out.PERPLEXITY:
        return None
    scorers = load_config(run.config).scorers
    if by is not None:
        own = [scorer for scorer in scorers if scorer.kind == by]
        if own and (len(scorers) > 1 or by not in _ALONE):
            return _only(run, own)
        if by not in _ALONE:
            raise UsageError(f"run {run.name} has no scorer of kind {by} for its quality; use {', '.join(_ALONE)}")
        return msgspec.convert({"kind": by}, QualityTable)
    if len(scorers) > 1:
        raise UsageError(
            f"run {run.name}'s quality combines {', '.join(scorer.kind for scorer in scorers)}; choose one with --by"
        )
    quality = scorers[0]
    if not ENGINES[quality.kind].judges_students:
        raise UsageError(
            f"run {run.name}'s quality is {quality.kind}, which cannot score a student's responses; "
            "choose a scorer, such as --by math"
        )
    return quality


def _only(run: Run, scorers: Sequence[QualityTable]) -> QualityTable:
    if len(scorers) > 1:
        kind, models = scorers[0].kind, ", ".join(scorer.model or "no model" for scorer in scorers)
        raise UsageError(
            f"run {run.name} has {len(scorers)} scorers of kind {kind} for its quality ({models}), and --by {kind} "
            "does not say which; start a run under another name whose [quality] is one of them"
        )
    return scorers[0]


def _register(session: Session, subject: _Subject, wanted: _Wanted) -> int:
    """The id of an evaluation; creates it with its prompts if it does not exist."""
    if wanted.table is None:
        scorer_id = versions.likelihood(
            session, subject.model, subject.revision, gpus=wanted.how.gpus, options=wanted.how.options
        )
    else:
        scorer_id = versions.quality(session, wanted.table, wanted.known)
    row = {
        "student_id": subject.student_id,
        "training_id": subject.training_id,
        "scorer_id": scorer_id,
        "prompts_hash": wanted.prompts_hash,
        "how": msgspec.to_builtins(wanted.how) | {"sampling": wanted.how.sampling.given()},
    }
    decisive = row | {"revision": subject.revision}
    fingerprint = fingerprint_of(decisive)
    bulk.insert_new(session, Evaluation, [row | {"fingerprint": fingerprint, "name": wanted.name}])
    evaluation_id = session.scalars(select(Evaluation.id).where(Evaluation.fingerprint == fingerprint)).one()
    prompts = [{"evaluation_id": evaluation_id, "prompt_id": prompt_id} for prompt_id in wanted.prompt_ids]
    bulk.insert_new(session, Outcome, prompts)
    return evaluation_id


def _store(session: Session, asked: _Asked, result: Result) -> None:
    """Store a request's result, unless another process has stored one already."""
    of = Outcome.evaluation_id == asked.evaluation_id, Outcome.prompt_id == asked.prompt_id, Outcome.failure.is_(None)
    values: dict[str, Any]
    match asked.request, result:
        case Generate(), Generated() if result.tool_calls:
            values = {"failure": "tool_calls: the student called a tool, but an evaluation scores a text"}
        case Generate(), Generated():
            values = {"response": result.text}
        case Generate(), Failed() if result.reason.startswith(("empty", "unfinished_reasoning")):
            values = {"response": ""}  # a prompt without an answer is answered wrongly
        case _, Failed():
            values = {"failure": result.reason}
        case Judge(), Judged() if not math.isfinite(result.value):
            values = {"failure": f"not_finite: the score is {result.value}"}
        case Judge(), Judged():
            values = {"value": result.value, "n_tokens": result.n_tokens}
        case _:
            raise AssertionError(result)
    unknown = Outcome.response if isinstance(asked.request, Generate) else Outcome.value
    session.execute(update(Outcome).where(*of, unknown.is_(None)).values(**values))


def _of(evaluation_id: int) -> Any:
    """Select an evaluation's prompts and responses."""
    return (
        select(Prompt.id, *TURNS, Prompt.tools, Prompt.answer, Prompt.meta, Outcome.response)
        .join_from(Outcome, Prompt, Prompt.id == Outcome.prompt_id)
        .where(Outcome.evaluation_id == evaluation_id)
        .order_by(Outcome.prompt_id)
    )
