"""Add the control charts of teachers, with a point for each job whose responses were scored.

Going back is refused while there is a run with `generation.when_worse`, whose configuration earlier versions cannot read.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_NOW = {"sqlite": "(strftime('%Y-%m-%d %H:%M:%f', 'now'))", "postgresql": "clock_timestamp()"}


def upgrade() -> None:
    reference = "lower end of the prediction's interval; 0 at low, 1 at high"
    _create(
        "charts",
        sa.Column("run_id", _BIG, nullable=False),
        sa.Column("teacher_id", _BIG, nullable=False),
        sa.Column("predicted", sa.Double(), nullable=False, comment="mean quality of the calibration responses"),
        sa.Column("n", sa.Integer(), nullable=False, comment="number of calibration responses"),
        sa.Column("low", sa.Double(), nullable=False, comment="the lowest quality of any teacher in the calibration"),
        sa.Column("high", sa.Double(), nullable=False, comment="the highest"),
        sa.Column("reference", sa.Double(), nullable=False, comment=reference),
        sa.Column("weight", sa.Double(), nullable=False, comment="of a response in the likelihood ratio"),
        _refers("charts", "run_id", "runs", "CASCADE"),
        _refers("charts", "teacher_id", "teachers", "RESTRICT"),
    )
    op.create_index("ix_charts_run_id_teacher_id", "charts", ["run_id", "teacher_id"])
    rising = "number of responses since the statistic was last 0"
    alarm = "whether the teacher is worse than predicted; the last point then"
    _create(
        "chart_points",
        sa.Column("chart_id", _BIG, nullable=False),
        sa.Column("job_id", _BIG, nullable=False, comment="the teacher's job that wrote the responses"),
        sa.Column("responses", sa.Integer(), nullable=False, comment="number of responses on the chart"),
        sa.Column("statistic", sa.Double(), nullable=False, comment="CUSUM of log-likelihood ratios, in nats"),
        sa.Column("rising", sa.Integer(), nullable=False, comment=rising),
        sa.Column("total", sa.Double(), nullable=False, comment="sum of the qualities of those responses"),
        sa.Column("is_alarm", sa.Boolean(), nullable=False, comment=alarm),
        sa.UniqueConstraint("job_id", name=op.f("uq_chart_points_job_id")),
        _refers("chart_points", "chart_id", "charts", "CASCADE"),
        _refers("chart_points", "job_id", "jobs", "CASCADE"),
    )
    op.create_index("ix_chart_points_chart_id_id", "chart_points", ["chart_id", "id"])


def downgrade() -> None:
    runs = sa.table("runs", sa.column("name"), sa.column("config", sa.JSON()))
    found = op.get_bind().execute(sa.select(runs))
    if names := sorted(name for name, config in found if "when_worse" in config.get("generation", ())):
        raise RuntimeError(f"earlier versions do not know generation.when_worse: {', '.join(names)}")
    op.drop_table("chart_points")
    op.drop_table("charts")


def _create(table: str, *parts: Any) -> None:
    default = sa.text(_NOW[op.get_bind().dialect.name])
    op.create_table(
        table,
        sa.Column("id", _BIG, sa.Identity(), nullable=False),
        *parts,
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=default, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f(f"pk_{table}")),
    )


def _refers(table: str, column: str, to: str, on_delete: str) -> sa.ForeignKeyConstraint:
    name = op.f(f"fk_{table}_{column}")
    return sa.ForeignKeyConstraint([column], [f"{to}.id"], name=name, ondelete=on_delete)
