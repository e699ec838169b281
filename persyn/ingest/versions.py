"""Register models as immutable versions, each identified by what determines its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import msgspec
from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session
from yarl import URL

from persyn.config import IMPORTED, QualityTable, RouterTable, StrategyTable, StudentTable, TeacherTable, fingerprint_of
from persyn.db import bulk
from persyn.db.base import Base
from persyn.db.catalog import Scorer, Student, Teacher
from persyn.errors import UsageError
from persyn.llm import engines
from persyn.llm.engines import ENGINES
from persyn.llm.identity import UNKNOWN_IDENTITY, Identity, identify
from persyn.llm.scorers import custom_function, judge
from persyn.method.strategies import STRATEGIES

Identities: TypeAlias = Mapping[tuple[str, str | None], Identity]
"""Identities of models, by (model, revision)."""

#: Teacher columns that may change without creating a new version.
_DESCRIPTIVE = ("name", "family", "license", "params_b", "price_in", "price_out")


def identities(
    teachers: Sequence[TeacherTable],
    student: StudentTable | None = None,
    quality: QualityTable | None = None,
    strategy: StrategyTable | None = None,
    router: RouterTable | None = None,
) -> Identities:
    """Identify models, querying the hub and reading files if needed; raise `UsageError` listing all missing ones."""
    tables = [(table.model, table.revision) for table in teachers if ENGINES[table.engine].model == "weights"]
    if student is not None and ENGINES[student.engine].model:
        tables.append((student.model, student.revision))
    if quality is not None and engines.loads_weights(quality.kind, quality.options):
        tables.append((quality.model, quality.revision))
    if router is not None:
        tables.append((router.backbone, router.revision))
    looks: dict[tuple[str, str | None], Callable[[], Identity]] = {table: partial(identify, *table) for table in tables}
    functions: list[QualityTable | StrategyTable] = []
    if quality is not None and ENGINES[quality.kind].model == "function":
        functions.append(quality)
    if strategy is not None and STRATEGIES[strategy.kind].decided_by == "function":
        functions.append(strategy)
    for function in functions:
        looks[function.model, function.revision] = partial(_of_function, function)
    found = _all(looks)
    if router is not None and router.version not in (None, is_now := found[router.backbone, router.revision].revision):
        raise UsageError(
            f"the backbone {router.backbone!r} is {is_now}, not {router.version}: "
            "restore it, or remove the version from the run file"
        )
    return found


def _all(looks: Mapping[tuple[str, str | None], Callable[[], Identity]]) -> dict[tuple[str, str | None], Identity]:
    """Run all identifications; raise `UsageError` listing all that failed."""
    found, missing = {}, []
    for table, look in looks.items():
        try:
            found[table] = look()
        except UsageError as error:
            missing.append(str(error))
    if missing:
        raise UsageError(missing[0] if len(missing) == 1 else f"{len(missing)} are missing: {' | '.join(missing)}")
    return found


def _of_function(table: QualityTable | StrategyTable) -> Identity:
    revision = custom_function.revision(table.model)
    if table.revision not in (None, revision):
        raise UsageError(
            f"the file of {table.model!r} is {revision}, not {table.revision}: "
            "restore it, or remove the revision from the run file"
        )
    return Identity(revision, None)


def teacher_key(table: TeacherTable, known: Identities) -> str:
    """A canonical key of a teacher: equal for tables that describe the same teacher differently.

    A server is identified by its normalised address, a local model by its content. Options that only affect speed and
    memory are ignored.
    """
    engine, sampling = table.engine, msgspec.to_builtins(table.sampling)
    if engine == IMPORTED:
        return msgspec.json.encode([engine, table.model]).decode()
    if table.sampling.temperature == 0:
        sampling |= {"top_p": None, "top_k": None}  # greedy decoding samples nothing
    options = {key: value for key, value in table.options.items() if key not in ENGINES[engine].speed_options}
    model, version = table.model.strip(), None
    if ENGINES[engine].model == "weights":
        found = known[table.model, table.revision]
        model, version = (found.revision, found.template_hash) if found.revision else (model, None)
    elif ENGINES[engine].model == "server":
        urls = table.options.get("base_url")
        options["base_url"] = sorted(_address(str(url)) for url in (urls if isinstance(urls, list) else [urls]))
    shots = msgspec.to_builtins(table.few_shot)
    parts = [engine, model, version, options, sampling, table.system or None, shots]
    return msgspec.json.encode(parts, order="sorted").decode()


def _address(base_url: str) -> str:
    """A server's normalised address; text that is not a URL is returned unchanged."""
    try:
        url = URL(base_url.strip())
        host = "127.0.0.1" if url.host in ("localhost", "::1", "0.0.0.0") else url.host  # noqa: S104
        return f"{url.scheme}://{host}:{url.port}{url.path.rstrip('/')}?{url.query_string}"
    except ValueError:
        return base_url


def teacher(session: Session, table: TeacherTable, known: Identities) -> int:
    """The id of a teacher's version; updates its descriptive columns."""
    found = known[table.model, table.revision] if ENGINES[table.engine].model == "weights" else UNKNOWN_IDENTITY
    row = msgspec.to_builtins(table) | _version(found)
    if table.engine == IMPORTED:  # how the responses were generated is unknown
        decisive = {"engine": table.engine, "model": table.model}
    else:
        decisive = {key: value for key, value in row.items() if key not in _DESCRIPTIVE}
    teacher_id = _register(session, Teacher, decisive, row)
    said = {key: row[key] for key in _DESCRIPTIVE if row[key] is not None}
    columns = Teacher.__table__.c
    # Write only differences: a start that locks no row waits for no other start.
    differs = or_(*(columns[key].is_distinct_from(value) for key, value in said.items()))
    session.execute(update(Teacher).where(Teacher.id == teacher_id, differs).values(**said))
    return teacher_id


def student(session: Session, table: StudentTable, known: Identities) -> Student:
    """The row of a student's version."""
    found = known[table.model, table.revision] if ENGINES[table.engine].model else UNKNOWN_IDENTITY
    row = {"name": table.name, "model": table.model} | _version(found)
    return session.get_one(Student, _register(session, Student, row, row))


def learnability(session: Session, student: Student, table: StudentTable) -> int:
    """The id of the scorer that computes log-likelihoods under a student."""
    row = {
        "kind": table.engine,
        "model": student.model,
        "revision": student.revision,
        "options": table.options,
        "gpus": table.gpus,
        "student_id": student.id,
    }
    return _register(session, Scorer, row | {"template_hash": student.template_hash}, row)


def likelihood(session: Session, model: str, revision: str | None, *, gpus: int, options: Mapping[str, Any]) -> int:
    """The id of the scorer that computes log-likelihoods under any identified model."""
    row: dict[str, Any] = {"kind": "log_likelihood", "model": model, "revision": revision, "options": dict(options)}
    row["gpus"] = gpus
    return _register(session, Scorer, row, row)


def quality(session: Session, table: QualityTable, known: Identities) -> int:
    """The id of a quality scorer's version."""
    is_identified = ENGINES[table.kind].reference(table.options) in ("weights", "function")
    found = known[table.model, table.revision] if is_identified else UNKNOWN_IDENTITY
    # The prompt wording is part of a judge's version.
    words = {"wording": judge.wording(table.options)} if ENGINES[table.kind].is_nested else {}
    row = {
        "kind": table.kind,
        "model": table.model,
        "revision": found.revision,
        "options": table.options | words,
        "gpus": table.gpus,
    }
    return _register(session, Scorer, row | {"template_hash": found.template_hash}, row)


def _version(found: Identity) -> dict[str, Any]:
    return {"revision": found.revision, "template_hash": found.template_hash}


def _register(session: Session, model: type[Base], decisive: dict[str, Any], row: dict[str, Any]) -> int:
    """The id of the row with this fingerprint, inserted if new; concurrent callers get the same row."""
    fingerprint = fingerprint_of(decisive)
    bulk.insert_new(session, model, [row | {"fingerprint": fingerprint}])
    columns: Any = model
    return int(session.scalars(select(columns.id).where(columns.fingerprint == fingerprint)).one())
