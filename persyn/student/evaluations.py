"""Evaluate a student before and after training on prompts outside its run, and store the scored responses."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from persyn.config import QualityTable, Sampling, fingerprint_of, load_config
from persyn.db import bulk, lookup
from persyn.db.catalog import Prompt, Run, RunPrompt, Scorer
from persyn.db.connect import Database
from persyn.db.trained import Evaluation, Outcome, Training
from persyn.errors import EngineError, UsageError, shorten
from persyn.ingest import prompt_import, rows, versions
from persyn.ingest.imports import ImportCounts, batches
from persyn.ingest.layouts import NO_NAMES, Names
from persyn.ingest.rows import PromptRow
from persyn.llm.engines import ENGINES
from persyn.llm.host import Host, HostDied
from persyn.llm.identity import hub_revision, require_unchanged
from persyn.llm.options import FORM_OPTIONS
from persyn.llm.protocols import Failed, Generate, Generated, Judge, Judged, ModelSpec, Request, Result
from persyn.llm.scorers.code_tests import CodeFields
from persyn.llm.scorers.instructions import InstructionFields
from persyn.settings import Settings
from persyn.stages import scoring
from persyn.stages.batch import TURNS, conversation, to_wire

#: Scores the reference answers, not the student's responses.
PERPLEXITY = "log_likelihood"
#: The fields of a prompt's row that scorers read.
_ROWS: dict[str, type[Struct]] = {"instructions": InstructionFields, "code": CodeFields}
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
                *_prompts(session, run, files, table, self._names),
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


def _prompts(
    session: Session, run: Run, files: Sequence[Path], table: QualityTable | None, names: Names
) -> tuple[list[int], str]:
    """The prompts of files that are not in the run: their ids, and a digest of all of them."""
    needs_answer = table is None or table.kind == "math"
    hashes = prompt_import.hashes_of(session, files, names)
    of_run = select(RunPrompt.prompt_id).where(RunPrompt.run_id == run.id)
    found: list[tuple[int, str]] = []
    for some in _pieces(sorted(hashes), 1_000):
        wanted = select(Prompt.id, Prompt.content_hash).where(Prompt.content_hash.in_(some), Prompt.id.not_in(of_run))
        if needs_answer:
            wanted = wanted.where(Prompt.answer.is_not(None))
        found += session.execute(wanted.order_by(Prompt.content_hash)).all()
    if not found:
        what = "both has a reference answer and is outside the run" if needs_answer else "is outside the run"
        raise UsageError(
            f"none of {len(hashes):,} prompts {what}: a student must be evaluated on prompts it was not trained on"
        )
    asked = {content_hash for _, content_hash in found}
    for source, batch in batches(files, partial(rows.read, names=names), ImportCounts("stop")):
        _require_as_stored(session, source, [row for row in batch if row.content_hash in asked], table)
    digest = hashlib.sha256("".join(content_hash for _, content_hash in found).encode()).hexdigest()
    return [prompt_id for prompt_id, _ in found], digest


def _require_as_stored(session: Session, source: str, batch: Sequence[PromptRow], table: QualityTable | None) -> None:
    """Raise `UsageError` for a row that differs from the store in fields that affect its score."""
    wanted = select(Prompt.id, Prompt.content_hash, Prompt.answer, Prompt.meta)
    found = session.execute(wanted.where(Prompt.content_hash.in_([row.content_hash for row in batch])))
    stored = {prompt.content_hash: prompt for prompt in found}
    for row in batch:
        prompt = stored[row.content_hash]
        known = _judged_by(prompt, table)
        for name, value in _judged_by(row, table).items():
            if known.get(name) != value:
                here, there = (shorten(repr(each), most=80) for each in (value, known.get(name)))
                raise UsageError(
                    f"{source}: the prompt {shorten(row.text, most=80)!r} has {name} {here}, but {there} is stored "
                    f"with it ('persyn prompts show {prompt.id}'), which would be used to score its responses; "
                    f"give the row the same {name} or none, or remove it"
                )


def _judged_by(prompt: Any, table: QualityTable | None) -> dict[str, Any]:
    """The fields of a prompt, besides its conversation, that a scorer reads; nulls are left out."""
    kind = table.kind if table else PERPLEXITY
    fields: dict[str, Any] = {}
    if kind in (PERPLEXITY, "math", "python") or (kind == "judge" and table and table.options.get("against")):
        fields["answer"] = prompt.answer
    if (of_row := _ROWS.get(kind)) is not None:
        fields |= {name: prompt.meta.get(name) for name in of_row.__struct_fields__}
    elif kind == "python":
        fields |= prompt.meta
    found: dict[str, Any] = _without_nulls(fields)
    return found


def _without_nulls(value: Any) -> Any:
    """Remove null fields, recursively, since other formats of the same file omit them."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


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
    if by == PERPLEXITY:
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


def served(host: Host, asked: Sequence[Request]) -> Iterator[list[Result]]:
    """Yield results as they arrive, keeping the engine's window full."""
    left = iter(asked)
    n_open = 0
    while True:
        window = host.loaded.window if host.loaded else 0
        if more := list(islice(left, window - n_open)):
            host.submit(more)
            n_open += len(more)
        elif window and not n_open:
            return
        if results := host.receive(timeout=1.0):
            n_open -= len(results)
            yield results


@contextmanager
def hosted(spec: ModelSpec, settings: Settings) -> Iterator[Host]:
    """A model in a host of its own, which ends with the block; raise `EngineError` when it dies."""
    host = Host(
        spec,
        settings.home,
        load_seconds=settings.load_seconds,
        stall_seconds=settings.stall_seconds,
        # Devices are named, so that one model's memory is released before the next model is loaded.
        devices=_devices(spec.gpus),
        is_alone=True,
    )
    try:
        yield host
    except HostDied as death:
        raise EngineError(f"{death}; finished responses are stored; repeat the command to continue") from death
    finally:
        host.close()


def _devices(n: int) -> str | None:
    """The first GPUs visible to this process."""
    if not n:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return ",".join(visible.split(",")[:n] if visible else map(str, range(n)))


def _pieces(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
