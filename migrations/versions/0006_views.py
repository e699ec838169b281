"""Add views for SQL queries, and the GPUs of each model load.

The views are the same on both databases except for the expressions in _SQLITE and _POSTGRESQL. A later revision that
changes a table used by a view must drop the views before and create them again afterwards, as PostgreSQL requires.
"""

from __future__ import annotations

from collections.abc import Collection

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

#: Values from a run's frozen configuration, and the first word of a failure.
_SQLITE = {
    "alpha": "json_extract(r.config, '$.run.alpha')",
    "normalise": "json_extract(r.config, '$.run.normalise')",
    "per": "coalesce(json_extract(r.config, '$.run.learnability_per'), 'token')",
    "strategy": "coalesce(json_extract(r.config, '$.strategy.kind'), 'persyn')",
    "reason": "substr({0}.failure, 1, instr({0}.failure || ':', ':') - 1)",
    "seconds": "round((julianday({1}) - julianday({0})) * 86400.0, 3)",
}
_POSTGRESQL = {
    "alpha": "CAST(r.config -> 'run' ->> 'alpha' AS double precision)",
    "normalise": "r.config -> 'run' ->> 'normalise'",
    "per": "coalesce(r.config -> 'run' ->> 'learnability_per', 'token')",
    "strategy": "coalesce(r.config -> 'strategy' ->> 'kind', 'persyn')",
    "reason": "split_part({0}.failure, ':', 1)",
    "seconds": "CAST(extract(epoch FROM {1} - {0}) AS double precision)",
}

#: The log-likelihood in the run's unit; null where no token was scored.
_LEARNABILITY = """l.value / CASE
    WHEN coalesce(l.n_tokens, 0) = 0 THEN NULL
    WHEN {per} = 'token' THEN l.n_tokens
    WHEN {per} = 'character' THEN length(x.text)
    ELSE 1
END"""
_VIEWS = {
    # The rows of a run's dataset, as an unfiltered export writes them, with the origin of each.
    "v_dataset": """
        SELECT r.name AS run, a.prompt_id, rp.role, p.source, p.source_id, p.history, p.text AS prompt, p.answer,
               x.text AS response, t.name AS teacher, t.model, t.revision, t.template_hash,
               a.reason, a.score, a.margin, x.finish_reason, x.prompt_tokens, x.response_tokens,
               x.seed, x.engine, x.origin, x.id AS response_id, x.job_id, x.created_at
        FROM runs r
        JOIN assignments a ON a.run_id = r.id
        JOIN run_prompts rp ON rp.run_id = r.id AND rp.prompt_id = a.prompt_id
        JOIN prompts p ON p.id = a.prompt_id
        JOIN teachers t ON t.id = a.teacher_id
        JOIN responses x ON x.prompt_id = a.prompt_id AND x.teacher_id = a.teacher_id AND x.sample = 0
        WHERE x.text IS NOT NULL
    """,
    # The rows of each stage that a run has reached: total = done + failed + pending.
    "v_progress": """
        SELECT run, place, stage, total, done, failed, total - done - failed AS pending
        FROM (
            SELECT r.name AS run, 1 AS place, 'calibrate' AS stage,
                   count(p.prompt_id) AS total, count(x.text) AS done, count(x.failure) AS failed
            FROM runs r
            LEFT JOIN run_teachers t ON t.run_id = r.id
            LEFT JOIN run_prompts p ON p.run_id = r.id AND p.role <> 'target' AND t.teacher_id IS NOT NULL
            LEFT JOIN responses x ON x.prompt_id = p.prompt_id AND x.teacher_id = t.teacher_id AND x.sample = 0
            GROUP BY r.name
            UNION ALL
            SELECT r.name, 2, 'score', count(s.id), count(v.value), count(v.failure)
            FROM runs r
            LEFT JOIN run_teachers t ON t.run_id = r.id
            LEFT JOIN run_prompts p ON p.run_id = r.id AND p.role <> 'target'
            LEFT JOIN responses x ON x.prompt_id = p.prompt_id AND x.teacher_id = t.teacher_id AND x.sample = 0
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
            SELECT r.name, 5, 'generate', count(a.prompt_id), count(x.text), count(x.failure)
            FROM runs r
            LEFT JOIN assignments a ON a.run_id = r.id
            LEFT JOIN responses x ON x.prompt_id = a.prompt_id AND x.teacher_id = a.teacher_id AND x.sample = 0
            WHERE r.stage = 'generate'
            GROUP BY r.name
        ) AS stages
    """,
    # Per teacher of a run: assignments, responses and costs, and an estimate if it had answered every prompt.
    "v_teacher_cost": """
        SELECT run, position, teacher, assigned, responses, failed, prompt_tokens, response_tokens,
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
                   count(CASE WHEN p.role <> 'target' OR a.prompt_id IS NOT NULL THEN x.text END) AS responses,
                   count(CASE WHEN p.role <> 'target' OR a.prompt_id IS NOT NULL THEN x.failure END) AS failed,
                   count(CASE WHEN (p.role <> 'target' OR a.prompt_id IS NOT NULL) AND x.text IS NOT NULL
                                   AND (x.prompt_tokens IS NULL OR x.response_tokens IS NULL) THEN 1 END) AS uncounted,
                   coalesce(sum(CASE WHEN p.role <> 'target' OR a.prompt_id IS NOT NULL THEN x.prompt_tokens END), 0)
                       AS prompt_tokens,
                   coalesce(sum(CASE WHEN p.role <> 'target' OR a.prompt_id IS NOT NULL THEN x.response_tokens END), 0)
                       AS response_tokens,
                   avg(CASE WHEN p.role <> 'target' THEN CAST(x.prompt_tokens AS double precision) END)
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
    # The cells of the calibration grid: raw quality, learnability, and the reward with the run's own alpha and
    # normalisation. The reward is null where a score is missing, and for z-scores, which need a square root. Ties share
    # their mean rank.
    "v_reward_matrix": """
        SELECT run, prompt_id, role, position, teacher, response_id, quality, learnability,
               CASE
                   WHEN is_incomplete THEN NULL
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
    # Every teacher for every prompt of a run: its router score, its other scores, and whether it was chosen.
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
    # The missing rows of the stages that a run has reached; as many as v_progress reports as pending.
    "v_missing": """
        SELECT r.name AS run, 1 AS place, 'calibrate' AS stage, p.prompt_id, m.name AS teacher, NULL AS scorer
        FROM runs r
        JOIN run_prompts p ON p.run_id = r.id AND p.role <> 'target'
        JOIN run_teachers t ON t.run_id = r.id
        JOIN teachers m ON m.id = t.teacher_id
        LEFT JOIN responses x ON x.prompt_id = p.prompt_id AND x.teacher_id = t.teacher_id AND x.sample = 0
        WHERE x.id IS NULL
        UNION ALL
        SELECT r.name, 2, 'score', p.prompt_id, m.name, s.kind
        FROM runs r
        JOIN run_prompts p ON p.run_id = r.id AND p.role <> 'target'
        JOIN run_teachers t ON t.run_id = r.id
        JOIN teachers m ON m.id = t.teacher_id
        JOIN responses x ON x.prompt_id = p.prompt_id AND x.teacher_id = t.teacher_id AND x.sample = 0
        JOIN scorers s ON s.id IN (r.learnability_scorer_id, r.quality_scorer_id)
        LEFT JOIN scores v ON v.response_id = x.id AND v.scorer_id = s.id
        WHERE r.stage <> 'calibrate' AND x.text IS NOT NULL AND v.response_id IS NULL
        UNION ALL
        SELECT r.name, 3, 'fit_router', NULL, NULL, NULL
        FROM runs r
        WHERE r.stage NOT IN ('calibrate', 'score') AND {strategy} = 'persyn' AND r.router_id IS NULL
        UNION ALL
        SELECT r.name, 4, 'assign', p.prompt_id, NULL, NULL
        FROM runs r
        JOIN run_prompts p ON p.run_id = r.id
        LEFT JOIN assignments a ON a.run_id = r.id AND a.prompt_id = p.prompt_id
        WHERE r.stage IN ('assign', 'generate') AND a.prompt_id IS NULL
        UNION ALL
        SELECT r.name, 5, 'generate', a.prompt_id, m.name, NULL
        FROM runs r
        JOIN assignments a ON a.run_id = r.id
        JOIN teachers m ON m.id = a.teacher_id
        LEFT JOIN responses x ON x.prompt_id = a.prompt_id AND x.teacher_id = a.teacher_id AND x.sample = 0
        WHERE r.stage = 'generate' AND x.id IS NULL
    """,
    # Rows that failed, by stage. reason is the first word of the failure.
    "v_failures": """
        SELECT r.name AS run, 1 AS place, 'calibrate' AS stage, p.prompt_id, m.name AS teacher, NULL AS scorer,
               {reason_x} AS reason, x.failure, x.id AS response_id, x.job_id, x.created_at
        FROM runs r
        JOIN run_prompts p ON p.run_id = r.id AND p.role <> 'target'
        JOIN run_teachers t ON t.run_id = r.id
        JOIN teachers m ON m.id = t.teacher_id
        JOIN responses x ON x.prompt_id = p.prompt_id AND x.teacher_id = t.teacher_id AND x.sample = 0
        WHERE x.failure IS NOT NULL
        UNION ALL
        SELECT r.name, 2, 'score', p.prompt_id, m.name, s.kind, {reason_v}, v.failure, x.id, v.job_id, v.created_at
        FROM runs r
        JOIN run_prompts p ON p.run_id = r.id AND p.role <> 'target'
        JOIN run_teachers t ON t.run_id = r.id
        JOIN teachers m ON m.id = t.teacher_id
        JOIN responses x ON x.prompt_id = p.prompt_id AND x.teacher_id = t.teacher_id AND x.sample = 0
        JOIN scorers s ON s.id IN (r.learnability_scorer_id, r.quality_scorer_id)
        JOIN scores v ON v.response_id = x.id AND v.scorer_id = s.id
        WHERE v.failure IS NOT NULL
        UNION ALL
        SELECT r.name, 5, 'generate', a.prompt_id, m.name, NULL, {reason_x}, x.failure, x.id, x.job_id, x.created_at
        FROM runs r
        JOIN assignments a ON a.run_id = r.id
        JOIN teachers m ON m.id = a.teacher_id
        JOIN responses x ON x.prompt_id = a.prompt_id AND x.teacher_id = a.teacher_id AND x.sample = 0
        WHERE x.failure IS NOT NULL
    """,
    # The jobs of each run, by name.
    "v_jobs": """
        SELECT r.name AS run, j.id AS job_id, j.stage, m.name AS teacher, s.kind AS scorer, j.queue, j.state,
               j.first_prompt_id, j.last_prompt_id, j.n_prompts, j.attempts, j.fence, j.owner AS worker, j.error,
               j.created_at, j.started_at, j.finished_at, {job_seconds} AS seconds
        FROM jobs j
        JOIN runs r ON r.id = j.run_id
        LEFT JOIN teachers m ON m.id = j.teacher_id
        LEFT JOIN scorers s ON s.id = j.scorer_id
    """,
    # All events of runs and jobs.
    "v_events": """
        SELECT r.name AS run, e.id AS event_id, e.at, e.actor, e.job_id, j.stage, m.name AS teacher, s.kind AS scorer,
               e.from_state, e.to_state, e.fence, e.detail
        FROM events e
        LEFT JOIN runs r ON r.id = e.run_id
        LEFT JOIN jobs j ON j.id = e.job_id
        LEFT JOIN teachers m ON m.id = j.teacher_id
        LEFT JOIN scorers s ON s.id = j.scorer_id
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
        LEFT JOIN responses x ON x.prompt_id = a.prompt_id AND x.teacher_id = a.teacher_id AND x.sample = 0
        LEFT JOIN trainings g ON g.run_id = r.id AND x.text IS NOT NULL
    """,
    # Students before and after training: the mean value of one scorer; for log-likelihoods, nats per token.
    "v_evaluations": """
        SELECT s.name AS student, r.name AS run, e.training_id, e.id AS evaluation_id, e.name AS prompts_file,
               k.kind AS scorer, count(*) AS prompts, count(o.value) AS judged, count(o.failure) AS failed,
               CASE k.kind
                   WHEN 'log_likelihood' THEN sum(o.value) / nullif(sum(CASE WHEN o.value IS NOT NULL
                       THEN o.n_tokens END), 0)
                   ELSE avg(o.value)
               END AS mean,
               e.created_at, e.finished_at
        FROM evaluations e
        JOIN students s ON s.id = e.student_id
        JOIN scorers k ON k.id = e.scorer_id
        JOIN outcomes o ON o.evaluation_id = e.id
        LEFT JOIN trainings g ON g.id = e.training_id
        LEFT JOIN runs r ON r.id = g.run_id
        GROUP BY s.name, r.name, e.training_id, e.id, e.name, k.kind, e.created_at, e.finished_at
    """,
}


def upgrade() -> None:
    with op.batch_alter_table("loads") as loads:
        comment = "the GPUs that it was given, as nvidia-smi names them; null for none"
        loads.add_column(sa.Column("gpus", sa.String(), nullable=True, comment=comment))
    make_views()


def downgrade() -> None:
    drop_views()
    with op.batch_alter_table("loads") as loads:
        loads.drop_column("gpus")


def make_views(names: Collection[str] = tuple(_VIEWS)) -> None:
    words = _SQLITE if op.get_bind().dialect.name == "sqlite" else _POSTGRESQL
    told = {name: words[name] for name in ("alpha", "normalise", "strategy")}
    told["learnability"] = _LEARNABILITY.format(per=words["per"])
    told |= {f"reason_{table}": words["reason"].format(table) for table in ("x", "v")}
    told["job_seconds"] = words["seconds"].format("j.started_at", "j.finished_at")
    for name, query in _VIEWS.items():
        if name not in names:
            continue
        op.execute(sa.text(f"CREATE VIEW {name} AS {query.format(**told)}".replace(":", r"\:")))


def drop_views() -> None:
    for name in reversed(_VIEWS):
        op.execute(f"DROP VIEW {name}")
