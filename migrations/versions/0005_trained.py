"""Add trainings, evaluations and outcomes of students."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

BigInt = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
Hash = sa.String(length=64)
Time = sa.DateTime(timezone=True)


def upgrade() -> None:
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    now = sa.text("(strftime('%Y-%m-%d %H:%M:%f', 'now'))" if is_sqlite else "clock_timestamp()")

    op.create_table(
        "trainings",
        sa.Column("id", BigInt, sa.Identity(always=False), nullable=False),
        sa.Column("run_id", BigInt, nullable=False),
        sa.Column("student_id", BigInt, nullable=False, comment="as it began"),
        sa.Column("fingerprint", Hash, nullable=False, comment="SHA-256 of run, student, dataset and settings"),
        sa.Column("dataset_hash", Hash, nullable=False, comment="SHA-256 of the conversations, in order"),
        sa.Column("settings", Json, nullable=False, comment="tune, epochs, learning_rate, batch_size, seed, ..."),
        sa.Column(
            "notes", Json, nullable=False, comment="rows, response tokens, steps, seconds, losses (nats per token)"
        ),
        sa.Column("path", sa.String(), nullable=False, comment="folder of the trained weights"),
        sa.Column("revision", sa.String(), nullable=False, comment="digest of that folder"),
        sa.Column("created_at", Time, server_default=now, nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_trainings_run_id"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(
            ["student_id"], ["students.id"], name=op.f("fk_trainings_student_id"), ondelete="RESTRICT"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_trainings")),
        sa.UniqueConstraint("fingerprint", name=op.f("uq_trainings_fingerprint")),
    )
    op.create_index(op.f("ix_trainings_run_id"), "trainings", ["run_id"])

    op.create_table(
        "evaluations",
        sa.Column("id", BigInt, sa.Identity(always=False), nullable=False),
        sa.Column("fingerprint", Hash, nullable=False, comment="SHA-256 of weights, prompts, sampling and scorer"),
        sa.Column("student_id", BigInt, nullable=False),
        sa.Column("training_id", BigInt, nullable=True, comment="null for the student before any training"),
        sa.Column("scorer_id", BigInt, nullable=False),
        sa.Column("name", sa.String(), nullable=False, comment="of the prompts' files"),
        sa.Column("prompts_hash", Hash, nullable=False, comment="SHA-256 of the prompts' content hashes, sorted"),
        sa.Column("how", Json, nullable=False, comment="what wrote the answers: engine, options, sampling"),
        sa.Column("created_at", Time, server_default=now, nullable=False),
        sa.Column("finished_at", Time, nullable=True),
        sa.ForeignKeyConstraint(
            ["student_id"], ["students.id"], name=op.f("fk_evaluations_student_id"), ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(
            ["training_id"], ["trainings.id"], name=op.f("fk_evaluations_training_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["scorer_id"], ["scorers.id"], name=op.f("fk_evaluations_scorer_id"), ondelete="RESTRICT"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_evaluations")),
        sa.UniqueConstraint("fingerprint", name=op.f("uq_evaluations_fingerprint")),
    )
    op.create_index(op.f("ix_evaluations_student_id"), "evaluations", ["student_id"])
    op.create_index(op.f("ix_evaluations_training_id"), "evaluations", ["training_id"])

    op.create_table(
        "outcomes",
        sa.Column("evaluation_id", BigInt, nullable=False),
        sa.Column("prompt_id", BigInt, nullable=False),
        sa.Column("response", sa.Text(), nullable=True, comment="what the student wrote; null where none is asked for"),
        sa.Column("value", sa.Double(), nullable=True, comment="the scorer's raw value"),
        sa.Column("n_tokens", sa.Integer(), nullable=True, comment="tokens summed over, for a log-likelihood"),
        sa.Column("failure", sa.Text(), nullable=True),
        sa.CheckConstraint("value IS NULL OR failure IS NULL", name=op.f("ck_outcomes_not_both")),
        sa.ForeignKeyConstraint(
            ["evaluation_id"], ["evaluations.id"], name=op.f("fk_outcomes_evaluation_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["prompt_id"], ["prompts.id"], name=op.f("fk_outcomes_prompt_id"), ondelete="RESTRICT"),
        sa.PrimaryKeyConstraint("evaluation_id", "prompt_id", name=op.f("pk_outcomes")),
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    op.drop_table("outcomes")
    op.drop_table("evaluations")
    op.drop_table("trainings")
