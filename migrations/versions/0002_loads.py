"""Record model loads with their job and duration."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

BigInt = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Time = sa.DateTime(timezone=True)


def upgrade() -> None:
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    now = sa.text("(strftime('%Y-%m-%d %H:%M:%f', 'now'))" if is_sqlite else "clock_timestamp()")

    op.create_table(
        "loads",
        sa.Column("id", BigInt, sa.Identity(always=False), nullable=False),
        sa.Column("at", Time, server_default=now, nullable=False, comment="when it was in memory"),
        sa.Column("run_id", BigInt, nullable=False),
        sa.Column("job_id", BigInt, nullable=False, comment="the job that asked for it"),
        sa.Column("owner", sa.String(), nullable=False, comment="the worker process that has it"),
        sa.Column("engine", sa.String(), nullable=False, comment="name and version of what serves it"),
        sa.Column("seconds", sa.Double(), nullable=False, comment="from the start of its process"),
        sa.Column(
            "log", sa.String(), nullable=False, comment="its log file, in PERSYN_HOME/logs on the worker's machine"
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_loads_job_id"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_loads_run_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_loads")),
        sa.UniqueConstraint("log", name=op.f("uq_loads_log")),
    )
    with op.batch_alter_table("loads", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_loads_run_id"), ["run_id"], unique=False)


def downgrade() -> None:
    with op.batch_alter_table("loads", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_loads_run_id"))

    op.drop_table("loads")
