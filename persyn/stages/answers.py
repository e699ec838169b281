"""Fill (prompt, teacher) cells with responses: what the stages calibrate and generate share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import Select, delete, func, literal, select
from sqlalchemy.orm import Session

from persyn.config import IMPORTED, Sampling, TeacherTable, load_config
from persyn.db import bulk, lookup
from persyn.db.catalog import Prompt, Run, Teacher
from persyn.db.results import Origin, Response
from persyn.db.text import reason
from persyn.errors import shorten
from persyn.jobs.queue import Claim
from persyn.llm import adapters, engines, transport
from persyn.llm.identity import hub_revision
from persyn.llm.protocols import Failed, Generate, Generated, Message, ModelSpec
from persyn.stages.batch import TURNS, Batch, Done, JobPlan, Progress, conversation, in_part, make_jobs, seed_of
from persyn.stages.stage import Stage


@dataclass(frozen=True, slots=True)
class Cells:
    """The (prompt, teacher) cells in which a stage wants a response.

    name:    of the stage.
    all:     selects a run's cells, joined to `responses`, which is null where a cell is empty.
    missing: selects the empty cells of one of its teachers.
    """

    name: str
    all: Callable[[int], Select[Any]]
    missing: Callable[[int, int | None], Select[Any]]

    def stage(self, *, style: tuple[str, str], expected: Callable[[Session, Run], int]) -> Stage:
        """The stage that fills these cells."""
        return Stage(
            name=self.name,
            style=style,
            plan=self._plan,
            load=self._load,
            spec=_spec_in,
            save=_save,
            progress=self._progress,
            expected=expected,
            failures=self._failures,
            forget=self._forget,
        )

    def _plan(self, session: Session, run: Run) -> int:
        """Create each teacher's jobs; store an imported teacher's missing responses as failures."""
        made = 0
        size = run.config["run"]["job_prompts"]
        for teacher, spec in zip(lookup.teachers(session, run.id), _specs_in(session, run), strict=True):
            missing = self.missing(run.id, teacher.id)
            if teacher.engine == IMPORTED:
                _note_absent(session, teacher, missing)
            else:
                plan = JobPlan(run.id, self.name, spec, teacher_id=teacher.id, size=size)
                made += make_jobs(session, plan, missing)
        return made

    def _load(self, session: Session, job: Claim) -> Batch:
        """Build the requests of one job: the empty cells in its range."""
        teacher = session.get_one(Teacher, job.teacher_id)
        run = session.get_one(Run, job.run_id)
        table = _table(session, run, teacher.id)
        missing = self.missing(job.run_id, job.teacher_id)
        prompts = session.execute(
            in_part(missing, job)
            .join(Prompt, Prompt.id == missing.selected_columns[0])
            .add_columns(Prompt.id, *TURNS, Prompt.tools, Prompt.response_schema, Prompt.content_hash)
        )
        sampling = msgspec.convert(teacher.sampling, Sampling)
        opening = opening_of(teacher.system, teacher.few_shot)
        return Batch(
            _spec_in(session, run, teacher.id),
            [
                Generate(
                    id=prompt.id,
                    messages=with_opening(opening, conversation(prompt)),
                    sampling=sampling,
                    seed=seed_of(run.seed, prompt.content_hash, teacher.fingerprint, 0),
                    schema=teacher.response_schema if prompt.response_schema is None else prompt.response_schema,
                    tools=prompt.tools,
                    adapter=adapters.name_of(table.adapter, teacher.adapter_revision),
                )
                for prompt in prompts
            ],
        )

    def _progress(self, session: Session, run: Run) -> Progress:
        total, answered, failed = session.execute(
            self.all(run.id).with_only_columns(func.count(), func.count(Response.text), func.count(Response.failure))
        ).one()
        return Progress(total, answered, failed)

    def _failures(self, run: Run) -> Select[Any]:
        return self.all(run.id).with_only_columns(Response.failure).where(Response.failure.is_not(None))

    def _forget(self, session: Session, run: Run, reasons: Collection[str]) -> int:
        """Delete generated responses that failed for these reasons; imported responses are kept."""
        of_these = reason(Response.failure).in_(reasons), Response.origin == Origin.GENERATED
        found = self.all(run.id).with_only_columns(Response.id).where(*of_these)
        deleted = delete(Response).where(Response.id.in_(found)).returning(Response.id)
        return len(session.scalars(deleted).all())


def _save(session: Session, job: Claim, done: Sequence[Done]) -> None:
    """Store each request's response text, or the reason it failed."""
    bulk.insert_new(session, Response, [_row(job, item) for item in done])


def _note_absent(session: Session, teacher: Teacher, missing: Select[Any]) -> None:
    prompts = missing.subquery()
    rows = select(
        prompts.c.prompt_id,
        literal(teacher.id),
        literal(0),
        literal("not_imported: an imported teacher generates nothing, and this response was not imported"),
        literal(Origin.IMPORTED, Response.origin.type),
    )
    bulk.insert_found(session, Response, ("prompt_id", "teacher_id", "sample", "failure", "origin"), rows)


def _table(session: Session, run: Run, teacher_id: int) -> TeacherTable:
    return load_config(run.config).teachers[lookup.position(session, run.id, teacher_id)]


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
    row = {
        "prompt_id": request.id,
        "teacher_id": job.teacher_id,
        "sample": 0,
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
        result = Failed(request.id, why)
    if isinstance(result, Failed):
        row["failure"] = result.reason
    else:
        assert isinstance(result, Generated)
        row.update(msgspec.structs.asdict(result))
        del row["id"]
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


def with_opening(opening: Sequence[Message], messages: Sequence[Message]) -> list[Message]:
    """Prepend the opening; a prompt's own system turn is merged with the teacher's, since models accept at most one."""
    if not (opening and messages[0]["role"] == "system"):
        return [*opening, *messages]
    own = messages[0]["content"]
    if opening[0]["role"] == "system":
        joined = {"role": "system", "content": f"{opening[0]['content']}\n\n{own}"}
        return [joined, *opening[1:], *messages[1:]]
    return [messages[0], *opening, *messages[1:]]
