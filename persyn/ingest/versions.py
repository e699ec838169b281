"""Register models as immutable versions, each identified by what determines its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from persyn.config import (
    COMBINED,
    IMPORTED,
    QualityPart,
    QualityTable,
    RouterTable,
    StrategyTable,
    StudentTable,
    TeacherTable,
    fingerprint_of,
    scorers_of,
)
from persyn.db import bulk
from persyn.db.base import Base
from persyn.db.catalog import Scorer, Student, Teacher
from persyn.db.results import Score
from persyn.errors import UsageError
from persyn.llm import engines, transport
from persyn.llm.engines import ENGINES
from persyn.llm.identity import UNKNOWN_IDENTITY, Identify, Identity, identify, identify_adapter, identify_embedding
from persyn.llm.options import OpenAIOptions
from persyn.llm.protocols import ModelSpec
from persyn.llm.scorers import custom_function, judge
from persyn.method.learnability import LEARNABILITIES
from persyn.method.strategies import STRATEGIES
from persyn.router.inputs import needed_encoders

Identities: TypeAlias = Mapping[tuple[str, str | None], Identity]
"""Identities of models, by (model, revision)."""

#: Teacher columns that may change without creating a new version.
_DESCRIPTIVE = ("name", "family", "license", "params_b", "price_in", "price_out")
_NOT_DECISIVE = (*_DESCRIPTIVE, "gpus")
#: Fields of `sampling` without effect on greedy decoding.
_OF_SAMPLES = ("top_p", "top_k", "min_p")
#: Columns that say where something is, and those that identify its content.
_PLACES = {"model": "revision", "adapter": "adapter_revision"}


def identities(
    teachers: Sequence[TeacherTable],
    student: StudentTable | None = None,
    quality: QualityTable | Sequence[QualityTable] | None = None,
    strategy: StrategyTable | None = None,
    router: RouterTable | None = None,
) -> Identities:
    """Identify models, querying the hub and reading files if needed; raise `UsageError` listing all missing ones."""
    tables = [(table.model, table.revision) for table in teachers if ENGINES[table.engine].model == "weights"]
    if student is not None and ENGINES[student.engine].model:
        tables.append((student.model, student.revision))
    scorers = [] if quality is None else scorers_of(quality)
    tables += [(each.model, each.revision) for each in scorers if engines.loads_weights(each.kind, each.options)]
    looks: dict[tuple[str, str | None], Callable[[], Identity]] = {table: partial(identify, *table) for table in tables}
    if router is not None:
        looks |= {model: partial(look, *model) for model, look in models_of(router).items()}
    adapted = [(table.adapter, table.adapter_revision) for table in teachers if table.adapter]
    looks |= {each: partial(identify_adapter, *each) for each in adapted}
    functions: list[QualityTable | StrategyTable] = []
    functions += [each for each in scorers if ENGINES[each.kind].model == "function"]
    if strategy is not None and STRATEGIES[strategy.kind].decided_by == "function":
        functions.append(strategy)
    for function in functions:
        looks[function.model, function.revision] = partial(_of_function, function)
    found = _all(looks)
    if router is not None:
        _require_versions(router, found)
    return found


def models_of(router: RouterTable) -> dict[tuple[str, str | None], Identify]:
    """The models that a router reads as (model, revision), and what identifies them."""
    read = needed_encoders(router)
    found: dict[tuple[str, str | None], Identify] = {}
    if "backbone" in read:
        found[router.backbone, router.revision] = identify
    if "embedding" in read and router.embedding is not None:
        found[router.embedding, router.embedding_revision] = identify_embedding
    return found


def _require_versions(router: RouterTable, found: Identities) -> None:
    """Raise `UsageError` for a model of the router that is not the version that its table names."""
    named = {
        ("backbone", router.backbone, router.revision): router.version,
        ("embedding", router.embedding or "", router.embedding_revision): router.embedding_version,
    }
    for (what, model, revision), version in named.items():
        is_now = found.get((model, revision), UNKNOWN_IDENTITY).revision
        if version is not None and is_now is not None and version != is_now:
            raise UsageError(
                f"the {what} {model!r} is {is_now}, not {version}: restore it, or remove the version from the run file"
            )


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


def teacher_identity(table: TeacherTable, known: Identities) -> dict[str, Any]:
    """What determines a teacher's responses: equal for tables that describe the same teacher differently.

    Every field counts that is neither descriptive nor transport, and differs from its default. A model with known
    content is identified by it, wherever it is; a server's model by the name and the revision that the table gives.
    """
    if table.engine == IMPORTED:  # how the responses were generated is unknown
        return {"engine": table.engine, "model": table.model}
    said = transport.without_defaults(table)
    sampling = transport.without_defaults(table.sampling)
    if table.is_greedy:
        sampling = {name: value for name, value in sampling.items() if name not in _OF_SAMPLES}
    said |= {"engine": table.engine, "model": table.model.strip(), "sampling": sampling}
    said["options"] = transport.decisive(table.engine, table.options, table.gpus)
    said |= _teacher_version(table, known)
    by_content = ENGINES[table.engine].model == "weights"
    return _present({name: value for name, value in said.items() if name not in _NOT_DECISIVE}, by_content=by_content)


def teacher(session: Session, table: TeacherTable, known: Identities) -> int:
    """The id of a teacher's version; updates its descriptive columns."""
    row = msgspec.to_builtins(table) | _teacher_version(table, known) | prices(table)
    row["options"] = transport.decisive(table.engine, table.options, table.gpus)
    del row["gpus"]
    teacher_id = _register(session, Teacher, teacher_identity(table, known), row)
    said = {key: row[key] for key in _DESCRIPTIVE if row[key] is not None}
    columns = Teacher.__table__.c
    # Write only differences: a start that locks no row waits for no other start.
    differs = or_(*(columns[key].is_distinct_from(value) for key, value in said.items()))
    session.execute(update(Teacher).where(Teacher.id == teacher_id, differs).values(**said))
    return teacher_id


def prices(table: TeacherTable) -> dict[str, float | None]:
    """US dollars per million tokens that a teacher costs in a run, whose mode may be cheaper.

    A price that its table does not name is the engine's list price, if the engine has one.
    """
    share = 1.0
    if engines.batch_size(ModelSpec(table.engine, table.model, options=table.options)):
        share -= msgspec.convert(table.options, OpenAIOptions).batch_discount
    listed = {"price_in": table.price_in, "price_out": table.price_out}
    if None in listed.values():
        of_engine = zip(listed, ENGINES[table.engine].prices(table.model.strip()), strict=True)
        listed = {name: price if listed[name] is None else listed[name] for name, price in of_engine}
    return {name: None if price is None else price * share for name, price in listed.items()}


def _teacher_version(table: TeacherTable, known: Identities) -> dict[str, Any]:
    if ENGINES[table.engine].model == "weights":
        found = known[table.model, table.revision]
    else:
        found = Identity(table.revision, None)  # the user's own word for what a server serves
    adapter = known[table.adapter, table.adapter_revision].revision if table.adapter else None
    return {**_version(found), "adapter_revision": adapter}


def student(session: Session, table: StudentTable, known: Identities) -> Student:
    """The row of a student's version."""
    found = known[table.model, table.revision] if ENGINES[table.engine].model else UNKNOWN_IDENTITY
    row = {"name": table.name, "model": table.model} | _version(found)
    found_or_new = session.get_one(Student, _register(session, Student, _present(row, by_content=True), row))
    if found_or_new.model != table.model and not Path(found_or_new.model).exists():
        found_or_new.model = table.model  # the folder was moved
    return found_or_new


def learnability(session: Session, student: Student, table: StudentTable, definition: str = "log_likelihood") -> int:
    """The id of the scorer that computes log-likelihoods under a student, and what a definition of learnability needs.

    Where the student's scores were stored before PerSyn computed statistics, and the definition needs some, it is
    another scorer: the responses are scored again, and the old scores stay.
    """
    kind = LEARNABILITIES.require(definition, "learnability")
    chosen = {**table.options}
    if extra := {*kind.extra, *chosen.get("statistics", ())}:
        chosen["statistics"] = sorted(extra)
    found = _student_scorer(session, student, table, chosen)
    lacks = select(Score.response_id).where(
        Score.scorer_id == found, Score.value.is_not(None), Score.statistics.is_(None)
    )
    if kind.needs and session.scalar(lacks.limit(1)) is not None:
        return _student_scorer(
            session, student, table, chosen | {"statistics": [*chosen.get("statistics", ()), "tokens"]}
        )
    return found


def _student_scorer(session: Session, student: Student, table: StudentTable, chosen: Mapping[str, Any]) -> int:
    row = {
        "kind": table.engine,
        "model": student.model,
        "revision": student.revision,
        "options": transport.decisive(table.engine, chosen, table.gpus),
        "student_id": student.id,
    }
    return _register(session, Scorer, _present(row, by_content=True), row)


def likelihood(session: Session, model: str, revision: str | None, *, gpus: int, options: Mapping[str, Any]) -> int:
    """The id of the scorer that computes log-likelihoods under any identified model."""
    kind = "log_likelihood"
    row = {
        "kind": kind,
        "model": model,
        "revision": revision,
        "options": transport.decisive(kind, options, gpus),
    }
    return _register(session, Scorer, _present(row, by_content=True), row)


def quality(session: Session, table: QualityTable, known: Identities) -> int:
    """The id of a quality scorer's version."""
    reference = ENGINES[table.kind].reference(table.options)
    is_identified = reference in ("weights", "function")
    # The prompt wording is part of a judge's version.
    words = {"wording": judge.wording(table.options)} if ENGINES[table.kind].is_nested else {}
    row = {
        "kind": table.kind,
        "model": table.model,
        "revision": known[table.model, table.revision].revision if is_identified else table.revision,
        "options": transport.decisive(table.kind, table.options | words, table.gpus),
    }
    return _register(session, Scorer, _present(row, by_content=reference == "weights"), row)


def combined(session: Session, parts: Sequence[QualityPart], known: Identities) -> int:
    """The id of the scorer that combines others, which it names by their content; raise `UsageError` for equal ones."""
    ids = [quality(session, part, known) for part in parts]
    if len(set(ids)) < len(ids):
        twice = next(number for number, scorer_id in enumerate(ids) if scorer_id in ids[:number])
        raise UsageError(
            f"[[quality]] items {ids.index(ids[twice]) + 1} and {twice + 1} are the same scorer: {parts[twice].kind}, "
            "with the same model and options; remove one of them"
        )
    contents = [session.get_one(Scorer, scorer_id).fingerprint for scorer_id in ids]
    said = [{"scorer": content, "weight": part.weight} for content, part in zip(contents, parts, strict=True)]
    row = {"kind": COMBINED, "model": "", "revision": None, "options": {"parts": said}}
    return _register(session, Scorer, {"kind": COMBINED, "parts": said}, row)


def _present(columns: Mapping[str, Any], *, by_content: bool) -> dict[str, Any]:
    """Leave out empty values and, where the content is known, the place that it was found at.

    by_content: the model is a folder or a hub id.
    """
    places = [place for place, content in _PLACES.items() if by_content and columns.get(content)]
    return {name: value for name, value in columns.items() if value not in (None, "", [], {}) and name not in places}


def _version(found: Identity) -> dict[str, Any]:
    return {"revision": found.revision, "template_hash": found.template_hash}


def _register(session: Session, model: type[Base], decisive: dict[str, Any], row: dict[str, Any]) -> int:
    """The id of the row with this fingerprint, inserted if new; concurrent callers get the same row."""
    fingerprint = fingerprint_of(decisive)
    bulk.insert_new(session, model, [row | {"fingerprint": fingerprint}])
    columns: Any = model
    return int(session.scalars(select(columns.id).where(columns.fingerprint == fingerprint)).one())
