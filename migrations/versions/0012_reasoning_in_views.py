"""Show reasoning in views, and compute the learnability in them on the part of a response that the run names."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

_SQLITE = {
    "alpha": "json_extract(r.config, '$.run.alpha')",
    "normalise": "json_extract(r.config, '$.run.normalise')",
    "per": "coalesce(json_extract(r.config, '$.run.learnability_per'), 'token')",
    "on": "coalesce(json_extract(r.config, '$.run.learnability_on'), 'both')",
}
_POSTGRESQL = {
    "alpha": "CAST(r.config -> 'run' ->> 'alpha' AS double precision)",
    "normalise": "r.config -> 'run' ->> 'normalise'",
    "per": "coalesce(r.config -> 'run' ->> 'learnability_per', 'token')",
    "on": "coalesce(r.config -> 'run' ->> 'learnability_on', 'both')",
}
#: The log-likelihood in the run's unit; null where no token was scored.
_LEARNABILITY_BEFORE = """l.value / CASE
    WHEN coalesce(l.n_tokens, 0) = 0 THEN NULL
    WHEN {per} = 'token' THEN l.n_tokens
    WHEN {per} = 'character' THEN length(x.text)
    ELSE 1
END"""


def _part(answer: str, reasoning: str) -> str:
    """The value of the part of a response that the run names; both parts together, if the second one was scored."""
    scored = f"CASE WHEN l.reasoning_n_tokens > 0 THEN {reasoning} ELSE 0 END"
    return f"CASE {{on}} WHEN 'answer' THEN {answer} WHEN 'reasoning' THEN {reasoning} ELSE {answer} + {scored} END"


_LEARNABILITY = f"""{_part("l.value", "l.reasoning_value")} / CASE
    WHEN coalesce({_part("l.n_tokens", "l.reasoning_n_tokens")}, 0) = 0 THEN NULL
    WHEN {{per}} = 'token' THEN {_part("l.n_tokens", "l.reasoning_n_tokens")}
    WHEN {{per}} = 'character' THEN nullif({_part("length(x.text)", "length(x.reasoning)")}, 0)
    ELSE 1
END"""

#: What this revision adds, by placeholder.
_ADDED = {
    "reasoning": "x.reasoning, ",
    "reasoning_tokens": "x.reasoning_tokens, ",
    "shown": "reasoned, unfinished, reasoning_tokens, ",
    "counted": """count(CASE WHEN {used} AND x.text IS NOT NULL THEN x.reasoning END) AS reasoned,
                   count(CASE WHEN {used} AND x.failure LIKE 'unfinished_reasoning%' THEN 1 END) AS unfinished,
                   coalesce(sum(CASE WHEN {used} THEN x.reasoning_tokens END), 0) AS reasoning_tokens,
                   """,
}
#: The responses of the grid, and those to assignments.
_USED = "(p.role <> 'target' OR a.prompt_id IS NOT NULL)"
_VIEWS = {
    "v_dataset": """
        SELECT r.name AS run, a.prompt_id, rp.role, p.source, p.source_id, p.history, p.text AS prompt, p.answer,
               x.text AS response, {reasoning}t.name AS teacher, t.model, t.revision, t.template_hash,
               a.reason, a.score, a.margin, x.finish_reason, x.prompt_tokens, x.response_tokens, {reasoning_tokens}
               x.seed, x.engine, x.origin, x.id AS response_id, x.job_id, x.created_at
        FROM runs r
        JOIN assignments a ON a.run_id = r.id
        JOIN run_prompts rp ON rp.run_id = r.id AND rp.prompt_id = a.prompt_id
        JOIN prompts p ON p.id = a.prompt_id
        JOIN teachers t ON t.id = a.teacher_id
        JOIN responses x ON x.prompt_id = a.prompt_id AND x.teacher_id = a.teacher_id AND x.sample = 0
        WHERE x.text IS NOT NULL
    """,
    "v_teacher_cost": """
        SELECT run, position, teacher, assigned, responses, failed, prompt_tokens, response_tokens, {shown}
               CASE WHEN uncounted = 0 THEN (prompt_tokens * price_in + response_tokens * price_out) / 1000000.0 END
                   AS dollars,
               prompts * grid_response_tokens AS response_tokens_if_all,
               prompts * (grid_prompt_tokens * price_in + grid_response_tokens * price_out) / 1000000.0
                   AS dollars_if_all
        FROM (
            SELECT r.name AS run, t.position, m.name AS teacher, m.price_in, m.price_out,
                   (SELECT count(*) FROM run_prompts n WHERE n.run_id = r.id) AS prompts,
                   (SELECT count(*) FROM assignments n WHERE n.run_id = r.id AND n.teacher_id = t.teacher_id)
                       AS assigned,
                   count(CASE WHEN {used} THEN x.text END) AS responses,
                   count(CASE WHEN {used} THEN x.failure END) AS failed,
                   count(CASE WHEN {used} AND x.text IS NOT NULL
                                   AND (x.prompt_tokens IS NULL OR x.response_tokens IS NULL) THEN 1 END) AS uncounted,
                   coalesce(sum(CASE WHEN {used} THEN x.prompt_tokens END), 0) AS prompt_tokens,
                   coalesce(sum(CASE WHEN {used} THEN x.response_tokens END), 0) AS response_tokens,
                   {counted}avg(CASE WHEN p.role <> 'target' THEN CAST(x.prompt_tokens AS double precision) END)
                       AS grid_prompt_tokens,
                   avg(CASE WHEN p.role <> 'target' THEN CAST(x.response_tokens AS double precision) END)
                       AS grid_response_tokens
            FROM runs r
            JOIN run_teachers t ON t.run_id = r.id
            JOIN teachers m ON m.id = t.teacher_id
            LEFT JOIN responses x ON x.teacher_id = t.teacher_id AND x.sample = 0
            LEFT JOIN run_prompts p ON p.run_id = r.id AND p.prompt_id = x.prompt_id
            LEFT JOIN assignments a ON a.run_id = r.id AND a.prompt_id = x.prompt_id AND a.teacher_id = x.teacher_id
            GROUP BY r.name, r.id, t.position, t.teacher_id, m.name, m.price_in, m.price_out
        ) AS written
    """,
    "v_reward_matrix": """
        SELECT run, prompt_id, role, position, teacher, response_id, quality, learnability,
               CASE
                   WHEN is_incomplete OR cells < 2 THEN NULL
                   WHEN normalise = 'minmax' THEN
                       (1.0 - alpha) * CASE WHEN quality_high > quality_low
                           THEN (quality - quality_low) / (quality_high - quality_low) ELSE 0.0 END
                       + alpha * CASE WHEN learnability_high > learnability_low
                           THEN (learnability - learnability_low) / (learnability_high - learnability_low)
                           ELSE 0.0 END
                   WHEN normalise = 'rank' THEN
                       (1.0 - alpha) * CASE WHEN quality_high > quality_low
                           THEN (cells - 1 + quality_rank - quality_rank_down) / 2.0 / (cells - 1) ELSE 0.0 END
                       + alpha * CASE WHEN learnability_high > learnability_low
                           THEN (cells - 1 + learnability_rank - learnability_rank_down) / 2.0 / (cells - 1) ELSE 0.0 END
               END AS reward
        FROM (
            SELECT run, prompt_id, role, position, teacher, response_id, alpha, normalise, is_incomplete,
                   quality, learnability,
                   count(*) OVER prompt AS cells,
                   min(quality) OVER prompt AS quality_low,
                   max(quality) OVER prompt AS quality_high,
                   min(learnability) OVER prompt AS learnability_low,
                   max(learnability) OVER prompt AS learnability_high,
                   rank() OVER (prompt ORDER BY quality) AS quality_rank,
                   rank() OVER (prompt ORDER BY quality DESC) AS quality_rank_down,
                   rank() OVER (prompt ORDER BY learnability) AS learnability_rank,
                   rank() OVER (prompt ORDER BY learnability DESC) AS learnability_rank_down
            FROM (
                SELECT run, prompt_id, role, position, teacher, response_id, alpha, normalise, quality, learnability,
                       quality IS NULL OR learnability IS NULL AS is_incomplete
                FROM (
                    SELECT r.name AS run, p.prompt_id, p.role, t.position, m.name AS teacher, x.id AS response_id,
                           {alpha} AS alpha, {normalise} AS normalise, q.value AS quality,
                           {learnability} AS learnability
                    FROM runs r
                    JOIN run_prompts p ON p.run_id = r.id AND p.role <> 'target'
                    JOIN run_teachers t ON t.run_id = r.id
                    JOIN teachers m ON m.id = t.teacher_id
                    JOIN responses x ON x.prompt_id = p.prompt_id AND x.teacher_id = t.teacher_id AND x.sample = 0
                    LEFT JOIN scores q ON q.response_id = x.id AND q.scorer_id = r.quality_scorer_id
                    LEFT JOIN scores l ON l.response_id = x.id AND l.scorer_id = r.learnability_scorer_id
                ) AS scored
            ) AS cells
            WINDOW prompt AS (PARTITION BY run, prompt_id, is_incomplete)
        ) AS compared
    """,
    "v_why_teacher": """
        SELECT r.name AS run, p.prompt_id, p.role, t.position, m.name AS teacher,
               o.score AS router_score,
               CASE WHEN o.score IS NOT NULL THEN
                   1 + (SELECT count(*) FROM router_scores b
                        WHERE b.router_id = o.router_id AND b.prompt_id = o.prompt_id AND b.score > o.score)
               END AS router_rank,
               q.value AS quality, {learnability} AS learnability,
               CASE WHEN a.teacher_id = t.teacher_id THEN 1 ELSE 0 END AS is_chosen,
               CASE WHEN a.teacher_id = t.teacher_id THEN a.reason END AS reason,
               CASE WHEN a.teacher_id = t.teacher_id THEN a.margin END AS margin
        FROM runs r
        JOIN run_prompts p ON p.run_id = r.id
        JOIN run_teachers t ON t.run_id = r.id
        JOIN teachers m ON m.id = t.teacher_id
        LEFT JOIN assignments a ON a.run_id = r.id AND a.prompt_id = p.prompt_id
        LEFT JOIN router_scores o ON o.router_id = r.router_id AND o.prompt_id = p.prompt_id
            AND o.teacher_id = t.teacher_id
        LEFT JOIN responses x ON x.prompt_id = p.prompt_id AND x.teacher_id = t.teacher_id AND x.sample = 0
        LEFT JOIN scores q ON q.response_id = x.id AND q.scorer_id = r.quality_scorer_id
        LEFT JOIN scores l ON l.response_id = x.id AND l.scorer_id = r.learnability_scorer_id
    """,
}


def upgrade() -> None:
    _replace_views(learnability=_LEARNABILITY, added=_ADDED)


def downgrade() -> None:
    _replace_views(learnability=_LEARNABILITY_BEFORE, added=dict.fromkeys(_ADDED, ""))


def _replace_views(*, learnability: str, added: dict[str, str]) -> None:
    words = _SQLITE if op.get_bind().dialect.name == "sqlite" else _POSTGRESQL
    parts = {name: part.format(used=_USED) for name, part in added.items()}
    parts |= {"used": _USED, "learnability": learnability.format(**words)}
    for name, query in _VIEWS.items():
        op.execute(f"DROP VIEW {name}")
        op.execute(sa.text(f"CREATE VIEW {name} AS {query.format(**words, **parts)}".replace(":", r"\:")))
