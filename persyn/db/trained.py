"""Tables of trained students: trainings on runs' datasets, and evaluations on unseen prompts."""

from __future__ import annotations

from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, Text
from sqlalchemy.orm import Mapped, mapped_column

from persyn.db.base import Base, CreatedAt, Hash, Id, UtcTime


class Training(Base):
    """A student trained on the dataset of a run. The row is inserted once the weights are saved."""

    __tablename__ = "trainings"

    id: Mapped[Id]
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), index=True)
    student_id: Mapped[int] = mapped_column(
        ForeignKey("students.id", ondelete="RESTRICT"), comment="before this training"
    )
    fingerprint: Mapped[Hash] = mapped_column(unique=True, comment="SHA-256 of run, student, dataset and settings")
    dataset_hash: Mapped[Hash] = mapped_column(comment="SHA-256 of the conversations, in order")
    settings: Mapped[dict[str, Any]] = mapped_column(comment="tune, epochs, learning_rate, batch_size, seed, ...")
    notes: Mapped[dict[str, Any]] = mapped_column(
        comment="rows, response tokens, steps, seconds, losses (nats per token)"
    )
    path: Mapped[str] = mapped_column(comment="folder of the trained weights")
    revision: Mapped[str] = mapped_column(comment="sha256:... of that folder")
    created_at: Mapped[CreatedAt]


class Evaluation(Base):
    """A student, before or after a training, answering a set of prompts; its answers are scored by one scorer."""

    __tablename__ = "evaluations"

    id: Mapped[Id]
    fingerprint: Mapped[Hash] = mapped_column(unique=True, comment="SHA-256 of weights, prompts, sampling and scorer")
    student_id: Mapped[int] = mapped_column(ForeignKey("students.id", ondelete="RESTRICT"), index=True)
    training_id: Mapped[int | None] = mapped_column(
        ForeignKey("trainings.id", ondelete="CASCADE"), index=True, comment="null for the student before any training"
    )
    scorer_id: Mapped[int] = mapped_column(ForeignKey("scorers.id", ondelete="RESTRICT"))
    name: Mapped[str] = mapped_column(comment="names of the prompt files")
    prompts_hash: Mapped[Hash] = mapped_column(comment="SHA-256 of the prompts' content hashes, sorted")
    how: Mapped[dict[str, Any]] = mapped_column(comment="how responses were generated: engine, options, sampling")
    created_at: Mapped[CreatedAt]
    finished_at: Mapped[UtcTime | None]


class Outcome(Base):
    """The result of one prompt of an evaluation; all values are null until it is answered."""

    __tablename__ = "outcomes"
    __table_args__ = (
        CheckConstraint("value IS NULL OR failure IS NULL", name="not_both"),
        {"sqlite_with_rowid": False},
    )

    evaluation_id: Mapped[int] = mapped_column(ForeignKey("evaluations.id", ondelete="CASCADE"), primary_key=True)
    prompt_id: Mapped[int] = mapped_column(ForeignKey("prompts.id", ondelete="RESTRICT"), primary_key=True)
    response: Mapped[str | None] = mapped_column(Text, comment="the student's response; null if none is generated")
    value: Mapped[float | None] = mapped_column(comment="the scorer's raw value")
    n_tokens: Mapped[int | None] = mapped_column(comment="number of tokens in the sum, for a log-likelihood")
    failure: Mapped[str | None] = mapped_column(Text)
