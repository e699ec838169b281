"""Count the characters of calls in the views as their reader does: the same on both databases."""

from __future__ import annotations

from alembic import op

revision = "0022"
down_revision = "0017"
branch_labels = None
depends_on = None

#: Those in which a log-likelihood may be divided by characters.
_VIEWS = ("v_reward_matrix", "v_why_teacher")
#: Characters of a text, and of the names and arguments of its calls.
_SQLITE = """(length(x.text) + coalesce((
    SELECT sum(length(json_extract(value, '$.function.name')) + length(json_extract(value, '$.function.arguments')))
    FROM json_each(x.tool_calls)), 0))"""
_POSTGRESQL = """(length(x.text) + coalesce((
    SELECT sum(length(value -> 'function' ->> 'name') + length(value -> 'function' ->> 'arguments'))
    FROM jsonb_array_elements(x.tool_calls)), 0))"""


def upgrade() -> None:
    before = op.get_context().script.get_revision("0017").module
    before.drop_views(_VIEWS)
    before.make_views(_VIEWS, _SQLITE if op.get_bind().dialect.name == "sqlite" else _POSTGRESQL)


def downgrade() -> None:
    before = op.get_context().script.get_revision("0017").module
    before.drop_views(_VIEWS)
    before.make_views(_VIEWS)
