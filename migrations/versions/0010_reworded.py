"""Give the only scored response to a prompt no reward in `v_reward_matrix`; reword column comments.

SQLite stores no comments.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

_SQLITE = {
    "alpha": "json_extract(r.config, '$.run.alpha')",
    "normalise": "json_extract(r.config, '$.run.normalise')",
    "per": "coalesce(json_extract(r.config, '$.run.learnability_per'), 'token')",
}
_POSTGRESQL = {
    "alpha": "CAST(r.config -> 'run' ->> 'alpha' AS double precision)",
    "normalise": "r.config -> 'run' ->> 'normalise'",
    "per": "coalesce(r.config -> 'run' ->> 'learnability_per', 'token')",
}
_LEARNABILITY = """l.value / CASE
    WHEN coalesce(l.n_tokens, 0) = 0 THEN NULL
    WHEN {per} = 'token' THEN l.n_tokens
    WHEN {per} = 'character' THEN length(x.text)
    ELSE 1
END"""
_REWARD_MATRIX = """
    SELECT run, prompt_id, role, position, teacher, response_id, quality, learnability,
           CASE
               WHEN {has_no_reward} THEN NULL
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
"""
#: Old and new comment by table and column.
COMMENTS = {
    ("assignments", "margin"): (
        "score minus the runner-up's; null when there is none",
        "score minus that of the runner-up; null if there is none",
    ),
    ("assignments", "reason"): (
        "router, or calibration: its best response was already there",
        "router, calibration, or the strategy that chose (kind: name)",
    ),
    ("assignments", "score"): (
        "the router's score, or the reward of a calibration response",
        "router score, or the reward if the reason is calibration",
    ),
    ("evaluations", "how"): (
        "what wrote the answers: engine, options, sampling",
        "how responses were generated: engine, options, sampling",
    ),
    ("evaluations", "name"): (
        "of the prompts' files",
        "names of the prompt files",
    ),
    ("events", "actor"): (
        "the worker or person that caused it",
        "worker or person that caused the event",
    ),
    ("jobs", "attempts"): (
        "tries since one last saved something",
        "attempts since results were last saved",
    ),
    ("jobs", "dispatched_at"): (
        "when a message was last sent for it",
        "when a broker message was last sent for the job",
    ),
    ("jobs", "error"): (
        "the last failure",
        "reason of the last failure",
    ),
    ("jobs", "fence"): (
        "raised at each claim; every write of results checks it",
        "incremented by each claim; checked by every write of results",
    ),
    ("jobs", "gpus"): (
        "GPUs its model needs",
        "number of GPUs that the model needs",
    ),
    ("jobs", "n_prompts"): (
        "how many items it held when it was planned",
        "number of items when the job was planned",
    ),
    ("jobs", "not_before"): (
        "a failed attempt waits until then",
        "earliest time of the next attempt, after a failed one",
    ),
    ("jobs", "owner"): (
        "the worker process that holds or last held it",
        "worker process that holds or last held the job",
    ),
    ("jobs", "priority"): (
        "lower is sooner",
        "lower values are claimed first",
    ),
    ("jobs", "queue"): (
        "the model that works it; jobs of one queue share a loaded engine",
        "name of the model spec; jobs of one queue share a loaded engine",
    ),
    ("jobs", "started_at"): (
        "the first claim",
        "time of the first claim",
    ),
    ("leader", "fence"): (
        "raised with each new leader",
        "incremented with each new leader",
    ),
    ("leader", "owner"): (
        "the dispatcher process that leads or led last",
        "dispatcher process that leads or last led",
    ),
    ("loads", "at"): (
        "when it was in memory",
        "when loading finished",
    ),
    ("loads", "engine"): (
        "name and version of what serves it",
        "name and version of the engine",
    ),
    ("loads", "gpus"): (
        "the GPUs that it was given, as nvidia-smi names them; null for none",
        "GPUs assigned to the engine, as named by nvidia-smi; null for none",
    ),
    ("loads", "job_id"): (
        "the job that asked for it",
        "the job that the model was loaded for",
    ),
    ("loads", "log"): (
        "its log file, in PERSYN_HOME/logs on the worker's machine",
        "log file, in PERSYN_HOME/logs on the worker's machine",
    ),
    ("loads", "owner"): (
        "the worker process that has it",
        "worker process that loaded the model",
    ),
    ("loads", "seconds"): (
        "from the start of its process",
        "load time, from the start of the engine process",
    ),
    ("outages", "error"): (
        "what the server said last, or that it said nothing",
        "last error of the server, or that it did not respond",
    ),
    ("outages", "retry_at"): (
        "when the server is asked again",
        "when the server is tried again",
    ),
    ("outages", "since"): (
        "when it was first noticed",
        "when the outage was first noticed",
    ),
    ("outcomes", "n_tokens"): (
        "tokens summed over, for a log-likelihood",
        "number of tokens in the sum, for a log-likelihood",
    ),
    ("outcomes", "response"): (
        "what the student wrote; null where none is asked for",
        "the student's response; null if none is generated",
    ),
    ("prompts", "history"): (
        "the turns before it: [{role, content}, ...]",
        "the turns before the last one: [{role, content}, ...]",
    ),
    ("prompts", "meta"): (
        "every other field of its row",
        "all other fields of the imported row",
    ),
    ("prompts", "source_id"): (
        "its id in that file",
        "id of the prompt in that file",
    ),
    ("prompts", "text"): (
        "the user's last turn",
        "the last user turn",
    ),
    ("responses", "engine"): (
        "name and version of what served the model",
        "name and version of the inference engine",
    ),
    ("responses", "finish_reason"): (
        "stop, or length when max_tokens cut it off",
        "stop, length if max_tokens was reached, or what the server gave",
    ),
    ("responses", "meta"): (
        "of an imported one: every other field of its row",
        "all other fields of the row it was imported from",
    ),
    ("responses", "sample"): (
        "0 for the first response of a teacher to a prompt",
        "index of the teacher's response to the prompt, from 0",
    ),
    ("routers", "metrics"): (
        "Hit@k and rewards on the hold-out, beside the baselines",
        "Hit@k and rewards on the hold-out, with baselines",
    ),
    ("routers", "teacher_ids"): (
        "in head order",
        "teacher ids in head order",
    ),
    ("runs", "error"): (
        "why it failed",
        "why the run failed",
    ),
    ("runs", "plans"): (
        "how often the present stage was planned",
        "number of times the current stage was planned",
    ),
    ("runs", "stage"): (
        "the stage whose jobs are being worked; the last one when done",
        "current stage; the last stage once the run is done",
    ),
    ("scorers", "model"): (
        "empty for a scorer without a model",
        "empty if the scorer uses no model",
    ),
    ("scores", "detail"): (
        "what retraces the value: parsed forms, dtype, version",
        "how the value was obtained: parsed forms, dtype, version",
    ),
    ("scores", "n_tokens"): (
        "tokens summed over",
        "number of tokens in the sum",
    ),
    ("students", "revision"): (
        "hub commit, or digest of a local folder",
        "hub commit, or sha256:... of a local folder",
    ),
    ("students", "template_hash"): (
        "SHA-256 of the chat template; null without one",
        "SHA-256 of the chat template; null if it has none",
    ),
    ("teachers", "fingerprint"): (
        "SHA-256 of what decides its responses",
        "SHA-256 of everything that determines its responses",
    ),
    ("teachers", "params_b"): (
        "parameters, billions",
        "number of parameters, in billions",
    ),
    ("teachers", "revision"): (
        "hub commit, or digest of a local folder",
        "hub commit, or sha256:... of a local folder",
    ),
    ("teachers", "template_hash"): (
        "SHA-256 of the chat template; null without one",
        "SHA-256 of the chat template; null if it has none",
    ),
    ("trainings", "revision"): (
        "digest of that folder",
        "sha256:... of that folder",
    ),
    ("trainings", "student_id"): (
        "as it began",
        "before this training",
    ),
}


def upgrade() -> None:
    _replace_view("is_incomplete OR cells < 2")
    if op.get_bind().dialect.supports_comments:
        for (table, column), (old, new) in COMMENTS.items():
            op.alter_column(table, column, comment=new, existing_comment=old)


def downgrade() -> None:
    _replace_view("is_incomplete")
    if op.get_bind().dialect.supports_comments:
        for (table, column), (old, new) in COMMENTS.items():
            op.alter_column(table, column, comment=old, existing_comment=new)


def _replace_view(has_no_reward: str) -> None:
    words = _SQLITE if op.get_bind().dialect.name == "sqlite" else _POSTGRESQL
    learnability = _LEARNABILITY.format(per=words["per"])
    query = _REWARD_MATRIX.format(**words, learnability=learnability, has_no_reward=has_no_reward)
    op.execute("DROP VIEW v_reward_matrix")
    op.execute(sa.text(f"CREATE VIEW v_reward_matrix AS {query}".replace(":", r"\:")))
