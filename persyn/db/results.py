"""Tables of a run's results: responses, raw scores, routers, router scores, and assignments."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from sqlalchemy import (
    CheckConstraint,
    ColumnElement,
    ForeignKey,
    Index,
    Integer,
    Subquery,
    Text,
    UniqueConstraint,
    and_,
    false,
    literal,
    select,
    text,
    union_all,
)
from sqlalchemy.orm import Mapped, mapped_column

from persyn.db.base import Base, Big, CreatedAt, Hash, Id, words

#: Failures are rare: a partial index finds them among millions of rows.
_FAILED = text("failure IS NOT NULL")


#: The failure of a response of which only scores are known; nobody may read it, but its scores count.
NO_TEXT = "no_text"


class Origin(StrEnum):
    """How a response was obtained."""

    GENERATED = "generated"
    IMPORTED = "imported"


class Response(Base):
    """What one teacher wrote for one prompt, or why it wrote nothing. Shared by all runs."""

    __tablename__ = "responses"
    __table_args__ = (
        UniqueConstraint("prompt_id", "teacher_id", "sample"),
        Index("ix_responses_teacher_id", "teacher_id"),
        Index("ix_responses_job_id", "job_id"),
        Index("ix_responses_failed", "teacher_id", "prompt_id", sqlite_where=_FAILED, postgresql_where=_FAILED),
        CheckConstraint("(text IS NULL) <> (failure IS NULL)", name="text_or_failure"),
    )

    id: Mapped[Id]
    prompt_id: Mapped[int] = mapped_column(ForeignKey("prompts.id", ondelete="RESTRICT"))
    teacher_id: Mapped[int] = mapped_column(ForeignKey("teachers.id", ondelete="RESTRICT"))
    sample: Mapped[int] = mapped_column(default=0, comment="index of the teacher's response to the prompt, from 0")
    text: Mapped[str | None] = mapped_column(Text, comment="the answer, without the reasoning")
    reasoning: Mapped[str | None] = mapped_column(Text, comment="what the teacher wrote before the answer")
    tool_calls: Mapped[list[Any] | None] = mapped_column(comment="[{id, type, function: {name, arguments}}, ...]")
    failure: Mapped[str | None] = mapped_column(Text, comment="why there is no text: too_long, empty, refused, ...")
    finish_reason: Mapped[str | None] = mapped_column(
        comment="stop, length if max_tokens was reached, or what the server gave"
    )
    prompt_tokens: Mapped[int | None]
    response_tokens: Mapped[int | None] = mapped_column(comment="all generated tokens, the reasoning included")
    reasoning_tokens: Mapped[int | None] = mapped_column(comment="those of the reasoning")
    seconds: Mapped[float | None] = mapped_column(comment="from admission to the engine to the last token")
    seed: Mapped[Big | None]
    engine: Mapped[str | None] = mapped_column(comment="name and version of the inference engine")
    origin: Mapped[Origin] = mapped_column(words(Origin, "origin"), default=Origin.GENERATED)
    meta: Mapped[dict[str, Any] | None] = mapped_column(comment="all other fields of the row it was imported from")
    job_id: Mapped[int | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"))
    created_at: Mapped[CreatedAt]


class Score(Base):
    """One scorer's raw value for one response, never normalised; or why there is none."""

    __tablename__ = "scores"
    __table_args__ = (
        CheckConstraint("(value IS NULL) <> (failure IS NULL)", name="value_or_failure"),
        Index("ix_scores_failed", "response_id", sqlite_where=_FAILED, postgresql_where=_FAILED),
        Index("ix_scores_job_id", "job_id"),
        {"sqlite_with_rowid": False},
    )

    response_id: Mapped[int] = mapped_column(ForeignKey("responses.id", ondelete="CASCADE"), primary_key=True)
    scorer_id: Mapped[int] = mapped_column(ForeignKey("scorers.id", ondelete="RESTRICT"), primary_key=True)
    value: Mapped[float | None] = mapped_column(comment="sum of log-probabilities in nats, a logit, or a verdict")
    n_tokens: Mapped[int | None] = mapped_column(comment="number of tokens in the sum")
    reasoning_value: Mapped[float | None] = mapped_column(
        comment="sum of log-probabilities of the reasoning; value is the answer's"
    )
    reasoning_n_tokens: Mapped[int | None] = mapped_column(comment="number of tokens in the reasoning's sum")
    statistics: Mapped[dict[str, Any] | None] = mapped_column(
        comment="other sums over the tokens of a log-likelihood, {answer, reasoning}; null before PerSyn stored them"
    )
    failure: Mapped[str | None] = mapped_column(Text)
    detail: Mapped[dict[str, Any]] = mapped_column(comment="how the value was obtained: parsed forms, dtype, version")
    job_id: Mapped[int | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"))
    created_at: Mapped[CreatedAt]


class Router(Base):
    """A router fitted to one calibration grid."""

    __tablename__ = "routers"

    id: Mapped[Id]
    fingerprint: Mapped[Hash] = mapped_column(unique=True, comment="SHA-256 of backbone, settings and training data")
    backbone: Mapped[str]
    revision: Mapped[str | None]
    kind: Mapped[str] = mapped_column(
        default="head", server_default="head", comment="how it predicts: head, neighbours, ..."
    )
    tune: Mapped[str]
    options: Mapped[dict[str, Any]]
    teacher_ids: Mapped[list[Any]] = mapped_column(comment="teacher ids in head order")
    metrics: Mapped[dict[str, Any]] = mapped_column(comment="Hit@k and rewards on the hold-out, with baselines")
    path: Mapped[str] = mapped_column(comment="folder of the checkpoint")
    sha256: Mapped[Hash] = mapped_column(comment="SHA-256 of the checkpoint's files")
    learned: Mapped[dict[str, Any] | None] = mapped_column(
        comment="of an imported router: the teachers, student and reward that it was fitted to, and its verdict"
    )
    created_at: Mapped[CreatedAt]


class RouterScore(Base):
    """A router's score of one teacher for one prompt; score differences are log-odds of a higher reward."""

    __tablename__ = "router_scores"
    __table_args__ = ({"sqlite_with_rowid": False},)

    router_id: Mapped[int] = mapped_column(ForeignKey("routers.id", ondelete="CASCADE"), primary_key=True)
    prompt_id: Mapped[int] = mapped_column(ForeignKey("prompts.id", ondelete="RESTRICT"), primary_key=True)
    teacher_id: Mapped[int] = mapped_column(ForeignKey("teachers.id", ondelete="RESTRICT"), primary_key=True)
    score: Mapped[float]
    cross_fitted: Mapped[float | None] = mapped_column(
        comment="of a calibration prompt: the score of a router that was fitted without it"
    )


class Assignment(Base):
    """The teacher chosen for a prompt in a run, its margin over the runner-up, and the reason for the choice."""

    __tablename__ = "assignments"
    __table_args__ = (
        Index("ix_assignments_run_id_teacher_id_prompt_id", "run_id", "teacher_id", "prompt_id"),
        Index("ix_assignments_run_id_margin_prompt_id", "run_id", "margin", "prompt_id"),
        Index("ix_assignments_job_id", "job_id"),
        {"sqlite_with_rowid": False},
    )

    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    prompt_id: Mapped[int] = mapped_column(ForeignKey("prompts.id", ondelete="RESTRICT"), primary_key=True)
    teacher_id: Mapped[int] = mapped_column(ForeignKey("teachers.id", ondelete="RESTRICT"))
    score: Mapped[float | None] = mapped_column(comment="router score, or the reward if the reason is calibration")
    margin: Mapped[float | None] = mapped_column(comment="score minus that of the runner-up; null if there is none")
    reason: Mapped[str] = mapped_column(comment="router, calibration, or the strategy that chose (kind: name)")
    sample: Mapped[int | None] = mapped_column(
        default=0, server_default="0", comment="the sample kept for the dataset; null until chosen, and if rejected"
    )
    rejected: Mapped[bool] = mapped_column(
        default=False, server_default=false(), comment="whether no sample is correct: the prompt has no row"
    )
    choice: Mapped[int] = mapped_column(
        default=1, server_default="1", comment="1 for the strategy's first choice, 2 for the next best teacher, ..."
    )
    further: Mapped[list[Any] | None] = mapped_column(
        comment="ids of the next teachers, best first; null without [fallback], and when none is asked any more"
    )
    job_id: Mapped[int | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"))
    created_at: Mapped[CreatedAt]


class Fallback(Base):
    """A choice of a teacher whose response is not used, as the assignment was, and why. Append-only."""

    __tablename__ = "fallbacks"
    __table_args__ = ({"sqlite_with_rowid": False},)

    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    prompt_id: Mapped[int] = mapped_column(ForeignKey("prompts.id", ondelete="RESTRICT"), primary_key=True)
    choice: Mapped[int] = mapped_column(
        primary_key=True, autoincrement=False, comment="1 for the strategy's first choice, 2 for the next one, ..."
    )
    teacher_id: Mapped[int] = mapped_column(ForeignKey("teachers.id", ondelete="RESTRICT"))
    score: Mapped[float | None] = mapped_column(comment="of the assignment")
    margin: Mapped[float | None] = mapped_column(comment="of the assignment")
    reason: Mapped[str] = mapped_column(comment="of the assignment")
    sample: Mapped[int | None] = mapped_column(comment="of the assignment")
    cause: Mapped[str] = mapped_column(comment="the condition that the response met: failed, truncated, refused, ...")
    failure: Mapped[str | None] = mapped_column(Text, comment="of the response; null if it has a text")
    created_at: Mapped[CreatedAt]


class Chart(Base):
    """A control chart of a teacher's quality in a run, and what it is held against; a stopped teacher gets another."""

    __tablename__ = "charts"
    __table_args__ = (Index("ix_charts_run_id_teacher_id", "run_id", "teacher_id"),)

    id: Mapped[Id]
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"))
    teacher_id: Mapped[int] = mapped_column(ForeignKey("teachers.id", ondelete="RESTRICT"))
    predicted: Mapped[float] = mapped_column(comment="mean quality of the calibration responses")
    n: Mapped[int] = mapped_column(comment="number of calibration responses")
    low: Mapped[float] = mapped_column(comment="the lowest quality of any teacher in the calibration")
    high: Mapped[float] = mapped_column(comment="the highest")
    reference: Mapped[float] = mapped_column(comment="lower end of the prediction's interval; 0 at low, 1 at high")
    weight: Mapped[float] = mapped_column(comment="of a response in the likelihood ratio")
    created_at: Mapped[CreatedAt]


class ChartPoint(Base):
    """A control chart after the responses of one more job were scored. Append-only."""

    __tablename__ = "chart_points"
    __table_args__ = (Index("ix_chart_points_chart_id_id", "chart_id", "id"),)

    id: Mapped[Id]
    chart_id: Mapped[int] = mapped_column(ForeignKey("charts.id", ondelete="CASCADE"))
    job_id: Mapped[int] = mapped_column(
        ForeignKey("jobs.id", ondelete="CASCADE"), unique=True, comment="the teacher's job that wrote the responses"
    )
    responses: Mapped[int] = mapped_column(comment="number of responses on the chart")
    statistic: Mapped[float] = mapped_column(comment="CUSUM of log-likelihood ratios, in nats")
    rising: Mapped[int] = mapped_column(comment="number of responses since the statistic was last 0")
    total: Mapped[float] = mapped_column(comment="sum of the qualities of those responses")
    is_alarm: Mapped[bool] = mapped_column(comment="whether the teacher is worse than predicted; the last point then")
    created_at: Mapped[CreatedAt]


def sample_indices(n: int) -> Subquery:
    """The sample indices 0 to n - 1 as a table with one column, `sample`."""
    return union_all(*(select(literal(index, Integer).label("sample")) for index in range(n))).subquery("samples")


def answers_assignment() -> ColumnElement[bool]:
    """Join condition: the response is the one kept for its assignment."""
    return and_(is_candidate(), Response.sample == Assignment.sample)


def is_candidate(response: Any = Response) -> ColumnElement[bool]:
    """Join condition: the response, or an alias of it, is one of the assigned teacher."""
    return and_(response.prompt_id == Assignment.prompt_id, response.teacher_id == Assignment.teacher_id)
