"""Add second choices: their place, the teachers that are next, and the choices before; jobs that follow another one.

Going back is refused while there is a run with [fallback] or `generation.check`, whose configuration earlier versions
cannot read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from persyn.migrations import sqlite

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
_VIEW = "v_teacher_cost"
#: In that view's query of revision 0017: what makes a response one of an assigned teacher; now also of an earlier one.
_ASSIGNMENT = "a.prompt_id = x.prompt_id AND a.teacher_id = x.teacher_id"
_EARLIER = f"""{_ASSIGNMENT}
        LEFT JOIN fallbacks f ON f.run_id = r.id AND f.prompt_id = x.prompt_id AND f.teacher_id = x.teacher_id"""
_USED = (
    "((p.role <> 'target' AND x.sample < {samples}) "
    "OR (coalesce(a.prompt_id, f.prompt_id) IS NOT NULL AND x.sample < {asked}))"
)
_FOLLOWS = "the job whose responses it scores; null: all in its range"
_KEY_NAME = "fk_jobs_follows_job_id"
_KEY = f", \n\tCONSTRAINT {_KEY_NAME} FOREIGN KEY(follows_job_id) REFERENCES jobs (id) ON DELETE SET NULL"
_FURTHER = "ids of the next teachers, best first; null without [fallback], and when none is asked any more"


def upgrade() -> None:
    place = "1 for the strategy's first choice, 2 for the next best teacher, ..."
    op.add_column("assignments", sa.Column("choice", sa.Integer(), server_default="1", nullable=False, comment=place))
    op.add_column("assignments", sa.Column("further", _JSON, nullable=True, comment=_FURTHER))
    _create_fallbacks()
    _add_follows()
    views = op.get_context().script.get_revision("0017").module
    query = views._VIEWS[_VIEW].replace("{used}", _USED)
    if query.count(_ASSIGNMENT) != 1:
        raise RuntimeError(f"{_VIEW} does not join assignments once")
    op.execute(f"DROP VIEW {_VIEW}")
    views.make_views([_VIEW], queries={_VIEW: query.replace(_ASSIGNMENT, _EARLIER)})


def downgrade() -> None:
    runs = sa.table("runs", sa.column("name"), sa.column("config", sa.JSON()))
    if names := sorted(name for name, config in op.get_bind().execute(sa.select(runs)) if _is_new(config)):
        raise RuntimeError(f"earlier versions know neither [fallback] nor generation.check: {', '.join(names)}")
    op.execute(f"DROP VIEW {_VIEW}")
    op.get_context().script.get_revision("0017").module.make_views([_VIEW])
    _drop_follows()
    op.drop_table("fallbacks")
    op.drop_column("assignments", "further")
    op.drop_column("assignments", "choice")


def _is_new(config: Mapping[str, Any]) -> bool:
    return config.get("fallback") is not None or "check" in config.get("generation", ())


def _create_fallbacks() -> None:
    default = {
        "sqlite": sa.text("(strftime('%Y-%m-%d %H:%M:%f', 'now'))"),
        "postgresql": sa.text("clock_timestamp()"),
    }[op.get_bind().dialect.name]
    of_assignment = "of the assignment"
    place = "1 for the strategy's first choice, 2 for the next one, ..."
    cause = "the condition that the response met: failed, truncated, refused, ..."
    op.create_table(
        "fallbacks",
        sa.Column("run_id", _BIG, nullable=False),
        sa.Column("prompt_id", _BIG, nullable=False),
        sa.Column("choice", sa.Integer(), autoincrement=False, nullable=False, comment=place),
        sa.Column("teacher_id", _BIG, nullable=False),
        sa.Column("score", sa.Double(), nullable=True, comment=of_assignment),
        sa.Column("margin", sa.Double(), nullable=True, comment=of_assignment),
        sa.Column("reason", sa.String(), nullable=False, comment=of_assignment),
        sa.Column("sample", sa.Integer(), nullable=True, comment=of_assignment),
        sa.Column("cause", sa.String(), nullable=False, comment=cause),
        sa.Column("failure", sa.Text(), nullable=True, comment="of the response; null if it has a text"),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=default, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "prompt_id", "choice", name=op.f("pk_fallbacks")),
        _refers("run_id", "runs", "CASCADE"),
        _refers("prompt_id", "prompts", "RESTRICT"),
        _refers("teacher_id", "teachers", "RESTRICT"),
        sqlite_with_rowid=False,
    )


def _refers(column: str, table: str, on_delete: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [f"{table}.id"], name=op.f(f"fk_fallbacks_{column}"), ondelete=on_delete)


def _add_follows() -> None:
    op.add_column("jobs", sa.Column("follows_job_id", _BIG, nullable=True, comment=_FOLLOWS))
    if op.get_bind().dialect.name == "sqlite":
        sqlite.edit(op.get_bind(), "jobs", lambda was: f"{was.rstrip().removesuffix(')')}{_KEY})")
    else:
        op.create_foreign_key(_KEY_NAME, "jobs", "jobs", ["follows_job_id"], ["id"], ondelete="SET NULL")
    is_set = sa.text("follows_job_id IS NOT NULL")
    of_set = {"sqlite_where": is_set, "postgresql_where": is_set}
    op.create_index("ix_jobs_follows_job_id", "jobs", ["follows_job_id"], **of_set)


def _drop_follows() -> None:
    op.drop_index("ix_jobs_follows_job_id", table_name="jobs")
    if op.get_bind().dialect.name == "sqlite":
        sqlite.edit(op.get_bind(), "jobs", lambda was: was.replace(_KEY, ""))
    else:
        op.drop_constraint(_KEY_NAME, "jobs", type_="foreignkey")
    op.drop_column("jobs", "follows_job_id")
