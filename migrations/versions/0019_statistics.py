"""Add statistics of a log-likelihood's tokens, and the other definitions of learnability to the views."""

from __future__ import annotations

from types import ModuleType

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

#: The views that show learnability; their queries are those of revision 0017.
_VIEWS = ("v_reward_matrix", "v_why_teacher")
_DEFINITION = {
    "sqlite": "coalesce(json_extract(r.config, '$.run.learnability'), 'log_likelihood')",
    "postgresql": "coalesce(r.config -> 'run' ->> 'learnability', 'log_likelihood')",
}
_STATISTIC = {
    "sqlite": "json_extract(l.statistics, '$.{part}.{name}')",
    "postgresql": "CAST(l.statistics -> '{part}' ->> '{name}' AS double precision)",
}


def _learnability(samples: ModuleType, dialect: str) -> str:
    """The learnability of one response by the run's definition, as `persyn.method.learnability` defines it.

    Null where no token was scored, and where a score lacks the statistics.
    """

    def one(part: str, name: str) -> str:
        return _STATISTIC[dialect].format(part=part, name=name)

    def of(name: str) -> str:
        return f"({samples._part(one('answer', name), one('reasoning', name))})"

    answer, reasoning = one("answer", "lowest_window"), one("reasoning", "lowest_window")
    has_lower = f"l.reasoning_n_tokens > 0 AND ({answer} IS NULL OR {reasoning} < {answer})"
    lowest = f"CASE {{on}} WHEN 'answer' THEN {answer} WHEN 'reasoning' THEN {reasoning}"
    nats = f"({samples._part('l.value', 'l.reasoning_value')})"
    tokens = f"nullif(({samples._part('l.n_tokens', 'l.reasoning_n_tokens')}), 0)"
    ifd = f"{nats} / nullif({of('alone')}, 0)"
    values = {
        "log_likelihood": samples._LEARNABILITY,
        "lowest_window": f"{lowest} ELSE CASE WHEN {has_lower} THEN {reasoning} ELSE {answer} END END",
        "lowest_share": f"{of('lowest')} / nullif({of('n_lowest')}, 0)",
        "local_log_likelihood": f"{of('local')} / {tokens}",
        "rank_surprisal_ratio": f"{of('rank')} / nullif({nats}, 0)",
        "ifd": f"CASE WHEN {ifd} > 1 THEN 0 ELSE {ifd} END",
        "entropy_aware": f"({nats} + {of('entropy')}) / {tokens}",
    }
    cases = " ".join(f"WHEN '{name}' THEN {value}" for name, value in values.items())
    return f"CASE WHEN {tokens} IS NOT NULL THEN CASE {_DEFINITION[dialect]} {cases} END END"


def upgrade() -> None:
    comment = "other sums over the tokens of a log-likelihood, {answer, reasoning}; null before PerSyn stored them"
    kind = sa.JSON().with_variant(JSONB(), "postgresql")
    op.add_column("scores", sa.Column("statistics", kind, nullable=True, comment=comment))
    samples = _samples()
    samples.drop_views(_VIEWS)
    samples.make_views(_VIEWS, _learnability(samples, op.get_bind().dialect.name))


def downgrade() -> None:
    samples = _samples()
    samples.drop_views(_VIEWS)
    samples.make_views(_VIEWS)
    op.drop_column("scores", "statistics")


def _samples() -> ModuleType:
    """The revision that has the views as they were."""
    return op.get_context().script.get_revision("0017").module
