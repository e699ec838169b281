"""What a stage hands to an engine, and how a stage's missing rows become jobs."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec
from sqlalchemy import Integer, Select, func, insert, literal, select
from sqlalchemy.orm import Session

from persyn.db.work import Job
from persyn.jobs.queue import Claim
from persyn.llm.protocols import Message, ModelSpec, Request, Result

#: A model's part of a stage is cut into so many jobs at least, for workers to have nearly the same share each; but
#: one with fewer prompts would cost more to claim than it is worth.
_PIECES = 128
_LEAST_PROMPTS = 8


@dataclass(frozen=True, slots=True)
class Batch:
    """One job, loaded: the model it needs and what to ask of it. Nothing else crosses to the engine."""

    spec: ModelSpec
    requests: list[Request]


@dataclass(frozen=True, slots=True)
class Done:
    """A request of a job, its result, and the engine that gave it."""

    request: Request
    result: Result
    engine: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a stage is. Always: total = done + failed + pending."""

    total: int
    done: int
    failed: int

    @property
    def pending(self) -> int:
        """What is neither done nor failed."""
        return self.total - self.done - self.failed


PromptRow: TypeAlias = Any
"""A row with a prompt's `text` and `history`."""


def conversation(prompt: PromptRow) -> list[Message]:
    """A prompt as the turns a model is given."""
    return [*(prompt.history or ()), {"role": "user", "content": prompt.text}]


def told(meta: Any) -> Any:
    """What an engine is told of a prompt's other fields: an integer that MessagePack has no room for becomes text."""
    match meta:
        case dict():
            return {name: told(value) for name, value in meta.items()}
        case list():
            return [told(value) for value in meta]
        case int() if not -(2**63) <= meta < 2**64:
            return str(meta)
    return meta


def seed_of(run_seed: int, content_hash: str, teacher: str, sample: int) -> int:
    """The seed of one response: the same for the same run seed, prompt, teacher version and sample, anywhere."""
    key = f"{run_seed}:{content_hash}:{teacher}:{sample}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1  # engines take 63 bits


def queue_name(spec: ModelSpec) -> str:
    """The queue of a model's jobs: readable, and different for whatever must be loaded differently."""
    digest = hashlib.sha256(msgspec.json.encode(spec, order="sorted")).hexdigest()[:8]
    model = re.sub(r"[^a-z0-9.]+", "-", spec.model.rsplit("/", 1)[-1].lower()).strip("-")
    return ".".join(part for part in (spec.engine, model, digest) if part)


@dataclass(frozen=True, slots=True)
class Plan:
    """Whose jobs to make: one model's part of one stage of one run."""

    run_id: int
    stage: str
    spec: ModelSpec
    teacher_id: int | None = None
    scorer_id: int | None = None
    #: Prompts per job.
    size: int = 256


_JOB_COLUMNS = (
    "run_id",
    "stage",
    "queue",
    "teacher_id",
    "scorer_id",
    "first_prompt_id",
    "last_prompt_id",
    "n_prompts",
    "gpus",
)


def make_jobs(session: Session, plan: Plan, missing: Select[Any]) -> int:
    """Cut the prompts of `missing` (a select with a `prompt_id`, perhaps repeated) into jobs; return how many jobs.

    None holds more than `plan.size` prompts; where there are few, jobs are smaller, for many workers to share them.
    One INSERT ... SELECT: the prompts never leave the database, however many there are.
    """
    prompts = missing.subquery()
    counted = select(prompts.c.prompt_id, func.count().label("n_items")).group_by(prompts.c.prompt_id).subquery()
    size = _size(plan.size, session.scalars(select(func.count()).select_from(counted)).one())
    place = func.row_number().over(order_by=counted.c.prompt_id) - 1
    cut = select(counted.c.prompt_id, counted.c.n_items, (place // size).label("slice")).subquery()
    jobs = (
        select(
            literal(plan.run_id),
            literal(plan.stage),
            literal(queue_name(plan.spec)),
            literal(plan.teacher_id, Integer),
            literal(plan.scorer_id, Integer),
            func.min(cut.c.prompt_id),
            func.max(cut.c.prompt_id),
            func.sum(cut.c.n_items),
            literal(plan.spec.gpus),
        )
        .group_by(cut.c.slice)
        .order_by(func.min(cut.c.prompt_id))
    )
    statement = insert(Job).from_select(_JOB_COLUMNS, jobs)
    made = session.connection().execute(statement, execution_options={"preserve_rowcount": True})
    assert made.rowcount >= 0
    return made.rowcount


def _size(most: int, prompts: int) -> int:
    return min(most, max(_LEAST_PROMPTS, -(-prompts // _PIECES)))


def in_part(missing: Select[Any], job: Claim) -> Select[Any]:
    """The rows of `missing` (whose first column is a prompt's id) that are the job's."""
    prompt_id = missing.selected_columns[0]
    return missing.where(prompt_id.between(job.first_prompt_id, job.last_prompt_id)).order_by(prompt_id)
