"""Add jobs of light models, and limits of requests and tokens per minute."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    comment = "whether the model needs neither GPUs nor the CPU for itself: it is behind a server, or a checker"
    op.add_column(
        "jobs", sa.Column("is_light", sa.Boolean(), server_default=sa.false(), nullable=False, comment=comment)
    )
    op.create_table(
        "rate_limits",
        sa.Column("account", sa.String(), nullable=False, comment="hash of URLs, key variable and model"),
        sa.Column(
            "requests_until",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="time up to which the limit of requests is used up",
        ),
        sa.Column(
            "tokens_until",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="time up to which the limit of tokens is used up",
        ),
        sa.PrimaryKeyConstraint("account", name=op.f("pk_rate_limits")),
    )


def downgrade() -> None:
    op.drop_table("rate_limits")
    op.drop_column("jobs", "is_light")
