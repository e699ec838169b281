"""Batches of requests between stages and engines, and the division of missing rows into jobs."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any, TypeAlias

from sqlalchemy import BigInteger, Integer, Select, cast, func, insert, literal, select
from sqlalchemy.orm import Session

from persyn.config import fingerprint_of
from persyn.db.catalog import Prompt, Run
from persyn.db.text import json_characters
from persyn.db.work import Job
from persyn.jobs.queue import Claim
from persyn.llm import engines
from persyn.llm.protocols import Message, ModelSpec, Request, Result, join_turns

#: A model's part of a stage is cut into at least this many jobs, so that workers get nearly equal shares; jobs with
#: fewer than _LEAST_PROMPTS prompts would cost more to claim than to work.
_PIECES = 128
_LEAST_PROMPTS = 8
#: 2**32 over the golden ratio: multiples of it, modulo 2**32, fill a range evenly from the first on (Weyl 1916).
_GOLDEN = 2_654_435_769


@dataclass(frozen=True, slots=True)
class Batch:
    """One loaded job: the model it needs and the requests for it. An engine receives nothing else."""

    spec: ModelSpec
    requests: list[Request]


@dataclass(frozen=True, slots=True)
class Done:
    """A request of a job, its result, and the engine that produced it."""

    request: Request
    result: Result
    engine: str


@dataclass(frozen=True, slots=True)
class Progress:
    """Counts of a stage's rows; always total = done + failed + pending."""

    total: int
    done: int
    failed: int

    @property
    def pending(self) -> int:
        """Rows that are neither done nor failed."""
        return self.total - self.done - self.failed

    def __repr__(self) -> str:
        return f"Progress(total={self.total}, done={self.done}, failed={self.failed}, pending={self.pending})"


#: The columns that `conversation` reads; select them together.
TURNS = (Prompt.text, Prompt.history, Prompt.last_turn)
#: The length of a prompt, from which its tokens are estimated; that of tools and history as JSON.
CHARACTERS = func.length(Prompt.text) + sum(json_characters(part) for part in (Prompt.history, Prompt.tools))
#: Tokens per character where no teacher's are known.
TOKENS_PER_CHARACTER = 0.25

StoredPrompt: TypeAlias = Any
"""A row with the columns `TURNS` of a prompt."""


def conversation(prompt: StoredPrompt) -> list[Message]:
    """A prompt as the list of turns that a model receives."""
    return join_turns(prompt.history, prompt.text, prompt.last_turn)


def response_turn(response: str, tool_calls: list[dict[str, Any]] | None) -> Message:
    """A stored response as the assistant's turn."""
    turn: Message = {"role": "assistant", "content": response}
    return turn | {"tool_calls": tool_calls} if tool_calls else turn


def to_wire(meta: Any) -> Any:
    """A prompt's metadata in a form that MessagePack can encode: integers beyond 64 bits become text."""
    match meta:
        case dict():
            return {name: to_wire(value) for name, value in meta.items()}
        case list():
            return [to_wire(value) for value in meta]
        case int() if not -(2**63) <= meta < 2**64:
            return str(meta)
    return meta


def seed_of(run_seed: int, content_hash: str, teacher: str, sample: int) -> int:
    """The seed of one response, determined only by run seed, prompt, teacher version and sample."""
    key = f"{run_seed}:{content_hash}:{teacher}:{sample}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1  # engines take 63 bits


def queue_name(spec: ModelSpec) -> str:
    """The queue name of a model's jobs: readable, and unique for each distinct load configuration."""
    digest = fingerprint_of(spec)[:8]
    model = re.sub(r"[^a-z0-9.]+", "-", spec.model.rsplit("/", 1)[-1].lower()).strip("-")
    return ".".join(part for part in (spec.engine, model, digest) if part)


@dataclass(frozen=True, slots=True)
class JobPlan:
    """The jobs to create: one model's part of one stage of one run."""

    run_id: int
    stage: str
    spec: ModelSpec
    teacher_id: int | None = None
    scorer_id: int | None = None
    #: Prompts per job.
    size: int = 256
    #: The job whose responses they score.
    follows_job_id: int | None = None
    #: Whether jobs that follow each other are far apart among the prompts, so that any few of them are like the whole.
    #: Prompts that are alike are often next to each other in a file.
    is_spread: bool = False


_JOB_COLUMNS = (
    "run_id",
    "stage",
    "queue",
    "teacher_id",
    "scorer_id",
    "follows_job_id",
    "first_prompt_id",
    "last_prompt_id",
    "n_prompts",
    "gpus",
    "is_light",
    "priority",
)


def make_jobs(session: Session, plan: JobPlan, missing: Select[Any]) -> int:
    """Divide the prompts of `missing` into jobs and return the number of jobs.

    missing: a select with a `prompt_id` column; a prompt may occur more than once.

    No job has more than `plan.size` prompts; if there are few, jobs are smaller, so that many workers can share
    them, except those that follow a job. A model behind a batch protocol has a job per batch. It is one INSERT ...
    SELECT, so the prompts never leave the database.
    """
    prompts = missing.subquery()
    counted = select(prompts.c.prompt_id, func.count().label("n_items")).group_by(prompts.c.prompt_id).subquery()
    n_prompts, most = session.execute(select(func.count(), func.max(counted.c.n_items))).one()
    requests = engines.batch_size(plan.spec)
    follows = plan.follows_job_id is not None
    size = max(1, requests // (most or 1)) if requests else plan.size if follows else _size(plan.size, n_prompts)
    place = func.row_number().over(order_by=counted.c.prompt_id) - 1
    cut = select(counted.c.prompt_id, counted.c.n_items, (place // size).label("slice")).subquery()
    jobs = (
        select(
            literal(plan.run_id),
            literal(plan.stage),
            literal(queue_name(plan.spec)),
            literal(plan.teacher_id, Integer),
            literal(plan.scorer_id, Integer),
            literal(plan.follows_job_id, Integer),
            func.min(cut.c.prompt_id),
            func.max(cut.c.prompt_id),
            func.sum(cut.c.n_items),
            literal(engines.gpus(plan.spec)),
            literal(engines.is_light(plan.spec.engine, plan.spec.options)),
            select(-Run.priority).where(Run.id == plan.run_id).scalar_subquery(),
        )
        .group_by(cut.c.slice)
        .order_by(cast(cut.c.slice, BigInteger) * _GOLDEN % 2**32 if plan.is_spread else func.min(cut.c.prompt_id))
    )
    statement = insert(Job).from_select(_JOB_COLUMNS, jobs)
    made = session.connection().execute(statement, execution_options={"preserve_rowcount": True})
    assert made.rowcount >= 0
    return made.rowcount


def _size(most: int, prompts: int) -> int:
    return min(most, max(_LEAST_PROMPTS, -(-prompts // _PIECES)))


def in_part(missing: Select[Any], job: Claim) -> Select[Any]:
    """Restrict `missing` (whose first column is a prompt id) to the job's range."""
    prompt_id = missing.selected_columns[0]
    return missing.where(prompt_id.between(job.first_prompt_id, job.last_prompt_id)).order_by(prompt_id)
