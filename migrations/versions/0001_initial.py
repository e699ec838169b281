"""Create the initial schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

BigInt = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
Time = sa.DateTime(timezone=True)


def upgrade() -> None:
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    now = sa.text("(strftime('%Y-%m-%d %H:%M:%f', 'now'))" if is_sqlite else "clock_timestamp()")

    op.create_table(
        "prompts",
        sa.Column("id", BigInt, sa.Identity(always=False), nullable=False),
        sa.Column(
            "content_hash", sa.String(length=64), nullable=False, comment="SHA-256 of the conversation's canonical JSON"
        ),
        sa.Column("text", sa.Text(), nullable=False, comment="the user's last turn"),
        sa.Column("history", Json, nullable=True, comment="the turns before it: [{role, content}, ...]"),
        sa.Column("answer", sa.Text(), nullable=True, comment="reference answer"),
        sa.Column("source", sa.String(), nullable=False, comment="name of the file it was first imported from"),
        sa.Column("source_id", sa.String(), nullable=True, comment="its id in that file"),
        sa.Column("meta", Json, nullable=False, comment="every other field of its row"),
        sa.Column("created_at", Time, server_default=now, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_prompts")),
        sa.UniqueConstraint("content_hash", name=op.f("uq_prompts_content_hash")),
    )
    op.create_table(
        "routers",
        sa.Column("id", BigInt, sa.Identity(always=False), nullable=False),
        sa.Column(
            "fingerprint",
            sa.String(length=64),
            nullable=False,
            comment="SHA-256 of backbone, settings and training data",
        ),
        sa.Column("backbone", sa.String(), nullable=False),
        sa.Column("revision", sa.String(), nullable=True),
        sa.Column("tune", sa.String(), nullable=False),
        sa.Column("options", Json, nullable=False),
        sa.Column("teacher_ids", Json, nullable=False, comment="in head order"),
        sa.Column("metrics", Json, nullable=False, comment="Hit@k and rewards on the hold-out, beside the baselines"),
        sa.Column("path", sa.String(), nullable=False, comment="folder of the checkpoint"),
        sa.Column("sha256", sa.String(length=64), nullable=False, comment="SHA-256 of the checkpoint's files"),
        sa.Column("created_at", Time, server_default=now, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_routers")),
        sa.UniqueConstraint("fingerprint", name=op.f("uq_routers_fingerprint")),
    )
    op.create_table(
        "students",
        sa.Column("id", BigInt, sa.Identity(always=False), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False, comment="SHA-256, hexadecimal"),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("revision", sa.String(), nullable=True, comment="hub commit, or digest of a local folder"),
        sa.Column(
            "template_hash", sa.String(), nullable=True, comment="SHA-256 of the chat template; null without one"
        ),
        sa.Column("created_at", Time, server_default=now, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_students")),
        sa.UniqueConstraint("fingerprint", name=op.f("uq_students_fingerprint")),
    )
    with op.batch_alter_table("students", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_students_name"), ["name"], unique=False)

    op.create_table(
        "teachers",
        sa.Column("id", BigInt, sa.Identity(always=False), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False, comment="SHA-256 of what decides its responses"),
        sa.Column("engine", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("revision", sa.String(), nullable=True, comment="hub commit, or digest of a local folder"),
        sa.Column("options", Json, nullable=False, comment="engine arguments: dtype, max_model_len, ..."),
        sa.Column("sampling", Json, nullable=False),
        sa.Column("system", sa.Text(), nullable=True),
        sa.Column("few_shot", Json, nullable=False, comment="[{user, assistant}, ...]"),
        sa.Column(
            "template_hash", sa.String(), nullable=True, comment="SHA-256 of the chat template; null without one"
        ),
        sa.Column("gpus", sa.Integer(), nullable=False),
        sa.Column("family", sa.String(), nullable=True),
        sa.Column("license", sa.String(), nullable=True),
        sa.Column("params_b", sa.Double(), nullable=True, comment="parameters, billions"),
        sa.Column("price_in", sa.Double(), nullable=True, comment="US dollars per million prompt tokens"),
        sa.Column("price_out", sa.Double(), nullable=True, comment="US dollars per million response tokens"),
        sa.Column("created_at", Time, server_default=now, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_teachers")),
        sa.UniqueConstraint("fingerprint", name=op.f("uq_teachers_fingerprint")),
    )
    with op.batch_alter_table("teachers", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_teachers_name"), ["name"], unique=False)

    op.create_table(
        "router_scores",
        sa.Column("router_id", BigInt, nullable=False),
        sa.Column("prompt_id", BigInt, nullable=False),
        sa.Column("teacher_id", BigInt, nullable=False),
        sa.Column("score", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["prompt_id"], ["prompts.id"], name=op.f("fk_router_scores_prompt_id"), ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(
            ["router_id"], ["routers.id"], name=op.f("fk_router_scores_router_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["teacher_id"], ["teachers.id"], name=op.f("fk_router_scores_teacher_id"), ondelete="RESTRICT"
        ),
        sa.PrimaryKeyConstraint("router_id", "prompt_id", "teacher_id", name=op.f("pk_router_scores")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "scorers",
        sa.Column("id", BigInt, sa.Identity(always=False), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False, comment="SHA-256, hexadecimal"),
        sa.Column(
            "kind", sa.String(), nullable=False, comment="log_likelihood, reward_model, math, ...: an engine's name"
        ),
        sa.Column("model", sa.String(), nullable=False, comment="empty for a scorer without a model"),
        sa.Column("revision", sa.String(), nullable=True),
        sa.Column("options", Json, nullable=False),
        sa.Column("gpus", sa.Integer(), nullable=False),
        sa.Column("student_id", BigInt, nullable=True, comment="set when the scorer is a student's log-likelihood"),
        sa.Column("created_at", Time, server_default=now, nullable=False),
        sa.ForeignKeyConstraint(
            ["student_id"], ["students.id"], name=op.f("fk_scorers_student_id"), ondelete="RESTRICT"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_scorers")),
        sa.UniqueConstraint("fingerprint", name=op.f("uq_scorers_fingerprint")),
    )
    op.create_table(
        "runs",
        sa.Column("id", BigInt, sa.Identity(always=False), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column(
            "state",
            sa.Enum(
                "running",
                "done",
                "failed",
                "cancelled",
                name="state",
                native_enum=False,
                create_constraint=True,
                length=20,
            ),
            nullable=False,
        ),
        sa.Column(
            "stage",
            sa.String(),
            nullable=False,
            comment="the stage whose jobs are being worked; the last one when done",
        ),
        sa.Column("plans", sa.Integer(), nullable=False, comment="how often the present stage was planned"),
        sa.Column("config", Json, nullable=False, comment="the run file, frozen"),
        sa.Column("config_hash", sa.String(length=64), nullable=False, comment="SHA-256, hexadecimal"),
        sa.Column("seed", BigInt, nullable=False),
        sa.Column("student_id", BigInt, nullable=False),
        sa.Column("quality_scorer_id", BigInt, nullable=False),
        sa.Column("learnability_scorer_id", BigInt, nullable=False),
        sa.Column("router_id", BigInt, nullable=True),
        sa.Column("error", sa.Text(), nullable=True, comment="why it failed"),
        sa.Column("created_at", Time, server_default=now, nullable=False),
        sa.Column("finished_at", Time, nullable=True),
        sa.ForeignKeyConstraint(
            ["learnability_scorer_id"], ["scorers.id"], name=op.f("fk_runs_learnability_scorer_id"), ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(
            ["quality_scorer_id"], ["scorers.id"], name=op.f("fk_runs_quality_scorer_id"), ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(["router_id"], ["routers.id"], name=op.f("fk_runs_router_id"), ondelete="RESTRICT"),
        sa.ForeignKeyConstraint(["student_id"], ["students.id"], name=op.f("fk_runs_student_id"), ondelete="RESTRICT"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_runs")),
        sa.UniqueConstraint("name", name=op.f("uq_runs_name")),
    )
    op.create_table(
        "jobs",
        sa.Column("id", BigInt, sa.Identity(always=False), nullable=False),
        sa.Column("run_id", BigInt, nullable=False),
        sa.Column("stage", sa.String(), nullable=False),
        sa.Column(
            "queue",
            sa.String(),
            nullable=False,
            comment="the model that works it; jobs of one queue share a loaded engine",
        ),
        sa.Column("teacher_id", BigInt, nullable=True),
        sa.Column("scorer_id", BigInt, nullable=True),
        sa.Column("first_prompt_id", BigInt, nullable=False, comment="inclusive"),
        sa.Column("last_prompt_id", BigInt, nullable=False, comment="inclusive"),
        sa.Column("n_prompts", sa.Integer(), nullable=False, comment="how many items it held when it was planned"),
        sa.Column("gpus", sa.Integer(), nullable=False, comment="GPUs its model needs"),
        sa.Column("priority", sa.Integer(), nullable=False, comment="lower is sooner"),
        sa.Column(
            "state",
            sa.Enum(
                "queued",
                "running",
                "done",
                "failed",
                "cancelled",
                name="state",
                native_enum=False,
                create_constraint=True,
                length=20,
            ),
            nullable=False,
        ),
        sa.Column("attempts", sa.Integer(), nullable=False, comment="tries since one last saved something"),
        sa.Column("max_attempts", sa.Integer(), nullable=False),
        sa.Column("fence", BigInt, nullable=False, comment="raised at each claim; every write of results checks it"),
        sa.Column("owner", sa.String(), nullable=True, comment="the worker process that holds or last held it"),
        sa.Column("lease_until", Time, nullable=True),
        sa.Column("heartbeat_at", Time, nullable=True),
        sa.Column("not_before", Time, nullable=True, comment="a failed attempt waits until then"),
        sa.Column("dispatched_at", Time, nullable=True, comment="when a message was last sent for it"),
        sa.Column("deadline_at", Time, nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True, comment="the last failure"),
        sa.Column("created_at", Time, server_default=now, nullable=False),
        sa.Column("started_at", Time, nullable=True, comment="the first claim"),
        sa.Column("finished_at", Time, nullable=True),
        sa.CheckConstraint(
            "state <> 'running' OR (owner IS NOT NULL AND lease_until IS NOT NULL)",
            name=op.f("ck_jobs_running_under_lease"),
        ),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_jobs_run_id"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["scorer_id"], ["scorers.id"], name=op.f("fk_jobs_scorer_id"), ondelete="RESTRICT"),
        sa.ForeignKeyConstraint(["teacher_id"], ["teachers.id"], name=op.f("fk_jobs_teacher_id"), ondelete="RESTRICT"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
        postgresql_with={"fillfactor": "70"},
    )
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.create_index(
            "ix_jobs_claim",
            ["queue", "priority", "id"],
            unique=False,
            sqlite_where=sa.text("state = 'queued'"),
            postgresql_where=sa.text("state = 'queued'"),
        )
        batch_op.create_index(
            "ix_jobs_lease",
            ["lease_until"],
            unique=False,
            sqlite_where=sa.text("state = 'running'"),
            postgresql_where=sa.text("state = 'running'"),
        )
        batch_op.create_index("ix_jobs_run_id_stage_state", ["run_id", "stage", "state"], unique=False)

    op.create_table(
        "run_prompts",
        sa.Column("run_id", BigInt, nullable=False),
        sa.Column("prompt_id", BigInt, nullable=False),
        sa.Column(
            "role",
            sa.Enum(
                "calibration", "holdout", "target", name="role", native_enum=False, create_constraint=True, length=20
            ),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(
            ["prompt_id"], ["prompts.id"], name=op.f("fk_run_prompts_prompt_id"), ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_run_prompts_run_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", "prompt_id", name=op.f("pk_run_prompts")),
        sqlite_with_rowid=False,
    )
    with op.batch_alter_table("run_prompts", schema=None) as batch_op:
        batch_op.create_index("ix_run_prompts_run_id_role_prompt_id", ["run_id", "role", "prompt_id"], unique=False)

    op.create_table(
        "run_teachers",
        sa.Column("run_id", BigInt, nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("teacher_id", BigInt, nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_run_teachers_run_id"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(
            ["teacher_id"], ["teachers.id"], name=op.f("fk_run_teachers_teacher_id"), ondelete="RESTRICT"
        ),
        sa.PrimaryKeyConstraint("run_id", "position", name=op.f("pk_run_teachers")),
        sa.UniqueConstraint("run_id", "teacher_id", name=op.f("uq_run_teachers_run_id_teacher_id")),
    )
    op.create_table(
        "assignments",
        sa.Column("run_id", BigInt, nullable=False),
        sa.Column("prompt_id", BigInt, nullable=False),
        sa.Column("teacher_id", BigInt, nullable=False),
        sa.Column(
            "score", sa.Double(), nullable=True, comment="the router's score, or the reward of a calibration response"
        ),
        sa.Column("margin", sa.Double(), nullable=True, comment="score minus the runner-up's; null when there is none"),
        sa.Column(
            "reason", sa.String(), nullable=False, comment="router, or calibration: its best response was already there"
        ),
        sa.Column("job_id", BigInt, nullable=True),
        sa.Column("created_at", Time, server_default=now, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_assignments_job_id"), ondelete="SET NULL"),
        sa.ForeignKeyConstraint(
            ["prompt_id"], ["prompts.id"], name=op.f("fk_assignments_prompt_id"), ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_assignments_run_id"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(
            ["teacher_id"], ["teachers.id"], name=op.f("fk_assignments_teacher_id"), ondelete="RESTRICT"
        ),
        sa.PrimaryKeyConstraint("run_id", "prompt_id", name=op.f("pk_assignments")),
        sqlite_with_rowid=False,
    )
    with op.batch_alter_table("assignments", schema=None) as batch_op:
        batch_op.create_index(
            "ix_assignments_run_id_teacher_id_prompt_id", ["run_id", "teacher_id", "prompt_id"], unique=False
        )

    op.create_table(
        "events",
        sa.Column("id", BigInt, sa.Identity(always=False), nullable=False),
        sa.Column("at", Time, server_default=now, nullable=False),
        sa.Column("actor", sa.String(), nullable=False, comment="the worker or person that caused it"),
        sa.Column("run_id", BigInt, nullable=True),
        sa.Column("job_id", BigInt, nullable=True),
        sa.Column("prompt_id", BigInt, nullable=True),
        sa.Column("fence", BigInt, nullable=True),
        sa.Column("from_state", sa.String(), nullable=True),
        sa.Column("to_state", sa.String(), nullable=False),
        sa.Column("detail", Json, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_events_job_id"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["prompt_id"], ["prompts.id"], name=op.f("fk_events_prompt_id"), ondelete="RESTRICT"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_events_run_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
    )
    with op.batch_alter_table("events", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_events_job_id"), ["job_id"], unique=False)
        batch_op.create_index(batch_op.f("ix_events_run_id"), ["run_id"], unique=False)

    op.create_table(
        "responses",
        sa.Column("id", BigInt, sa.Identity(always=False), nullable=False),
        sa.Column("prompt_id", BigInt, nullable=False),
        sa.Column("teacher_id", BigInt, nullable=False),
        sa.Column("sample", sa.Integer(), nullable=False, comment="0 for the first response of a teacher to a prompt"),
        sa.Column("text", sa.Text(), nullable=True),
        sa.Column("failure", sa.Text(), nullable=True, comment="why there is no text: too_long, empty, refused, ..."),
        sa.Column("finish_reason", sa.String(), nullable=True, comment="stop, or length when max_tokens cut it off"),
        sa.Column("prompt_tokens", sa.Integer(), nullable=True),
        sa.Column("response_tokens", sa.Integer(), nullable=True),
        sa.Column("seconds", sa.Double(), nullable=True, comment="from admission to the engine to the last token"),
        sa.Column("seed", BigInt, nullable=True),
        sa.Column("engine", sa.String(), nullable=True, comment="name and version of what served the model"),
        sa.Column(
            "origin",
            sa.Enum("generated", "imported", name="origin", native_enum=False, create_constraint=True, length=20),
            nullable=False,
        ),
        sa.Column("job_id", BigInt, nullable=True),
        sa.Column("created_at", Time, server_default=now, nullable=False),
        sa.CheckConstraint("(text IS NULL) <> (failure IS NULL)", name=op.f("ck_responses_text_or_failure")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_responses_job_id"), ondelete="SET NULL"),
        sa.ForeignKeyConstraint(
            ["prompt_id"], ["prompts.id"], name=op.f("fk_responses_prompt_id"), ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(
            ["teacher_id"], ["teachers.id"], name=op.f("fk_responses_teacher_id"), ondelete="RESTRICT"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_responses")),
        sa.UniqueConstraint("prompt_id", "teacher_id", "sample", name=op.f("uq_responses_prompt_id_teacher_id_sample")),
    )
    with op.batch_alter_table("responses", schema=None) as batch_op:
        batch_op.create_index("ix_responses_teacher_id", ["teacher_id"], unique=False)

    op.create_table(
        "scores",
        sa.Column("response_id", BigInt, nullable=False),
        sa.Column("scorer_id", BigInt, nullable=False),
        sa.Column(
            "value", sa.Double(), nullable=True, comment="sum of log-probabilities in nats, a logit, or a verdict"
        ),
        sa.Column("n_tokens", sa.Integer(), nullable=True, comment="tokens summed over"),
        sa.Column("failure", sa.Text(), nullable=True),
        sa.Column("detail", Json, nullable=False, comment="what retraces the value: parsed forms, dtype, version"),
        sa.Column("job_id", BigInt, nullable=True),
        sa.Column("created_at", Time, server_default=now, nullable=False),
        sa.CheckConstraint("(value IS NULL) <> (failure IS NULL)", name=op.f("ck_scores_value_or_failure")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_scores_job_id"), ondelete="SET NULL"),
        sa.ForeignKeyConstraint(
            ["response_id"], ["responses.id"], name=op.f("fk_scores_response_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["scorer_id"], ["scorers.id"], name=op.f("fk_scores_scorer_id"), ondelete="RESTRICT"),
        sa.PrimaryKeyConstraint("response_id", "scorer_id", name=op.f("pk_scores")),
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    op.drop_table("scores")
    with op.batch_alter_table("responses", schema=None) as batch_op:
        batch_op.drop_index("ix_responses_teacher_id")

    op.drop_table("responses")
    with op.batch_alter_table("events", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_events_run_id"))
        batch_op.drop_index(batch_op.f("ix_events_job_id"))

    op.drop_table("events")
    with op.batch_alter_table("assignments", schema=None) as batch_op:
        batch_op.drop_index("ix_assignments_run_id_teacher_id_prompt_id")

    op.drop_table("assignments")
    op.drop_table("run_teachers")
    with op.batch_alter_table("run_prompts", schema=None) as batch_op:
        batch_op.drop_index("ix_run_prompts_run_id_role_prompt_id")

    op.drop_table("run_prompts")
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_index("ix_jobs_run_id_stage_state")
        batch_op.drop_index(
            "ix_jobs_lease", sqlite_where=sa.text("state = 'running'"), postgresql_where=sa.text("state = 'running'")
        )
        batch_op.drop_index(
            "ix_jobs_claim", sqlite_where=sa.text("state = 'queued'"), postgresql_where=sa.text("state = 'queued'")
        )

    op.drop_table("jobs")
    op.drop_table("runs")
    op.drop_table("scorers")
    op.drop_table("router_scores")
    with op.batch_alter_table("teachers", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_teachers_name"))

    op.drop_table("teachers")
    with op.batch_alter_table("students", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_students_name"))

    op.drop_table("students")
    op.drop_table("routers")
    op.drop_table("prompts")
