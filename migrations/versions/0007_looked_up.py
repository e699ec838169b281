"""Add indexes for the console: assignments by margin, and failed responses and scores."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

FAILED = sa.text("failure IS NOT NULL")


def upgrade() -> None:
    op.create_index("ix_assignments_run_id_margin_prompt_id", "assignments", ["run_id", "margin", "prompt_id"])
    for name, table, columns in (
        ("ix_responses_failed", "responses", ["teacher_id", "prompt_id"]),
        ("ix_scores_failed", "scores", ["response_id"]),
    ):
        op.create_index(name, table, columns, sqlite_where=FAILED, postgresql_where=FAILED)


def downgrade() -> None:
    op.drop_index("ix_scores_failed", table_name="scores")
    op.drop_index("ix_responses_failed", table_name="responses")
    op.drop_index("ix_assignments_run_id_margin_prompt_id", table_name="assignments")
