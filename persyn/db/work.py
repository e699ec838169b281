"""Tables of the work to do: jobs under lease, their events, model loads, outages, rate limits, the leader."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, Index, Text, false, text
from sqlalchemy.orm import Mapped, mapped_column

from persyn.db.base import Base, Big, CreatedAt, Hash, Id, UtcTime, words

#: Few jobs follow another one.
_FOLLOWS = text("follows_job_id IS NOT NULL")


class JobState(StrEnum):
    """The state of a job. Only a running job has an owner and a lease."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Job(Base):
    """One leasable piece of one stage of one run: some prompts, for one model.

    Its prompts are the run's prompts between two ids. A query finds those still missing, so a job
    that was half done when its worker died is half as long for the next worker.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(
            "state <> 'running' OR (owner IS NOT NULL AND lease_until IS NOT NULL)", name="running_under_lease"
        ),
        Index(
            "ix_jobs_claim",
            "queue",
            "priority",
            "id",
            sqlite_where=text("state = 'queued'"),
            postgresql_where=text("state = 'queued'"),
        ),
        Index(
            "ix_jobs_lease",
            "lease_until",
            sqlite_where=text("state = 'running'"),
            postgresql_where=text("state = 'running'"),
        ),
        Index("ix_jobs_run_id_stage_state", "run_id", "stage", "state"),
        Index("ix_jobs_follows_job_id", "follows_job_id", sqlite_where=_FOLLOWS, postgresql_where=_FOLLOWS),
        # Heartbeats change no indexed column; free space on the page keeps those updates in place (HOT).
        {"postgresql_with": {"fillfactor": "70"}},
    )

    id: Mapped[Id]
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"))
    stage: Mapped[str]
    queue: Mapped[str] = mapped_column(comment="name of the model spec; jobs of one queue share a loaded engine")
    teacher_id: Mapped[int | None] = mapped_column(ForeignKey("teachers.id", ondelete="RESTRICT"))
    scorer_id: Mapped[int | None] = mapped_column(ForeignKey("scorers.id", ondelete="RESTRICT"))
    follows_job_id: Mapped[int | None] = mapped_column(
        ForeignKey("jobs.id", ondelete="SET NULL"), comment="the job whose responses it scores; null: all in its range"
    )
    first_prompt_id: Mapped[Big] = mapped_column(comment="inclusive")
    last_prompt_id: Mapped[Big] = mapped_column(comment="inclusive")
    n_prompts: Mapped[int] = mapped_column(comment="number of items when the job was planned")
    gpus: Mapped[int] = mapped_column(default=0, comment="number of GPUs that the model needs")
    is_light: Mapped[bool] = mapped_column(
        default=False,
        server_default=false(),
        comment="whether the model needs neither GPUs nor the CPU for itself: it is behind a server, or a checker",
    )
    priority: Mapped[int] = mapped_column(
        default=0, comment="lower values are claimed first: the run's priority, negated"
    )
    state: Mapped[JobState] = mapped_column(words(JobState, "state"), default=JobState.QUEUED)
    attempts: Mapped[int] = mapped_column(default=0, comment="attempts since results were last saved")
    max_attempts: Mapped[int] = mapped_column(default=3)
    fence: Mapped[Big] = mapped_column(
        default=0, comment="incremented by each claim; checked by every write of results"
    )
    owner: Mapped[str | None] = mapped_column(comment="worker process that holds or last held the job")
    lease_until: Mapped[UtcTime | None]
    heartbeat_at: Mapped[UtcTime | None]
    not_before: Mapped[UtcTime | None] = mapped_column(comment="earliest time of the next attempt, after a failed one")
    dispatched_at: Mapped[UtcTime | None] = mapped_column(comment="when a broker message was last sent for the job")
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    error: Mapped[str | None] = mapped_column(Text, comment="reason of the last failure")
    created_at: Mapped[CreatedAt]
    started_at: Mapped[UtcTime | None] = mapped_column(comment="time of the first claim")
    finished_at: Mapped[UtcTime | None]


class Outage(Base):
    """A server that is temporarily unavailable, and a run whose jobs of one queue wait for it.

    The row is deleted when the server answers again, and when the run is resumed.
    """

    __tablename__ = "outages"

    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    queue: Mapped[str] = mapped_column(primary_key=True)
    since: Mapped[UtcTime] = mapped_column(comment="when the outage was first noticed")
    retry_at: Mapped[UtcTime] = mapped_column(comment="when the server is tried again")
    error: Mapped[str] = mapped_column(Text, comment="last error of the server, or that it did not respond")


class RateLimit(Base):
    """What was used of an account's limits of requests and tokens per minute, by all workers together.

    At its limit, an account uses up a minute of it per minute: each request moves the time up to which it is used up.
    """

    __tablename__ = "rate_limits"

    account: Mapped[str] = mapped_column(primary_key=True, comment="hash of URLs, key variable and model")
    requests_until: Mapped[UtcTime] = mapped_column(comment="time up to which the limit of requests is used up")
    tokens_until: Mapped[UtcTime] = mapped_column(comment="time up to which the limit of tokens is used up")


class Batch(Base):
    """A job's requests as a batch at a provider, recorded before it is created there."""

    __tablename__ = "batches"

    key: Mapped[str] = mapped_column(primary_key=True, comment="in the batch's metadata at the provider")
    job_id: Mapped[int] = mapped_column(
        ForeignKey("jobs.id", ondelete="CASCADE"), index=True, comment="the job whose requests it holds"
    )
    place: Mapped[Hash] = mapped_column(comment="SHA-256 of the server's URL and of the key's variable")
    provider_id: Mapped[str | None] = mapped_column(comment="the batch's id at the provider, once it is created")
    requests: Mapped[int] = mapped_column(comment="number of requests in it")
    finished: Mapped[int] = mapped_column(comment="number of them that the provider has finished")
    created_at: Mapped[CreatedAt]
    collected_at: Mapped[UtcTime | None] = mapped_column(comment="when its results were stored; null while it is open")


class Event(Base):
    """One state transition of a run, a job or an assignment. Append-only."""

    __tablename__ = "events"

    id: Mapped[Id]
    at: Mapped[CreatedAt]
    actor: Mapped[str] = mapped_column(comment="worker or person that caused the event")
    run_id: Mapped[int | None] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), index=True)
    job_id: Mapped[int | None] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    prompt_id: Mapped[int | None] = mapped_column(ForeignKey("prompts.id", ondelete="RESTRICT"))
    fence: Mapped[Big | None]
    from_state: Mapped[str | None]
    to_state: Mapped[str]
    detail: Mapped[dict[str, Any]] = mapped_column(default=dict)


class Load(Base):
    """A model loaded by a worker: the cost of each change of teacher."""

    __tablename__ = "loads"

    id: Mapped[Id]
    at: Mapped[CreatedAt] = mapped_column(comment="when loading finished")
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), index=True)
    job_id: Mapped[int] = mapped_column(
        ForeignKey("jobs.id", ondelete="CASCADE"), index=True, comment="the job that the model was loaded for"
    )
    owner: Mapped[str] = mapped_column(comment="worker process that loaded the model")
    engine: Mapped[str] = mapped_column(comment="name and version of the engine")
    seconds: Mapped[float] = mapped_column(comment="load time, from the start of the engine process")
    gpus: Mapped[str | None] = mapped_column(
        comment="GPUs assigned to the engine, as named by nvidia-smi; null for none"
    )
    log: Mapped[str] = mapped_column(unique=True, comment="log file, in PERSYN_HOME/logs on the worker's machine")


class Leader(Base):
    """Which dispatcher leads and until when; at most one row. The leader checks the fence in every write."""

    __tablename__ = "leader"
    __table_args__ = (CheckConstraint("id = 1", name="one"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False, comment="always 1")
    owner: Mapped[str] = mapped_column(comment="dispatcher process that leads or last led")
    fence: Mapped[Big] = mapped_column(comment="incremented with each new leader")
    lease_until: Mapped[UtcTime]
