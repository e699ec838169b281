"""Add the extension that a prompt was added to a run in, and imported routers.

The prompts of existing runs were there at the start. Going back is refused while there are imported routers, which
earlier versions cannot use.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None

_LEARNED = "of an imported router: the teachers, student and reward that it was fitted to, and its verdict"
_COMMENT = "number of the extension that added it, from 1; 0 if the run was started with it"


def upgrade() -> None:
    column = sa.Column("extension", sa.Integer(), nullable=False, server_default="0", comment=_COMMENT)
    op.add_column("run_prompts", column)
    json = sa.JSON().with_variant(JSONB(), "postgresql")
    op.add_column("routers", sa.Column("learned", json, nullable=True, comment=_LEARNED))


def downgrade() -> None:
    imported = "SELECT count(*) FROM routers WHERE learned IS NOT NULL"
    if count := op.get_bind().exec_driver_sql(imported).scalar_one():
        raise RuntimeError(f"earlier versions know no imported routers, and this store has {count}")
    op.drop_column("routers", "learned")
    op.drop_column("run_prompts", "extension")
