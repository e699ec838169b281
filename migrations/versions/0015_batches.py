"""Add batches of requests that a provider executes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

BigInt = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    now = sa.text("(strftime('%Y-%m-%d %H:%M:%f', 'now'))" if is_sqlite else "clock_timestamp()")
    op.create_table(
        "batches",
        sa.Column("key", sa.String(), nullable=False, comment="in the batch's metadata at the provider"),
        sa.Column("job_id", BigInt, nullable=False, comment="the job whose requests it holds"),
        sa.Column(
            "place",
            sa.String(length=64),
            nullable=False,
            comment="SHA-256 of the server's URL and of the key's variable",
        ),
        sa.Column(
            "provider_id", sa.String(), nullable=True, comment="the batch's id at the provider, once it is created"
        ),
        sa.Column("requests", sa.Integer(), nullable=False, comment="number of requests in it"),
        sa.Column("finished", sa.Integer(), nullable=False, comment="number of them that the provider has finished"),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=now, nullable=False),
        sa.Column(
            "collected_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="when its results were stored; null while it is open",
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_batches_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_batches")),
    )
    op.create_index(op.f("ix_batches_job_id"), "batches", ["job_id"])


def downgrade() -> None:
    op.drop_index(op.f("ix_batches_job_id"), "batches")
    op.drop_table("batches")
