"""Add outages of servers."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

BigInt = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "outages",
        sa.Column("run_id", BigInt, nullable=False),
        sa.Column("queue", sa.String(), nullable=False),
        sa.Column("since", sa.DateTime(timezone=True), nullable=False, comment="when it was first noticed"),
        sa.Column("retry_at", sa.DateTime(timezone=True), nullable=False, comment="when the server is asked again"),
        sa.Column("error", sa.Text(), nullable=False, comment="what the server said last, or that it said nothing"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_outages_run_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", "queue", name=op.f("pk_outages")),
    )


def downgrade() -> None:
    op.drop_table("outages")
