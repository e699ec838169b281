"""Have teachers write responses: what the stages calibrate and generate share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import Select, delete, func, literal, select
from sqlalchemy.orm import Session

from persyn.config import IMPORTED, MOST_SAMPLES, Sampling, TeacherTable, load_config
from persyn.db import bulk, lookup
from persyn.db.catalog import Prompt, Run, Teacher
from persyn.db.results import Origin, Response
from persyn.db.text import reason
from persyn.errors import shorten
from persyn.jobs.queue import Claim, ModelJobs
from persyn.llm import adapters, engines, transport
from persyn.llm.identity import hub_revision
from persyn.llm.protocols import Failed, Generate, Generated, Message, ModelSpec, failed
from persyn.stages.batch import TURNS, Batch, Done, JobPlan, Progress, conversation, in_part, make_jobs, seed_of
from persyn.stages.stage import Stage

#: What a chat template adds to each turn, in characters: about five tokens of role and markers.
_TEMPLATE_CHARACTERS = 20


@dataclass(frozen=True, slots=True)
class Wanted:
    """The responses that a stage wants, each one sample of a teacher's responses to a prompt.

    name:    of the stage.
    all:     selects those of a run, joined to `responses`, which is null where one is missing.
    missing: selects the prompt and the sample of those that one of its teachers has not written.
    is_spread: whether a teacher's jobs are in an order that spreads over its prompts, see `batch.JobPlan`.
    """

    name: str
    all: Callable[[Run], Select[Any]]
    missing: Callable[[Run, int | None], Select[Any]]
    is_spread: bool = False

    def stage(self, *, style: tuple[str, str], expected: Callable[[Session, Run], int]) -> Stage:
        """The stage that asks for these responses."""
        return Stage(
            name=self.name,
            style=style,
            plan=self.plan,
            load=self.load,
            spec=spec,
            save=save,
            progress=self._progress,
            expected=expected,
            failures=self._failures,
            forget=self._forget,
        )

    def plan(self, session: Session, run: Run) -> int:
        """Create each teacher's jobs; store an imported teacher's missing responses as failures."""
        made = 0
        size = run.config["run"]["job_prompts"]
        for teacher, model in zip(lookup.teachers(session, run.id), _specs_in(session, run), strict=True):
            missing = self.missing(run, teacher.id)
            if teacher.engine == IMPORTED:
                _note_absent(session, teacher, missing)
            else:
                plan = JobPlan(run.id, self.name, model, teacher_id=teacher.id, size=size, is_spread=self.is_spread)
                made += make_jobs(session, plan, missing)
        return made

    def load(self, session: Session, job: Claim) -> Batch:
        """Build the requests of one job: the missing responses in its range."""
        teacher = session.get_one(Teacher, job.teacher_id)
        run = session.get_one(Run, job.run_id)
        table = _table(session, run, teacher.id)
        missing = self.missing(run, job.teacher_id)
        prompt_id, sample = missing.selected_columns
        rows = session.execute(
            in_part(missing, job)
            .order_by(sample)
            .join(Prompt, Prompt.id == prompt_id)
            .add_columns(Prompt.id, *TURNS, Prompt.tools, Prompt.response_schema, Prompt.content_hash)
        )
        sampling = msgspec.convert(teacher.sampling, Sampling)
        opening = opening_of(teacher.system, teacher.few_shot)
        return Batch(
            _spec_in(session, run, teacher.id),
            [
                Generate(
                    id=row.id * MOST_SAMPLES + row.sample,
                    messages=with_opening(opening, conversation(row)),
                    sampling=sampling,
                    seed=seed_of(run.seed, row.content_hash, teacher.fingerprint, row.sample),
                    schema=teacher.response_schema if row.response_schema is None else row.response_schema,
                    tools=row.tools,
                    adapter=adapters.name_of(table.adapter, teacher.adapter_revision),
                )
                for row in rows
            ],
        )

    def _progress(self, session: Session, run: Run) -> Progress:
        total, answered, failed = session.execute(
            self.all(run).with_only_columns(func.count(), func.count(Response.text), func.count(Response.failure))
        ).one()
        return Progress(total, answered, failed)

    def _failures(self, run: Run) -> Select[Any]:
        return self.all(run).with_only_columns(Response.failure).where(Response.failure.is_not(None))

    def _forget(self, session: Session, run: Run, reasons: Collection[str]) -> int:
        """Delete generated responses that failed for these reasons; imported responses are kept."""
        of_these = reason(Response.failure).in_(reasons), Response.origin == Origin.GENERATED
        found = self.all(run).with_only_columns(Response.id).where(*of_these)
        deleted = delete(Response).where(Response.id.in_(found)).returning(Response.id)
        return len(session.scalars(deleted).all())


def save(session: Session, job: Claim, done: Sequence[Done]) -> None:
    """Store each request's response text, or the reason it failed."""
    bulk.insert_new(session, Response, [_row(job, item) for item in done])


def _note_absent(session: Session, teacher: Teacher, missing: Select[Any]) -> None:
    absent = missing.subquery()
    rows = select(
        absent.c.prompt_id,
        literal(teacher.id),
        absent.c.sample,
        literal("not_imported: an imported teacher generates nothing, and this response was not imported"),
        literal(Origin.IMPORTED, Response.origin.type),
    )
    bulk.insert_found(session, Response, ("prompt_id", "teacher_id", "sample", "failure", "origin"), rows)


def _table(session: Session, run: Run, teacher_id: int) -> TeacherTable:
    return load_config(run.config).teachers[lookup.position(session, run.id, teacher_id)]


def spec(session: Session, run: Run, of: ModelJobs) -> ModelSpec:
    """The model that jobs of a teacher load."""
    return _spec_in(session, run, of.teacher_id)


def _spec_in(session: Session, run: Run, teacher_id: int | None) -> ModelSpec:
    assert teacher_id is not None
    return _specs_in(session, run)[lookup.position(session, run.id, teacher_id)]


def _specs_in(session: Session, run: Run) -> list[ModelSpec]:
    return specs_of(lookup.teachers(session, run.id), load_config(run.config).teachers)


def specs_of(teachers: Sequence[Teacher], tables: Sequence[TeacherTable]) -> list[ModelSpec]:
    """The models to load for a run's teachers; those that differ only in prompt, sampling or adapter share one.

    tables: theirs in the run's configuration, which say where and how the models are reached.
    """
    pairs = list(zip(teachers, tables, strict=True))
    bases = [_base_of(teacher, table) for teacher, table in pairs]
    names = [adapters.name_of(table.adapter, teacher.adapter_revision) for teacher, table in pairs]
    shared = [{name for name, other in zip(names, bases, strict=True) if name and other == base} for base in bases]
    return [msgspec.structs.replace(base, adapters=sorted(found)) for base, found in zip(bases, shared, strict=True)]


def _base_of(teacher: Teacher, table: TeacherTable) -> ModelSpec:
    return ModelSpec(
        engine=teacher.engine,
        model=table.model,
        revision=hub_revision(teacher.revision) if engines.loads_weights(teacher.engine, teacher.options) else None,
        gpus=table.gpus,
        options=transport.join(teacher.options, teacher.engine, table.options),
    )


def _row(job: Claim, item: Done) -> dict[str, Any]:
    request, result = item.request, item.result
    assert isinstance(request, Generate)
    prompt_id, sample = divmod(request.id, MOST_SAMPLES)
    row = {
        "prompt_id": prompt_id,
        "teacher_id": job.teacher_id,
        "sample": sample,
        "text": None,
        "failure": None,
        "finish_reason": None,
        "reasoning": None,
        "reasoning_tokens": None,
        "tool_calls": None,
        "prompt_tokens": None,
        "response_tokens": None,
        "seconds": None,
        "seed": request.seed,
        "engine": item.engine,
        "origin": Origin.GENERATED,
        "job_id": job.id,
    }
    if isinstance(result, Generated) and (why := _breaks_schema(request, result)):
        result = failed(result, why)
    assert isinstance(result, Generated | Failed)
    said = msgspec.structs.asdict(result)
    row["failure"] = said.pop("reason", None)
    row |= {name: value for name, value in said.items() if name in row}
    return row


def _breaks_schema(request: Generate, result: Generated) -> str | None:
    """Why a response that should be JSON is not; None if it is, or need not be, because it calls tools."""
    if request.schema is None or result.tool_calls:
        return None
    try:
        msgspec.json.decode(result.text)
    except (msgspec.DecodeError, RecursionError) as error:
        return f"invalid_json: {error}, finish reason {result.finish_reason or 'unknown'}: {shorten(result.text)}"
    return None


def opening_of(system: str | None, few_shot: Iterable[Mapping[str, str]]) -> list[Message]:
    """The messages that precede every prompt of a teacher: its system turn and worked examples."""
    opening = [{"role": "system", "content": system}] if system else []
    for shot in few_shot:
        opening.append({"role": "user", "content": shot["user"]})
        opening.append({"role": "assistant", "content": shot["assistant"]})
    return opening


def opening_characters(system: str | None, few_shot: Iterable[Mapping[str, str]]) -> int:
    """Characters that a teacher reads beside a prompt's own: of its opening messages, and of the chat template."""
    opening = opening_of(system, few_shot)
    return sum(len(turn["content"]) for turn in opening) + _TEMPLATE_CHARACTERS * (len(opening) + 1)


def with_opening(opening: Sequence[Message], messages: Sequence[Message]) -> list[Message]:
    """Prepend the opening; a prompt's own system turn is merged with the teacher's, since models accept at most one."""
    if not (opening and messages[0]["role"] == "system"):
        return [*opening, *messages]
    own = messages[0]["content"]
    if opening[0]["role"] == "system":
        joined = {"role": "system", "content": f"{opening[0]['content']}\n\n{own}"}
        return [joined, *opening[1:], *messages[1:]]
    return [messages[0], *opening, *messages[1:]]
