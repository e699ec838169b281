"""Let a run at alpha 0 have no student and no learnability; its rewards in `v_reward_matrix` are by quality alone.

Going back is refused while there is such a run, or one with several scorers, whose configuration earlier versions
cannot read.
"""

from __future__ import annotations

import re

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

#: The columns that become nullable, with their comments.
_COLUMNS = {
    "student_id": "null for a run without a student, at alpha 0",
    "learnability_scorer_id": "null if the run scores no learnability, at alpha 0",
}
_VIEW = "v_reward_matrix"
#: When a cell has no reward, in that view's query of revision 0017.
_INCOMPLETE = "quality IS NULL OR learnability IS NULL AS is_incomplete"
_INCOMPLETE_NOW = "quality IS NULL OR (learnability IS NULL AND alpha > 0) AS is_incomplete"


def upgrade() -> None:
    _make_nullable(True)
    _replace_view(_INCOMPLETE_NOW)


def downgrade() -> None:
    runs = sa.table("runs", *map(sa.column, ("name", "quality_scorer_id", *_COLUMNS)))
    scorers = sa.table("scorers", sa.column("id"), sa.column("kind"))
    combined = runs.c.quality_scorer_id.in_(sa.select(scorers.c.id).where(scorers.c.kind == "combined"))
    is_new = sa.or_(combined, *(runs.c[name].is_(None) for name in _COLUMNS))
    if names := op.get_bind().scalars(sa.select(runs.c.name).where(is_new).order_by(runs.c.name)).all():
        raise RuntimeError(
            "earlier versions know no runs without a student or learnability, or with several scorers of quality: "
            + ", ".join(names)
        )
    _make_nullable(False)
    _replace_view(_INCOMPLETE)


def _make_nullable(nullable: bool) -> None:
    if op.get_bind().dialect.name == "sqlite":
        _edit_sqlite(nullable)
        return
    for name, comment in _COLUMNS.items():
        old, new = (None, comment) if nullable else (comment, None)
        op.alter_column(
            "runs", name, existing_type=sa.BigInteger(), nullable=nullable, existing_comment=old, comment=new
        )


def _edit_sqlite(nullable: bool) -> None:
    """Edit the constraints in the schema, as https://www.sqlite.org/lang_altertable.html describes.

    A copy of the table would replace it, and dropping it deletes the rows that refer to it, where foreign keys are on.
    """
    connection = op.get_bind()
    query: str = connection.exec_driver_sql(
        "SELECT sql FROM sqlite_master WHERE type = 'table' AND name = 'runs'"
    ).scalar_one()
    before, after = (" NOT NULL", "") if nullable else ("", " NOT NULL")
    for name in _COLUMNS:
        query, count = re.subn(rf"\b{name} INTEGER{before}(?=\s*,)", f"{name} INTEGER{after}", query)
        if count != 1:
            raise RuntimeError(f"the table runs has no column '{name} INTEGER{before}'")
    version: int = connection.exec_driver_sql("PRAGMA schema_version").scalar_one()
    connection.exec_driver_sql("PRAGMA writable_schema=ON")
    connection.exec_driver_sql("UPDATE sqlite_master SET sql = ? WHERE type = 'table' AND name = 'runs'", (query,))
    connection.exec_driver_sql(f"PRAGMA schema_version={version + 1}")
    connection.exec_driver_sql("PRAGMA writable_schema=RESET")


def _replace_view(incomplete: str) -> None:
    revisions = op.get_context().script
    samples, statistics = (revisions.get_revision(each).module for each in ("0017", "0019"))
    learnability = statistics._learnability(samples, op.get_bind().dialect.name)
    samples.drop_views((_VIEW,))
    samples.make_views((_VIEW,), learnability, {_VIEW: samples._VIEWS[_VIEW].replace(_INCOMPLETE, incomplete)})
