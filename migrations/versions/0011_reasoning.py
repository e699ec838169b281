"""Add reasoning, tool calls, response schemas and adapters."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

Json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")

_COLUMNS = (
    (
        "prompts",
        "last_turn",
        Json,
        "the last turn without its text, where it is not the user's: {role: tool, tool_call_id, ...}",
    ),
    ("prompts", "tools", Json, "the functions that may be called: [{type, function}, ...]"),
    ("prompts", "response_schema", Json, "JSON schema of the response"),
    ("teachers", "response_schema", Json, "JSON schema of its responses"),
    ("teachers", "adapter", sa.String(), "LoRA adapter: a folder or hub id"),
    ("teachers", "adapter_revision", sa.String(), "hub commit, or sha256:... of a local folder"),
    ("responses", "reasoning", sa.Text(), "what the teacher wrote before the answer"),
    ("responses", "tool_calls", Json, "[{id, type, function: {name, arguments}}, ...]"),
    ("responses", "reasoning_tokens", sa.Integer(), "those of the reasoning"),
    ("scores", "reasoning_value", sa.Double(), "sum of log-probabilities of the reasoning; value is the answer's"),
    ("scores", "reasoning_n_tokens", sa.Integer(), "number of tokens in the reasoning's sum"),
)
#: (table, column, type, nullable, comment before, comment now)
_COMMENTS = (
    ("prompts", "text", sa.Text(), False, "the last user turn", "the last turn, the user's or a tool's"),
    ("responses", "text", sa.Text(), True, None, "the answer, without the reasoning"),
    ("responses", "response_tokens", sa.Integer(), True, None, "all generated tokens, the reasoning included"),
)


def upgrade() -> None:
    for table, name, kind, comment in _COLUMNS:
        op.add_column(table, sa.Column(name, kind, nullable=True, comment=comment))
    _comment(now=True)


def downgrade() -> None:
    _comment(now=False)
    for table, name, _, _ in reversed(_COLUMNS):
        op.drop_column(table, name)


def _comment(*, now: bool) -> None:
    if op.get_bind().dialect.name == "sqlite":  # SQLite stores no comments
        return
    for table, name, kind, nullable, before, after in _COMMENTS:
        new, old = (after, before) if now else (before, after)
        op.alter_column(table, name, existing_type=kind, existing_nullable=nullable, existing_comment=old, comment=new)
