"""Take transport out of the versions of teachers and scorers: how a model is reached belongs to a run's configuration.

The versions of models whose content is known no longer contain the place that they were found at. Rows that thereby
become equal stay separate, since runs refer to them: the one with the most results takes the common fingerprint, and
later runs find it; the others keep the fingerprint that they had.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0014"
down_revision = "0012"
branch_labels = None
depends_on = None

Json = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")

#: The options of each engine that are transport.
_TRANSPORT = {
    "vllm": {"gpu_memory_utilization", "kv_cache_gib", "max_num_seqs", "max_num_batched_tokens", "enforce_eager"},
    "transformers": {"batch_size"},
    "openai": {
        "base_url",
        "api_key_env",
        "api_key_header",
        "concurrency",
        "timeout_seconds",
        "max_retries",
        "max_tokens_field",
    },
    "log_likelihood": {"batch_tokens"},
    "reward_model": {"batch_tokens"},
    "math": {"timeout_seconds", "memory_mb"},
    "fake": {"latency_seconds", "concurrency", "rows_per_second", "load_seconds", "journal"},
}
_NONE: dict[str, Any] = {"dtype": None, "add_bos": None}
#: The defaults of the other options.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "vllm": {**_NONE, "dtype": "auto", "max_model_len": None, "quantization": None},
    "transformers": {**_NONE, "max_model_len": None},
    "openai": {"extra": {}, "omit": []},
    "log_likelihood": {**_NONE, "response_tokens": None},
    "reward_model": _NONE,
    "instructions": {"level": "prompt", "strict": True},
    "judge": {
        "criterion": (
            "it does what the conversation asks for; it is correct, complete and clear, and has nothing beside the "
            "point."
        ),
        "scale": 10,
        "against": None,
        "max_tokens": 256,
        "options": {},
        "wording": None,
    },
    "fake": {"fail_every": 0, "crash_on": None, "hang_on": None, "response_words": 12, "teachers": 0},
}
#: The data type on a CPU and on a GPU, where it is not set.
_DTYPES = {
    "transformers": ("float32", "bfloat16"),
    "log_likelihood": ("float32", None),
    "reward_model": ("float32", None),
}
_SAMPLING = {
    "max_tokens": 1024,
    "temperature": 0.7,
    "top_p": 1.0,
    "top_k": 0,
    "repetition_penalty": 1.0,
    "stop": [],
}
_DESCRIPTIVE = {"id", "fingerprint", "name", "family", "license", "params_b", "price_in", "price_out", "created_at"}


def _table(name: str, columns: str, json_columns: str = "") -> sa.TableClause:
    plain = [sa.column(each) for each in f"id fingerprint model revision {columns}".split()]
    return sa.table(name, *plain, *(sa.column(each, Json) for each in json_columns.split()))


_TEACHERS = _table(
    "teachers",
    "engine system template_hash gpus adapter adapter_revision",
    "options sampling few_shot response_schema",
)
_STUDENTS = _table("students", "name template_hash")
_SCORERS = _table("scorers", "kind student_id gpus", "options")
#: Where each table's results are, to choose among equal rows.
_RESULTS = {
    "teachers": ("responses", "teacher_id"),
    "students": ("runs", "student_id"),
    "scorers": ("scores", "scorer_id"),
}
_COMMENTS = (
    (
        "teachers",
        "revision",
        sa.String(),
        "hub commit, or sha256:... of a local folder",
        "hub commit, sha256:... of a local folder, or the run file's word for what a server has",
    ),
    (
        "teachers",
        "options",
        Json,
        "engine arguments: dtype, max_model_len, ...",
        "engine options that determine responses: dtype, max_model_len, ...",
    ),
    ("scorers", "options", Json, None, "engine options that determine scores"),
)


def upgrade() -> None:
    _take_out(_TEACHERS, _of_teacher)
    _take_out(
        _STUDENTS, lambda row: _present({name: row[name] for name in ("name", "model", "revision", "template_hash")})
    )
    _take_out(_SCORERS, _of_scorer)
    for table in ("teachers", "scorers"):
        op.drop_column(table, "gpus")
    _comment(now=True)


def downgrade() -> None:
    """Put the transport of each version's latest run back into it; one without a run keeps what it has."""
    _comment(now=False)
    for table in ("teachers", "scorers"):
        op.add_column(table, sa.Column("gpus", sa.Integer(), nullable=False, server_default="0"))
    _put_back()


def _take_out(table: sa.TableClause, identity: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Reduce the options of a table's rows to those that determine results, and recompute the fingerprints."""
    connection = op.get_bind()
    equal: dict[str, list[int]] = defaultdict(list)
    rows = [dict(row._mapping) for row in connection.execute(sa.select(table).order_by(table.c.id))]
    for row in rows:
        if "options" in row:
            engine = row.get("engine") or row["kind"]
            row["options"] = _decisive(engine, row["options"], row["gpus"])
        equal[_fingerprint(identity(row))].append(row["id"])
    takes = {_first(table.name, ids): fingerprint for fingerprint, ids in equal.items()}
    for row in rows:
        changed = {"fingerprint": takes.get(row["id"], row["fingerprint"])}
        changed |= {"options": row["options"]} if "options" in row else {}
        connection.execute(table.update().where(table.c.id == row["id"]).values(**changed))


def _first(table: str, ids: list[int]) -> int:
    """The row with the most results, and the oldest of those."""
    if len(ids) == 1:
        return ids[0]
    name, column = _RESULTS[table]
    of = sa.column(column)
    count = sa.select(of, sa.func.count()).select_from(sa.table(name)).where(of.in_(ids)).group_by(of)
    results = {model_id: number for model_id, number in op.get_bind().execute(count)}
    return max(ids, key=lambda model_id: (results.get(model_id, 0), -model_id))


def _of_teacher(row: dict[str, Any]) -> dict[str, Any]:
    if row["engine"] == "imported":
        return {"engine": row["engine"], "model": row["model"]}
    sampling = {name: value for name, value in row["sampling"].items() if _SAMPLING.get(name) != value}
    if sampling.get("temperature") == 0:
        sampling = {name: value for name, value in sampling.items() if name not in ("top_p", "top_k")}
    said = {name: value for name, value in row.items() if name not in _DESCRIPTIVE and name != "gpus"}
    return _present(said | {"sampling": sampling, "model": row["model"].strip()})


def _of_scorer(row: dict[str, Any]) -> dict[str, Any]:
    said = {name: row[name] for name in ("kind", "model", "revision", "options", "student_id")}
    return _present(said, by_content=row["kind"] != "python")


def _present(said: Mapping[str, Any], *, by_content: bool = True) -> dict[str, Any]:
    """Leave out empty values and, where its content is known, the place of a model."""
    places = {"model": "revision", "adapter": "adapter_revision"} if by_content else {}
    known = {place for place, content in places.items() if said.get(content)}
    return {name: value for name, value in said.items() if value not in (None, "", [], {}) and name not in known}


def _decisive(engine: str, options: Mapping[str, Any], gpus: int) -> dict[str, Any]:
    transport, defaults = _TRANSPORT.get(engine, set()), _DEFAULTS.get(engine, {})
    found = {name: value for name, value in options.items() if name not in transport}
    found = {name: value for name, value in found.items() if name not in defaults or defaults[name] != value}
    if dtype := _DTYPES.get(engine, (None, None))[gpus > 0]:
        found.setdefault("dtype", dtype)
    if engine == "judge":
        inner = _decisive(found["engine"], found.pop("options", {}), gpus)
        found |= {"options": inner} if inner else {}
    return found


def _fingerprint(value: Any) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()


def _put_back() -> None:
    connection = op.get_bind()
    runs = sa.table(
        "runs",
        sa.column("id"),
        sa.column("config", Json),
        sa.column("quality_scorer_id"),
        sa.column("learnability_scorer_id"),
    )
    of_run = sa.table("run_teachers", sa.column("run_id"), sa.column("position"), sa.column("teacher_id"))
    teachers: dict[int, dict[str, Any]] = {}
    scorers: dict[int, dict[str, Any]] = {}
    for run in connection.execute(sa.select(runs).order_by(runs.c.id)).all():
        for row in connection.execute(sa.select(of_run).where(of_run.c.run_id == run.id)):
            teachers[row.teacher_id] = run.config["teachers"][row.position]
        scorers[run.quality_scorer_id] = run.config["quality"]
        scorers[run.learnability_scorer_id] = run.config["student"]
    _restore(_TEACHERS, teachers)
    _restore(_SCORERS, scorers)


def _restore(table: sa.TableClause, said: Mapping[int, Mapping[str, Any]]) -> None:
    connection = op.get_bind()
    taken = set(connection.scalars(sa.select(table.c.fingerprint)))
    for row in connection.execute(sa.select(table).where(table.c.id.in_(said))).all():
        of_run = said[row.id]
        words = {name: value for name, value in row.options.items() if name == "wording"}
        values = {"options": {**of_run.get("options", {}), **words}, "gpus": of_run.get("gpus", 0)}
        if table is _TEACHERS and row.engine != "imported":
            columns = "engine", "model", "revision", "sampling", "system", "few_shot", "template_hash"
            before = _fingerprint({name: getattr(row, name) for name in columns} | values)
            values |= {"fingerprint": before} if before not in taken else {}
            taken.add(before)
        connection.execute(table.update().where(table.c.id == row.id).values(**values))


def _comment(*, now: bool) -> None:
    if op.get_bind().dialect.name == "sqlite":  # SQLite stores no comments
        return
    for table, name, kind, before, after in _COMMENTS:
        new, old = (after, before) if now else (before, after)
        nullable = name == "revision"
        op.alter_column(table, name, existing_type=kind, existing_nullable=nullable, existing_comment=old, comment=new)
