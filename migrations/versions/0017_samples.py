"""Add the kept sample of an assignment, and count every sample in the views."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

#: Values from a run's frozen configuration, the first word of a failure, and the characters of a text and of the names
#: and arguments of its calls.
_SQLITE = {
    "alpha": "json_extract(r.config, '$.run.alpha')",
    "normalise": "json_extract(r.config, '$.run.normalise')",
    "per": "coalesce(json_extract(r.config, '$.run.learnability_per'), 'token')",
    "on": "coalesce(json_extract(r.config, '$.run.learnability_on'), 'both')",
    "samples": "coalesce(json_extract(r.config, '$.run.samples'), 1)",
    "asked": "coalesce(json_extract(r.config, '$.generation.samples'), 1)",
    "keep": "coalesce(json_extract(r.config, '$.generation.keep'), 'best')",
    "strategy": "coalesce(json_extract(r.config, '$.strategy.kind'), 'persyn')",
    "reason": "substr({0}.failure, 1, instr({0}.failure || ':', ':') - 1)",
    "characters": """(length(x.text) + coalesce((
        SELECT sum(length(json_extract(value, '$.function.name')) + length(json_extract(value, '$.function.arguments')))
        FROM json_each(x.tool_calls)), 0))""",
}
_POSTGRESQL = {
    "alpha": "CAST(r.config -> 'run' ->> 'alpha' AS double precision)",
    "normalise": "r.config -> 'run' ->> 'normalise'",
    "per": "coalesce(r.config -> 'run' ->> 'learnability_per', 'token')",
    "on": "coalesce(r.config -> 'run' ->> 'learnability_on', 'both')",
    "samples": "coalesce(CAST(r.config -> 'run' ->> 'samples' AS integer), 1)",
    "asked": "coalesce(CAST(r.config -> 'generation' ->> 'samples' AS integer), 1)",
    "keep": "coalesce(r.config -> 'generation' ->> 'keep', 'best')",
    "strategy": "coalesce(r.config -> 'strategy' ->> 'kind', 'persyn')",
    "reason": "split_part({0}.failure, ':', 1)",
    "characters": """(length(x.text) + coalesce((
        SELECT sum(length(value -> 'function' ->> 'name') + length(value -> 'function' ->> 'arguments'))
        FROM jsonb_array_elements(x.tool_calls)), 0))""",
}


def _part(answer: str, reasoning: str) -> str:
    """The value of the part of a response that the run names; both parts together, if the second one was scored."""
    scored = f"CASE WHEN l.reasoning_n_tokens > 0 THEN {reasoning} ELSE 0 END"
    return f"CASE {{on}} WHEN 'answer' THEN {answer} WHEN 'reasoning' THEN {reasoning} ELSE {answer} + {scored} END"


#: The log-likelihood of one response in the run's unit; null where no token was scored.
_LEARNABILITY = f"""{_part("l.value", "l.reasoning_value")} / CASE
    WHEN coalesce({_part("l.n_tokens", "l.reasoning_n_tokens")}, 0) = 0 THEN NULL
    WHEN {{per}} = 'token' THEN {_part("l.n_tokens", "l.reasoning_n_tokens")}
    WHEN {{per}} = 'character' THEN nullif({_part("{characters}", "length(x.reasoning)")}, 0)
    ELSE 1
END"""
#: A response that the run uses: of its grid, or of an assigned teacher.
_USED = "((p.role <> 'target' AND x.sample < {samples}) OR (a.prompt_id IS NOT NULL AND x.sample < {asked}))"
#: How many rows of the dataset a prompt has, and which response the row of sample i is.
_ROWS = "CASE WHEN {keep} = 'all' THEN {asked} ELSE 1 END"
_ROW = (
    "x.prompt_id = a.prompt_id AND x.teacher_id = a.teacher_id "
    "AND x.sample = CASE WHEN {keep} = 'all' THEN i.sample ELSE a.sample END"
)
_VIEWS = {
    # The rows of a run's dataset, as an unfiltered export writes them, with the origin of each.
    "v_dataset": """
    WITH RECURSIVE samples(sample) AS (SELECT 0 UNION ALL SELECT sample + 1 FROM samples WHERE sample < 99)
    SELECT r.name AS run, a.prompt_id, rp.role, p.source, p.source_id, p.history, p.text AS prompt, p.answer,
           x.text AS response, x.reasoning, t.name AS teacher, t.model, t.revision, t.template_hash,
           a.reason, a.score, a.margin, x.finish_reason, x.prompt_tokens, x.response_tokens, x.reasoning_tokens,
           x.seed, x.engine, x.origin, x.id AS response_id, x.job_id, x.created_at, x.sample
    FROM runs r
    JOIN assignments a ON a.run_id = r.id
    JOIN run_prompts rp ON rp.run_id = r.id AND rp.prompt_id = a.prompt_id
    JOIN prompts p ON p.id = a.prompt_id
    JOIN teachers t ON t.id = a.teacher_id
    JOIN samples i ON i.sample < {rows}
    JOIN responses x ON {row}
    WHERE x.text IS NOT NULL
    """,
    # The rows of each stage that a run has reached: total = done + failed + pending.
    "v_progress": """
    WITH RECURSIVE samples(sample) AS (SELECT 0 UNION ALL SELECT sample + 1 FROM samples WHERE sample < 99)
    SELECT run, place, stage, total, done, failed, total - done - failed AS pending
    FROM (
        SELECT r.name AS run, 1 AS place, 'calibrate' AS stage,
               count(i.sample) AS total, count(x.text) AS done, count(x.failure) AS failed
        FROM runs r
        LEFT JOIN run_teachers t ON t.run_id = r.id
        LEFT JOIN run_prompts p ON p.run_id = r.id AND p.role <> 'target' AND t.teacher_id IS NOT NULL
        LEFT JOIN samples i ON p.prompt_id IS NOT NULL AND i.sample < {samples}
        LEFT JOIN responses x ON x.prompt_id = p.prompt_id AND x.teacher_id = t.teacher_id AND x.sample = i.sample
        GROUP BY r.name
        UNION ALL
        SELECT r.name, 2, 'score', count(s.id), count(v.value), count(v.failure)
        FROM runs r
        LEFT JOIN run_teachers t ON t.run_id = r.id
        LEFT JOIN run_prompts p ON p.run_id = r.id AND p.role <> 'target'
        LEFT JOIN responses x ON x.prompt_id = p.prompt_id AND x.teacher_id = t.teacher_id AND x.sample < {samples}
            AND x.text IS NOT NULL
        LEFT JOIN scorers s ON s.id IN (r.learnability_scorer_id, r.quality_scorer_id) AND x.id IS NOT NULL
        LEFT JOIN scores v ON v.response_id = x.id AND v.scorer_id = s.id
        WHERE r.stage <> 'calibrate'
        GROUP BY r.name
        UNION ALL
        SELECT r.name, 3, 'fit_router', CASE WHEN {strategy} = 'persyn' THEN 1 ELSE 0 END, count(r.router_id), 0
        FROM runs r
        WHERE r.stage NOT IN ('calibrate', 'score')
        GROUP BY r.name, r.config
        UNION ALL
        SELECT r.name, 4, 'assign', count(p.prompt_id), count(a.prompt_id), 0
        FROM runs r
        LEFT JOIN run_prompts p ON p.run_id = r.id
        LEFT JOIN assignments a ON a.run_id = r.id AND a.prompt_id = p.prompt_id
        WHERE r.stage IN ('assign', 'generate')
        GROUP BY r.name
        UNION ALL
        SELECT r.name, 5, 'generate', count(a.prompt_id), count(x.text) + count(CASE WHEN a.rejected THEN 1 END),
               count(x.failure)
        FROM runs r
        LEFT JOIN assignments a ON a.run_id = r.id
        LEFT JOIN samples i ON a.prompt_id IS NOT NULL AND i.sample < {rows}
        LEFT JOIN responses x ON {row}
        WHERE r.stage = 'generate'
        GROUP BY r.name
    ) AS stages
    """,
    # Per teacher of a run: assignments, responses and costs, and an estimate if it had answered every prompt once.
    "v_teacher_cost": """
    SELECT run, position, teacher, assigned, responses, failed, prompt_tokens, response_tokens, reasoned, unfinished,
           reasoning_tokens,
           CASE WHEN uncounted = 0 THEN (prompt_tokens * price_in + response_tokens * price_out) / 1000000.0 END
               AS dollars,
           prompts * grid_response_tokens AS response_tokens_if_all,
           prompts * (grid_prompt_tokens * price_in + grid_response_tokens * price_out) / 1000000.0
               AS dollars_if_all
    FROM (
        SELECT r.name AS run, t.position, m.name AS teacher, m.price_in, m.price_out,
               (SELECT count(*) FROM run_prompts n WHERE n.run_id = r.id) AS prompts,
               (SELECT count(*) FROM assignments n WHERE n.run_id = r.id AND n.teacher_id = t.teacher_id) AS assigned,
               count(CASE WHEN {used} THEN x.text END) AS responses,
               count(CASE WHEN {used} THEN x.failure END) AS failed,
               count(CASE WHEN {used} AND x.text IS NOT NULL
                               AND (x.prompt_tokens IS NULL OR x.response_tokens IS NULL) THEN 1 END) AS uncounted,
               coalesce(sum(CASE WHEN {used} THEN x.prompt_tokens END), 0) AS prompt_tokens,
               coalesce(sum(CASE WHEN {used} THEN x.response_tokens END), 0) AS response_tokens,
               count(CASE WHEN {used} AND x.text IS NOT NULL THEN x.reasoning END) AS reasoned,
               count(CASE WHEN {used} AND x.failure LIKE 'unfinished_reasoning%' THEN 1 END) AS unfinished,
               coalesce(sum(CASE WHEN {used} THEN x.reasoning_tokens END), 0) AS reasoning_tokens,
               avg(CASE WHEN p.role <> 'target' AND x.sample < {samples}
                        THEN CAST(x.prompt_tokens AS double precision) END) AS grid_prompt_tokens,
               avg(CASE WHEN p.role <> 'target' AND x.sample < {samples}
                        THEN CAST(x.response_tokens AS double precision) END) AS grid_response_tokens
        FROM runs r
        JOIN run_teachers t ON t.run_id = r.id
        JOIN teachers m ON m.id = t.teacher_id
        LEFT JOIN responses x ON x.teacher_id = t.teacher_id
        LEFT JOIN run_prompts p ON p.run_id = r.id AND p.prompt_id = x.prompt_id
        LEFT JOIN assignments a ON a.run_id = r.id AND a.prompt_id = x.prompt_id AND a.teacher_id = x.teacher_id
        GROUP BY r.name, r.id, t.position, t.teacher_id, m.name, m.price_in, m.price_out
    ) AS written
    """,
    # The cells of the calibration grid: means over the samples, and the reward with the run's own alpha and
    # normalisation. The reward is null where a score is missing, and for z-scores, which need a square root.
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
           END AS reward,
           responses
    FROM (
        SELECT run, prompt_id, role, position, teacher, response_id, responses, alpha, normalise, is_incomplete,
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
            SELECT run, prompt_id, role, position, teacher, response_id, responses, alpha, normalise, quality,
                   learnability,
                   quality IS NULL OR learnability IS NULL AS is_incomplete
            FROM (
                SELECT r.name AS run, p.prompt_id, p.role, t.position, m.name AS teacher,
                       min(CASE WHEN x.sample = 0 THEN x.id END) AS response_id, count(x.text) AS responses,
                       {alpha} AS alpha, {normalise} AS normalise, avg(q.value) AS quality,
                       avg({learnability}) AS learnability
                FROM runs r
                JOIN run_prompts p ON p.run_id = r.id AND p.role <> 'target'
                JOIN run_teachers t ON t.run_id = r.id
                JOIN teachers m ON m.id = t.teacher_id
                JOIN responses x ON x.prompt_id = p.prompt_id AND x.teacher_id = t.teacher_id AND x.sample < {samples}
                LEFT JOIN scores q ON q.response_id = x.id AND q.scorer_id = r.quality_scorer_id
                LEFT JOIN scores l ON l.response_id = x.id AND l.scorer_id = r.learnability_scorer_id
                GROUP BY r.id, p.prompt_id, p.role, t.position, m.name
            ) AS scored
        ) AS cells
        WINDOW prompt AS (PARTITION BY run, prompt_id, is_incomplete)
    ) AS compared
    """,
    # Every teacher for every prompt of a run: its router score, its other scores, and whether it was chosen.
    "v_why_teacher": """
    SELECT r.name AS run, p.prompt_id, p.role, t.position, m.name AS teacher,
           o.score AS router_score,
           CASE WHEN o.score IS NOT NULL THEN
               1 + (SELECT count(*) FROM router_scores b
                    WHERE b.router_id = o.router_id AND b.prompt_id = o.prompt_id AND b.score > o.score)
           END AS router_rank,
           (SELECT avg(q.value)
            FROM responses x JOIN scores q ON q.response_id = x.id AND q.scorer_id = r.quality_scorer_id
            WHERE x.prompt_id = p.prompt_id AND x.teacher_id = t.teacher_id AND x.sample < {samples}) AS quality,
           (SELECT avg({learnability})
            FROM responses x JOIN scores l ON l.response_id = x.id AND l.scorer_id = r.learnability_scorer_id
            WHERE x.prompt_id = p.prompt_id AND x.teacher_id = t.teacher_id AND x.sample < {samples}) AS learnability,
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
    """,
    # The missing rows of the stages that a run has reached; as many as v_progress reports as pending.
    "v_missing": """
    WITH RECURSIVE samples(sample) AS (SELECT 0 UNION ALL SELECT sample + 1 FROM samples WHERE sample < 99)
    SELECT r.name AS run, 1 AS place, 'calibrate' AS stage, p.prompt_id, m.name AS teacher, NULL AS scorer,
           i.sample
    FROM runs r
    JOIN run_prompts p ON p.run_id = r.id AND p.role <> 'target'
    JOIN run_teachers t ON t.run_id = r.id
    JOIN teachers m ON m.id = t.teacher_id
    JOIN samples i ON i.sample < {samples}
    LEFT JOIN responses x ON x.prompt_id = p.prompt_id AND x.teacher_id = t.teacher_id AND x.sample = i.sample
    WHERE x.id IS NULL
    UNION ALL
    SELECT r.name, 2, 'score', p.prompt_id, m.name, s.kind, x.sample
    FROM runs r
    JOIN run_prompts p ON p.run_id = r.id AND p.role <> 'target'
    JOIN run_teachers t ON t.run_id = r.id
    JOIN teachers m ON m.id = t.teacher_id
    JOIN responses x ON x.prompt_id = p.prompt_id AND x.teacher_id = t.teacher_id AND x.sample < {samples}
    JOIN scorers s ON s.id IN (r.learnability_scorer_id, r.quality_scorer_id)
    LEFT JOIN scores v ON v.response_id = x.id AND v.scorer_id = s.id
    WHERE r.stage <> 'calibrate' AND x.text IS NOT NULL AND v.response_id IS NULL
    UNION ALL
    SELECT r.name, 3, 'fit_router', NULL, NULL, NULL, NULL
    FROM runs r
    WHERE r.stage NOT IN ('calibrate', 'score') AND {strategy} = 'persyn' AND r.router_id IS NULL
    UNION ALL
    SELECT r.name, 4, 'assign', p.prompt_id, NULL, NULL, NULL
    FROM runs r
    JOIN run_prompts p ON p.run_id = r.id
    LEFT JOIN assignments a ON a.run_id = r.id AND a.prompt_id = p.prompt_id
    WHERE r.stage IN ('assign', 'generate') AND a.prompt_id IS NULL
    UNION ALL
    SELECT r.name, 5, 'generate', a.prompt_id, m.name, NULL, CASE WHEN {keep} = 'all' THEN i.sample ELSE a.sample END
    FROM runs r
    JOIN assignments a ON a.run_id = r.id
    JOIN teachers m ON m.id = a.teacher_id
    JOIN samples i ON i.sample < {rows}
    LEFT JOIN responses x ON {row}
    WHERE r.stage = 'generate' AND x.id IS NULL AND NOT a.rejected
    """,
    # Rows that failed, by stage. reason is the first word of the failure.
    "v_failures": """
    WITH RECURSIVE samples(sample) AS (SELECT 0 UNION ALL SELECT sample + 1 FROM samples WHERE sample < 99)
    SELECT r.name AS run, 1 AS place, 'calibrate' AS stage, p.prompt_id, m.name AS teacher, NULL AS scorer,
           {reason_x} AS reason, x.failure, x.id AS response_id, x.job_id, x.created_at
    FROM runs r
    JOIN run_prompts p ON p.run_id = r.id AND p.role <> 'target'
    JOIN run_teachers t ON t.run_id = r.id
    JOIN teachers m ON m.id = t.teacher_id
    JOIN responses x ON x.prompt_id = p.prompt_id AND x.teacher_id = t.teacher_id AND x.sample < {samples}
    WHERE x.failure IS NOT NULL
    UNION ALL
    SELECT r.name, 2, 'score', p.prompt_id, m.name, s.kind, {reason_v}, v.failure, x.id, v.job_id, v.created_at
    FROM runs r
    JOIN run_prompts p ON p.run_id = r.id AND p.role <> 'target'
    JOIN run_teachers t ON t.run_id = r.id
    JOIN teachers m ON m.id = t.teacher_id
    JOIN responses x ON x.prompt_id = p.prompt_id AND x.teacher_id = t.teacher_id AND x.sample < {samples}
    JOIN scorers s ON s.id IN (r.learnability_scorer_id, r.quality_scorer_id)
    JOIN scores v ON v.response_id = x.id AND v.scorer_id = s.id
    WHERE v.failure IS NOT NULL
    UNION ALL
    SELECT r.name, 5, 'generate', a.prompt_id, m.name, NULL, {reason_x}, x.failure, x.id, x.job_id, x.created_at
    FROM runs r
    JOIN assignments a ON a.run_id = r.id
    JOIN teachers m ON m.id = a.teacher_id
    JOIN samples i ON i.sample < {rows}
    JOIN responses x ON {row}
    WHERE x.failure IS NOT NULL
    """,
    # The uses of a prompt: each run that has it, the teacher that answers it there, and students trained on that
    # dataset.
    "v_uses": """
    SELECT p.prompt_id, r.name AS run, p.role, m.name AS teacher, a.reason, x.id AS response_id,
           CASE WHEN x.text IS NULL THEN 0 ELSE 1 END AS is_answered,
           g.id AS training_id, g.path AS training_path, g.created_at AS trained_at
    FROM run_prompts p
    JOIN runs r ON r.id = p.run_id
    LEFT JOIN assignments a ON a.run_id = r.id AND a.prompt_id = p.prompt_id
    LEFT JOIN teachers m ON m.id = a.teacher_id
    LEFT JOIN responses x ON x.prompt_id = a.prompt_id AND x.teacher_id = a.teacher_id AND x.sample = a.sample
    LEFT JOIN trainings g ON g.run_id = r.id AND x.text IS NOT NULL
    """,
}


def _sample() -> sa.Column[int]:
    comment = "the sample kept for the dataset; null until chosen, and if rejected"
    return sa.Column("sample", sa.Integer(), nullable=True, server_default="0", comment=comment)


def _rejected() -> sa.Column[bool]:
    comment = "whether no sample is correct: the prompt has no row"
    return sa.Column("rejected", sa.Boolean(), nullable=False, server_default=sa.false(), comment=comment)


_COLUMNS = (_sample, _rejected)


def upgrade() -> None:
    drop_views()
    for column in _COLUMNS:
        op.add_column("assignments", column())
    make_views()


def make_views(
    names: Collection[str] = _VIEWS.keys(), learnability: str = _LEARNABILITY, queries: Mapping[str, str] = _VIEWS
) -> None:
    """Create these views; `learnability` is that of a response x with the score l."""
    words = _SQLITE if op.get_bind().dialect.name == "sqlite" else _POSTGRESQL
    told = {name: words[name] for name in ("alpha", "normalise", "samples", "asked", "keep", "strategy")}
    told["learnability"] = learnability.format(**words)
    told |= {"used": _USED.format(**words), "rows": _ROWS.format(**words), "row": _ROW.format(**words)}
    told |= {f"reason_{table}": words["reason"].format(table) for table in ("x", "v")}
    for name in names:
        op.execute(sa.text(f"CREATE VIEW {name} AS {queries[name].format(**told)}".replace(":", r"\:")))


def downgrade() -> None:
    drop_views()
    for column in reversed(_COLUMNS):
        op.drop_column("assignments", column().name)
    script = op.get_context().script
    script.get_revision("0006").module.make_views(_VIEWS)
    script.get_revision("0012").module.upgrade()  # replaces those with reasoning


def drop_views(names: Collection[str] = _VIEWS.keys()) -> None:
    """Drop these views."""
    for name in names:
        op.execute(f"DROP VIEW {name}")
