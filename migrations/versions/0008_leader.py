"""Add the lease of the leading dispatcher."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "leader",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False, comment="always 1"),
        sa.Column("owner", sa.String(), nullable=False, comment="the dispatcher process that leads or led last"),
        sa.Column(
            "fence",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            nullable=False,
            comment="raised with each new leader",
        ),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_leader")),
        sa.CheckConstraint("id = 1", name=op.f("ck_leader_one")),
    )


def downgrade() -> None:
    op.drop_table("leader")
