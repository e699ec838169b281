"""Tables of what a run spends: dated prices, expenses by claim, and what was planned."""

from __future__ import annotations

from enum import StrEnum

from sqlalchemy import CheckConstraint, ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from persyn.db.base import Base, Big, CreatedAt, Id, UtcTime, words


class PriceKind(StrEnum):
    """What a price is for: tokens of prompts or of responses, asked for one by one or in a batch."""

    INPUT = "input"
    OUTPUT = "output"
    BATCH_INPUT = "batch_input"
    BATCH_OUTPUT = "batch_output"


class Place(StrEnum):
    """Where requests are computed, which decides what becomes of those in flight when their worker is lost.

    engine: in a process that ends with the worker; nothing more is spent.
    server: where they may be charged although nobody receives the responses.
    batch:  at a provider that keeps the responses for the next worker.
    """

    ENGINE = "engine"
    SERVER = "server"
    BATCH = "batch"


class Price(Base):
    """The price of one kind of a model's tokens from a time on, in a run. Append-only: the latest valid one counts."""

    __tablename__ = "prices"
    __table_args__ = (
        CheckConstraint("(teacher_id IS NULL) <> (scorer_id IS NULL)", name="teacher_or_scorer"),
        Index("ix_prices_teacher_id_kind_valid_from", "teacher_id", "kind", "valid_from"),
        Index("ix_prices_scorer_id_kind_valid_from", "scorer_id", "kind", "valid_from"),
    )

    id: Mapped[Id]
    teacher_id: Mapped[int | None] = mapped_column(ForeignKey("teachers.id", ondelete="CASCADE"))
    scorer_id: Mapped[int | None] = mapped_column(ForeignKey("scorers.id", ondelete="CASCADE"), comment="a judge's")
    run_id: Mapped[int | None] = mapped_column(
        ForeignKey("runs.id", ondelete="CASCADE"),
        comment="the run that is charged at it; null: every run without a price of its own",
    )
    kind: Mapped[PriceKind] = mapped_column(words(PriceKind, "kind"))
    usd: Mapped[float] = mapped_column(comment="US dollars per million tokens")
    valid_from: Mapped[UtcTime]
    source: Mapped[str] = mapped_column(comment="where the price is from: a run's file, or the table of litellm")
    created_at: Mapped[CreatedAt]


class Expense(Base):
    """What the requests of one claim of a job cost: those that are settled, and those in flight.

    A request is settled in the transaction that stores its result. With a budget, an upper estimate of its cost is held
    from before it is sent until then.
    """

    __tablename__ = "expenses"
    __table_args__ = ({"sqlite_with_rowid": False},)

    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    fence: Mapped[Big] = mapped_column(primary_key=True, comment="of the claim")
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), index=True)
    stage: Mapped[str]
    teacher_id: Mapped[int | None] = mapped_column(ForeignKey("teachers.id", ondelete="RESTRICT"))
    scorer_id: Mapped[int | None] = mapped_column(ForeignKey("scorers.id", ondelete="RESTRICT"))
    place: Mapped[Place] = mapped_column(words(Place, "place"))
    requests: Mapped[int] = mapped_column(default=0, comment="requests with a result, failed ones included")
    repeats: Mapped[int] = mapped_column(
        default=0, comment="calls that may have been charged without a usable answer, by the upper estimate"
    )
    uncounted: Mapped[int] = mapped_column(
        default=0, comment="requests whose tokens nobody counted, by the upper estimate"
    )
    lost: Mapped[int] = mapped_column(
        default=0, comment="requests in flight when their worker was lost; of a server's, by the upper estimate"
    )
    prompt_tokens: Mapped[Big] = mapped_column(default=0)
    response_tokens: Mapped[Big] = mapped_column(default=0)
    usd: Mapped[float | None] = mapped_column(comment="US dollars at the prices of the claim; null without prices")
    engine_seconds: Mapped[float] = mapped_column(default=0.0, comment="time of the engine, times its GPUs")
    held: Mapped[int] = mapped_column(default=0, comment="requests in flight, in a run with a budget")
    held_prompt_tokens: Mapped[Big] = mapped_column(default=0, comment="upper estimate")
    held_response_tokens: Mapped[Big] = mapped_column(default=0, comment="upper estimate")
    held_usd: Mapped[float] = mapped_column(default=0.0, comment="upper estimate; 0 without prices")
    serial: Mapped[int] = mapped_column(
        default=0, comment="number of the last change, so that a repeated transaction changes nothing"
    )
    created_at: Mapped[CreatedAt]


class PlannedWork(Base):
    """What a model was planned to spend in a stage of a run, when the run was in another stage or at its start."""

    __tablename__ = "planned_work"

    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    made_in: Mapped[str] = mapped_column(primary_key=True, comment="stage of the run when the plan was made")
    stage: Mapped[str] = mapped_column(primary_key=True, comment="stage that is planned")
    teacher_id: Mapped[int] = mapped_column(
        ForeignKey("teachers.id", ondelete="RESTRICT"), primary_key=True, autoincrement=False
    )
    requests: Mapped[float] = mapped_column(comment="expected number")
    tokens: Mapped[float] = mapped_column(comment="of prompts and responses, expected")
    tokens_low: Mapped[float] = mapped_column(comment="lower end of an interval of 95%")
    tokens_high: Mapped[float] = mapped_column(comment="upper end of an interval of 95%")
    usd: Mapped[float | None] = mapped_column(comment="US dollars, expected; null without prices")
    engine_hours: Mapped[float | None] = mapped_column(comment="expected; null without a measurement")
    created_at: Mapped[CreatedAt]
