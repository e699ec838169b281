"""Store the other fields of imported responses."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

Json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    op.add_column(
        "responses", sa.Column("meta", Json, nullable=True, comment="of an imported one: every other field of its row")
    )


def downgrade() -> None:
    op.drop_column("responses", "meta")
