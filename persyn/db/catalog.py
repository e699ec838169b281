"""Tables of a run's inputs: prompts, teachers, students, scorers, and the run itself."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from sqlalchemy import ForeignKey, Index, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from persyn.db.base import Base, Big, CreatedAt, Hash, Id, UtcTime, words


class RunState(StrEnum):
    """The state of a run. A paused one waits for a person: its budget is used up, or someone has paused it.

    One that is being deleted has lost rows already, and can only be deleted.
    """

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    PAUSED = "paused"
    DELETING = "deleting"


class Role(StrEnum):
    """The role of a prompt in a run; the first two are answered by every teacher."""

    CALIBRATION = "calibration"
    HOLDOUT = "holdout"
    TARGET = "target"


class Prompt(Base):
    """One instruction to be answered; equal conversations are one prompt, whatever file they came from."""

    __tablename__ = "prompts"

    id: Mapped[Id]
    content_hash: Mapped[Hash] = mapped_column(unique=True, comment="SHA-256 of the conversation's canonical JSON")
    text: Mapped[str] = mapped_column(Text, comment="the last turn, the user's or a tool's")
    history: Mapped[list[Any] | None] = mapped_column(comment="the turns before the last one: [{role, content}, ...]")
    last_turn: Mapped[dict[str, Any] | None] = mapped_column(
        comment="the last turn without its text, where it is not the user's: {role: tool, tool_call_id, ...}"
    )
    tools: Mapped[list[Any] | None] = mapped_column(comment="the functions that may be called: [{type, function}, ...]")
    response_schema: Mapped[dict[str, Any] | None] = mapped_column(comment="JSON schema of the response")
    answer: Mapped[str | None] = mapped_column(Text, comment="reference answer")
    source: Mapped[str] = mapped_column(comment="name of the file it was first imported from")
    source_id: Mapped[str | None] = mapped_column(comment="id of the prompt in that file")
    meta: Mapped[dict[str, Any]] = mapped_column(comment="all other fields of the imported row")
    created_at: Mapped[CreatedAt]


class Teacher(Base):
    """A model that writes responses, as an immutable version: any change makes it another teacher."""

    __tablename__ = "teachers"

    id: Mapped[Id]
    name: Mapped[str] = mapped_column(index=True)
    fingerprint: Mapped[Hash] = mapped_column(
        unique=True, comment="SHA-256 of everything that determines its responses"
    )
    engine: Mapped[str]
    model: Mapped[str]
    revision: Mapped[str | None] = mapped_column(
        comment="hub commit, sha256:... of a local folder, or the run file's word for what a server has"
    )
    options: Mapped[dict[str, Any]] = mapped_column(
        comment="engine options that determine responses: dtype, max_model_len, ..."
    )
    sampling: Mapped[dict[str, Any]]
    system: Mapped[str | None] = mapped_column(Text)
    few_shot: Mapped[list[Any]] = mapped_column(comment="[{user, assistant}, ...]")
    response_schema: Mapped[dict[str, Any] | None] = mapped_column(comment="JSON schema of its responses")
    adapter: Mapped[str | None] = mapped_column(comment="LoRA adapter: a folder or hub id")
    adapter_revision: Mapped[str | None] = mapped_column(comment="hub commit, or sha256:... of a local folder")
    template_hash: Mapped[str | None] = mapped_column(comment="SHA-256 of the chat template; null if it has none")
    family: Mapped[str | None]
    license: Mapped[str | None]
    params_b: Mapped[float | None] = mapped_column(comment="number of parameters, in billions")
    price_in: Mapped[float | None] = mapped_column(comment="US dollars per million prompt tokens")
    price_out: Mapped[float | None] = mapped_column(comment="US dollars per million response tokens")
    created_at: Mapped[CreatedAt]


class Student(Base):
    """The model a dataset is for, as an immutable version."""

    __tablename__ = "students"

    id: Mapped[Id]
    name: Mapped[str] = mapped_column(index=True)
    fingerprint: Mapped[Hash] = mapped_column(unique=True)
    model: Mapped[str]
    revision: Mapped[str | None] = mapped_column(comment="hub commit, or sha256:... of a local folder")
    template_hash: Mapped[str | None] = mapped_column(comment="SHA-256 of the chat template; null if it has none")
    created_at: Mapped[CreatedAt]


class Scorer(Base):
    """One way of scoring responses, as an immutable version."""

    __tablename__ = "scorers"

    id: Mapped[Id]
    fingerprint: Mapped[Hash] = mapped_column(unique=True)
    kind: Mapped[str] = mapped_column(comment="log_likelihood, reward_model, math, ...: an engine's name")
    model: Mapped[str] = mapped_column(comment="empty if the scorer uses no model")
    revision: Mapped[str | None]
    options: Mapped[dict[str, Any]] = mapped_column(comment="engine options that determine scores")
    student_id: Mapped[int | None] = mapped_column(
        ForeignKey("students.id", ondelete="RESTRICT"), comment="set when the scorer is a student's log-likelihood"
    )
    created_at: Mapped[CreatedAt]


class Run(Base):
    """One pass from prompts to dataset: at most one student, an ordered set of teachers, a frozen configuration."""

    __tablename__ = "runs"

    id: Mapped[Id]
    name: Mapped[str] = mapped_column(unique=True)
    state: Mapped[RunState] = mapped_column(words(RunState, "state"), default=RunState.RUNNING)
    stage: Mapped[str] = mapped_column(comment="current stage; the last stage once the run is done")
    plans: Mapped[int] = mapped_column(default=0, comment="number of times the current stage was planned")
    priority: Mapped[int] = mapped_column(
        default=0, server_default="0", comment="jobs of runs with higher values are claimed first"
    )
    config: Mapped[dict[str, Any]] = mapped_column(comment="the run file, frozen")
    config_hash: Mapped[Hash]
    seed: Mapped[Big]
    student_id: Mapped[int | None] = mapped_column(
        ForeignKey("students.id", ondelete="RESTRICT"), comment="null for a run without a student, at alpha 0"
    )
    quality_scorer_id: Mapped[int] = mapped_column(ForeignKey("scorers.id", ondelete="RESTRICT"))
    learnability_scorer_id: Mapped[int | None] = mapped_column(
        ForeignKey("scorers.id", ondelete="RESTRICT"), comment="null if the run scores no learnability, at alpha 0"
    )
    router_id: Mapped[int | None] = mapped_column(ForeignKey("routers.id", ondelete="RESTRICT"))
    error: Mapped[str | None] = mapped_column(Text, comment="why the run failed or is paused")
    created_at: Mapped[CreatedAt]
    finished_at: Mapped[UtcTime | None]


class RunTeacher(Base):
    """A teacher's position in a run, which is also its row in the router's head."""

    __tablename__ = "run_teachers"
    __table_args__ = (UniqueConstraint("run_id", "teacher_id"),)

    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    teacher_id: Mapped[int] = mapped_column(ForeignKey("teachers.id", ondelete="RESTRICT"))


class RunPrompt(Base):
    """A prompt's position in a run."""

    __tablename__ = "run_prompts"
    __table_args__ = (
        Index("ix_run_prompts_run_id_role_prompt_id", "run_id", "role", "prompt_id"),
        {"sqlite_with_rowid": False},
    )

    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    prompt_id: Mapped[int] = mapped_column(ForeignKey("prompts.id", ondelete="RESTRICT"), primary_key=True)
    role: Mapped[Role] = mapped_column(words(Role, "role"))
    extension: Mapped[int] = mapped_column(
        default=0,
        server_default="0",
        comment="number of the extension that added it, from 1; 0 if the run was started with it",
    )
    recalibration: Mapped[int] = mapped_column(
        default=0,
        server_default="0",
        comment="number of the recalibration that made it a calibration prompt, from 1; 0 if none did",
    )
    former_teacher_id: Mapped[Big | None] = mapped_column(
        comment="the teacher that it had until the last recalibration, where that had not answered it"
    )
