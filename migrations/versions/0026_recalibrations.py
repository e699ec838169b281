"""Add recalibrations: which prompts became calibration prompts after the start of a run, and the teachers before.

Going back is refused while there is a recalibrated run: earlier versions would take the verdict on its first router for
that on its last.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_NUMBER = "number of the recalibration that made it a calibration prompt, from 1; 0 if none did"
_BEFORE = "the teacher that it had until the last recalibration, where that had not answered it"


def upgrade() -> None:
    for column in (
        sa.Column("recalibration", sa.Integer(), nullable=False, server_default="0", comment=_NUMBER),
        sa.Column("former_teacher_id", _BIG, nullable=True, comment=_BEFORE),
    ):
        op.add_column("run_prompts", column)


def downgrade() -> None:
    asked = "SELECT count(DISTINCT run_id) FROM run_prompts WHERE recalibration > 0"
    if count := op.get_bind().exec_driver_sql(asked).scalar_one():
        raise RuntimeError(f"earlier versions know no recalibrated runs, and this store has {count}")
    for name in ("former_teacher_id", "recalibration"):
        op.drop_column("run_prompts", name)
