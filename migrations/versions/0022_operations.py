"""Add priorities of runs, runs that are being deleted, and indexes by which a job's deletion finds what it wrote.

Going back makes a run that is being deleted a cancelled one.
"""

from __future__ import annotations

import re

import sqlalchemy as sa
from alembic import op

from persyn.migrations import sqlite

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None

_STATES = ("running", "done", "failed", "cancelled", "paused")
#: Tables whose rows name the job that wrote them.
_WRITTEN = ("responses", "scores", "assignments", "loads")
_CLAIMED_FIRST = "lower values are claimed first"


def upgrade() -> None:
    _set_states((*_STATES, "deleting"))
    op.add_column(
        "runs",
        sa.Column(
            "priority",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
            comment="jobs of runs with higher values are claimed first",
        ),
    )
    _comment(f"{_CLAIMED_FIRST}: the run's priority, negated")
    for table in _WRITTEN:
        op.create_index(f"ix_{table}_job_id", table, ["job_id"])


def downgrade() -> None:
    for table in _WRITTEN:
        op.drop_index(f"ix_{table}_job_id", table)
    _comment(_CLAIMED_FIRST)
    op.execute("UPDATE jobs SET priority = 0")
    op.drop_column("runs", "priority")
    op.execute("UPDATE runs SET state = 'cancelled' WHERE state = 'deleting'")
    _set_states(_STATES)


def _comment(text: str) -> None:
    if op.get_bind().dialect.name == "postgresql":  # SQLite has no comments
        op.alter_column("jobs", "priority", comment=text)


def _set_states(states: tuple[str, ...]) -> None:
    """Allow these states of a run."""
    check, bind = f"state IN ({', '.join(map(repr, states))})", op.get_bind()
    if bind.dialect.name == "postgresql":
        op.drop_constraint(op.f("ck_runs_state"), "runs", type_="check")
        op.create_check_constraint(op.f("ck_runs_state"), "runs", check)
        return
    sqlite.edit(bind, "runs", lambda was: re.sub(r"state IN \([^)]*\)", check, was))
