"""Add prices, expenses, planned work, and paused runs; the expenses of existing runs are those of their responses.

Going back is refused while there is a run with a budget, with costs or limits of its assignment, or with prices of a
judge, whose configuration earlier versions cannot read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from alembic import op

from persyn.migrations import sqlite

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_TIME = sa.DateTime(timezone=True)
_STATES = ("running", "done", "failed", "cancelled")
#: The responses that a run's own jobs wrote. A price is the teacher's as it is now; earlier ones are not known.
_EXPENSES = """
    INSERT INTO expenses (job_id, fence, run_id, stage, teacher_id, place, requests, prompt_tokens, response_tokens, usd)
    SELECT j.id, 0, j.run_id, j.stage, x.teacher_id, 'engine', count(*),
           coalesce(sum(x.prompt_tokens), 0), coalesce(sum(x.response_tokens), 0),
           CASE WHEN count(x.text) = count(CASE WHEN x.text IS NOT NULL THEN x.prompt_tokens + x.response_tokens END)
                THEN (coalesce(sum(x.prompt_tokens), 0) * min(t.price_in)
                      + coalesce(sum(x.response_tokens), 0) * min(t.price_out)) / 1000000.0 END
    FROM jobs j JOIN responses x ON x.job_id = j.id JOIN teachers t ON t.id = x.teacher_id
    GROUP BY j.id, j.run_id, j.stage, x.teacher_id
"""
#: Keys of configurations that are new.
_LIMITS = frozenset({"cost_weight", "budget", "capacity", "min_share", "max_share"})
_PRICES_OF_JUDGES = frozenset({"price_in", "price_out"})
_PRICES = """
    INSERT INTO prices (teacher_id, kind, usd, valid_from, source)
    SELECT id, '{kind}', {column}, created_at, 'stored before prices had dates' FROM teachers WHERE {column} IS NOT NULL
"""


def upgrade() -> None:
    _set_states((*_STATES, "paused"), error="why the run failed or is paused")
    _create_prices()
    _create_expenses()
    _create_planned_work()
    for kind, column in (("input", "price_in"), ("output", "price_out")):
        op.execute(_PRICES.format(kind=kind, column=column))
    op.execute(_EXPENSES)


def downgrade() -> None:
    runs = sa.table("runs", sa.column("name"), sa.column("config", sa.JSON()))
    if names := sorted(name for name, config in op.get_bind().execute(sa.select(runs)) if _is_new(config)):
        raise RuntimeError(
            "earlier versions know no budgets, no costs and limits of assignments, and no prices of judges: "
            + ", ".join(names)
        )
    op.drop_table("planned_work")
    op.drop_table("expenses")
    op.drop_table("prices")
    op.execute("UPDATE runs SET state = 'cancelled' WHERE state = 'paused'")
    _set_states(_STATES, error="why the run failed")


def _is_new(config: Mapping[str, Any]) -> bool:
    """Whether a configuration has keys that earlier versions do not know."""
    quality = config["quality"]
    scorers = quality if isinstance(quality, list) else [quality]
    return (
        config.get("budget") is not None
        or not _LIMITS.isdisjoint(config.get("strategy", ()))
        or any(not _PRICES_OF_JUDGES.isdisjoint(scorer.get("options", ())) for scorer in scorers)
    )


def _created_at() -> sa.Column[object]:
    default = {
        "sqlite": sa.text("(strftime('%Y-%m-%d %H:%M:%f', 'now'))"),
        "postgresql": sa.text("clock_timestamp()"),
    }
    return sa.Column("created_at", _TIME, server_default=default[op.get_bind().dialect.name], nullable=False)


def _create_prices() -> None:
    kinds = ("input", "output", "batch_input", "batch_output")
    op.create_table(
        "prices",
        sa.Column("id", _BIG, sa.Identity(always=False), nullable=False),
        sa.Column("teacher_id", _BIG, nullable=True),
        sa.Column("scorer_id", _BIG, nullable=True, comment="a judge's"),
        sa.Column(
            "run_id",
            _BIG,
            nullable=True,
            comment="the run that is charged at it; null: every run without a price of its own",
        ),
        sa.Column("kind", _words("kind", kinds), nullable=False),
        sa.Column("usd", sa.Double(), nullable=False, comment="US dollars per million tokens"),
        sa.Column("valid_from", _TIME, nullable=False),
        sa.Column(
            "source",
            sa.String(),
            nullable=False,
            comment="where the price is from: a run's file, or the table of litellm",
        ),
        _created_at(),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_prices")),
        _refers("prices", "teacher_id", "teachers", "CASCADE"),
        _refers("prices", "scorer_id", "scorers", "CASCADE"),
        _refers("prices", "run_id", "runs", "CASCADE"),
        sa.CheckConstraint("(teacher_id IS NULL) <> (scorer_id IS NULL)", name=op.f("ck_prices_teacher_or_scorer")),
    )
    for column in ("teacher_id", "scorer_id"):
        op.create_index(f"ix_prices_{column}_kind_valid_from", "prices", [column, "kind", "valid_from"])


def _create_expenses() -> None:
    estimate = "upper estimate"
    op.create_table(
        "expenses",
        sa.Column("job_id", _BIG, nullable=False),
        sa.Column("fence", _BIG, nullable=False, comment="of the claim"),
        sa.Column("run_id", _BIG, nullable=False),
        sa.Column("stage", sa.String(), nullable=False),
        sa.Column("teacher_id", _BIG, nullable=True),
        sa.Column("scorer_id", _BIG, nullable=True),
        sa.Column("place", _words("place", ("engine", "server", "batch")), nullable=False),
        _count("requests", "requests with a result, failed ones included"),
        _count("repeats", "calls that may have been charged without a usable answer, by the upper estimate"),
        _count("uncounted", "requests whose tokens nobody counted, by the upper estimate"),
        _count("lost", "requests in flight when their worker was lost; of a server's, by the upper estimate"),
        _count("prompt_tokens", None, _BIG),
        _count("response_tokens", None, _BIG),
        sa.Column(
            "usd", sa.Double(), nullable=True, comment="US dollars at the prices of the claim; null without prices"
        ),
        _count("engine_seconds", "time of the engine, times its GPUs", sa.Double()),
        _count("held", "requests in flight, in a run with a budget"),
        _count("held_prompt_tokens", estimate, _BIG),
        _count("held_response_tokens", estimate, _BIG),
        _count("held_usd", f"{estimate}; 0 without prices", sa.Double()),
        _count("serial", "number of the last change, so that a repeated transaction changes nothing"),
        _created_at(),
        sa.PrimaryKeyConstraint("job_id", "fence", name=op.f("pk_expenses")),
        _refers("expenses", "job_id", "jobs", "CASCADE"),
        _refers("expenses", "run_id", "runs", "CASCADE"),
        _refers("expenses", "teacher_id", "teachers", "RESTRICT"),
        _refers("expenses", "scorer_id", "scorers", "RESTRICT"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_expenses_run_id", "expenses", ["run_id"])


def _create_planned_work() -> None:
    op.create_table(
        "planned_work",
        sa.Column("run_id", _BIG, nullable=False),
        sa.Column("made_in", sa.String(), nullable=False, comment="stage of the run when the plan was made"),
        sa.Column("stage", sa.String(), nullable=False, comment="stage that is planned"),
        sa.Column("teacher_id", _BIG, autoincrement=False, nullable=False),
        sa.Column("requests", sa.Double(), nullable=False, comment="expected number"),
        sa.Column("tokens", sa.Double(), nullable=False, comment="of prompts and responses, expected"),
        sa.Column("tokens_low", sa.Double(), nullable=False, comment="lower end of an interval of 95%"),
        sa.Column("tokens_high", sa.Double(), nullable=False, comment="upper end of an interval of 95%"),
        sa.Column("usd", sa.Double(), nullable=True, comment="US dollars, expected; null without prices"),
        sa.Column("engine_hours", sa.Double(), nullable=True, comment="expected; null without a measurement"),
        _created_at(),
        sa.PrimaryKeyConstraint("run_id", "made_in", "stage", "teacher_id", name=op.f("pk_planned_work")),
        _refers("planned_work", "run_id", "runs", "CASCADE"),
        _refers("planned_work", "teacher_id", "teachers", "RESTRICT"),
    )


def _count(name: str, comment: str | None, kind: sa.types.TypeEngine[object] | None = None) -> sa.Column[object]:
    return sa.Column(name, kind or sa.Integer(), server_default=sa.text("0"), nullable=False, comment=comment)


def _words(name: str, values: tuple[str, ...]) -> sa.Enum:
    return sa.Enum(*values, name=name, native_enum=False, create_constraint=True, length=20)


def _refers(table: str, column: str, to: str, ondelete: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [f"{to}.id"], name=op.f(f"fk_{table}_{column}"), ondelete=ondelete)


def _set_states(states: tuple[str, ...], *, error: str) -> None:
    """Allow these states of a run, with a comment on its error."""
    check, bind = f"state IN ({', '.join(map(repr, states))})", op.get_bind()
    if bind.dialect.name == "postgresql":
        op.drop_constraint(op.f("ck_runs_state"), "runs", type_="check")
        op.create_check_constraint(op.f("ck_runs_state"), "runs", check)
        op.alter_column("runs", "error", comment=error)
        return
    sqlite.edit(bind, "runs", lambda was: re.sub(r"state IN \([^)]*\)", check, was))
