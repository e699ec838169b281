"""Routers as files: export that of a run, import it into a store, and start runs that use it without calibration.

A file is a zip archive without compression: `learned.json`, what the router was fitted to, and in `checkpoint/` the
safetensors and JSON of its checkpoint.
"""

from __future__ import annotations

import os
import shutil
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import msgspec
from msgspec import Struct, structs
from sqlalchemy import select
from sqlalchemy.orm import Session

from persyn.atomic import replaced
from persyn.config import EncoderName, RouterTable, fingerprint_of, load_config
from persyn.db import bulk, lookup
from persyn.db.catalog import Run, Scorer, Student, Teacher
from persyn.db.connect import Database
from persyn.db.results import Router
from persyn.errors import HostLacks, UsageError
from persyn.method.verdict import Outcome
from persyn.runs.same_run import Difference, differences
from persyn.stages import verdict

_LEARNED, _CHECKPOINT = "learned.json", "checkpoint"
#: The beginning of a router's fingerprint by which a run file names it.
ID_LENGTH = 16
#: Differences named in an error, and bytes copied at once.
_MOST, _PIECE = 6, 1 << 20
#: A time for all members of an archive, so that equal routers are equal files.
_TIME = (1980, 1, 1, 0, 0, 0)
#: Columns that say what determines a model's results.
_OF_TEACHER = (
    *("name", "engine", "model", "revision", "options", "sampling", "system", "few_shot", "response_schema"),
    *("adapter", "adapter_revision", "template_hash", "fingerprint"),
)
_OF_STUDENT = ("name", "model", "revision", "template_hash", "fingerprint")
_OF_SCORER = ("kind", "model", "revision", "options", "fingerprint")
#: Keys of [run] that define the reward, and those of them that count at alpha 0.
_REWARD = ("alpha", "normalise", "learnability", "learnability_per", "learnability_on")
_WITHOUT_LEARNABILITY = ("alpha", "normalise")
#: What reading raises for a file that is no archive or damaged, with members that `zipfile` does not know.
_DAMAGE = OSError, EOFError, KeyError, RuntimeError, ValueError, zipfile.BadZipFile, msgspec.MsgspecError


class _Reads(Struct, frozen=True):
    """What a router reads, among its metrics."""

    encoders: list[EncoderName] = msgspec.field(default_factory=lambda: ["backbone"])
    features: list[str] = []
    embedding: str | None = None
    embedding_version: str | None = None


class LearnedRouter(Struct, frozen=True, forbid_unknown_fields=True):
    """Columns of a router's row that do not depend on its store."""

    backbone: str
    revision: str | None
    kind: str
    tune: str
    options: dict[str, Any]
    metrics: dict[str, Any]
    #: Of the checkpoint.
    sha256: str

    def __post_init__(self) -> None:
        """Raise `msgspec.ValidationError` for metrics that do not say what it reads."""
        msgspec.convert(self.metrics, _Reads)


class Learned(Struct, frozen=True, forbid_unknown_fields=True):
    """What a router was fitted to, and the verdict on it."""

    #: In head order.
    teachers: list[dict[str, Any]]
    #: None at alpha 0, where the student has no say.
    student: dict[str, Any] | None
    quality: list[dict[str, Any]]
    reward: dict[str, Any]
    router: LearnedRouter
    #: The verdict; why there is none; places of the teachers, best first.
    verdict: Outcome | Literal["none"]
    why: str | None
    ranking: list[int]

    def __post_init__(self) -> None:
        """Raise `ValueError` for a ranking of other teachers."""
        if sorted(self.ranking) != list(range(len(self.teachers))):
            raise ValueError(f"the ranking is not one of {len(self.teachers)} teachers")


def export(session: Session, run: Run, file: Path, home: Path) -> Learned:
    """Write a run's router to a file, which must not exist.

    home: the folder that the path of its checkpoint is relative to.
    Raises `UsageError` for a run without a router that can be exported, and for a checkpoint that is not as it was
    fitted.
    """
    from persyn.router import checkpoint  # brings torch

    router = session.get(Router, run.router_id) if run.router_id is not None else None
    if router is None or load_config(run.config).router.engine == "fake":
        raise UsageError(f"run {run.name!r} has no router that could be exported")
    folder = home / router.path
    if checkpoint.sha256(folder) != router.sha256:
        raise UsageError(f"the router in {str(folder)!r} is missing or has changed since it was fitted; restore it")
    learned = _of_run(session, run, router)
    unfinished = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.unfinished")
    try:
        with zipfile.ZipFile(unfinished, "x") as archive:
            archive.writestr(zipfile.ZipInfo(_LEARNED, _TIME), msgspec.json.encode(learned, order="sorted"))
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                name = f"{_CHECKPOINT}/{path.relative_to(folder).as_posix()}"
                with path.open("rb") as source, archive.open(zipfile.ZipInfo(name, _TIME), "w", force_zip64=True) as to:
                    shutil.copyfileobj(source, to, _PIECE)
        os.link(unfinished, file)  # fails if there is one, unlike a rename
    except FileExistsError:
        raise UsageError(f"{file} exists; give another name, or remove it") from None
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return learned


def _of_run(session: Session, run: Run, router: Router) -> Learned:
    identity = _identity(session, run)
    if router.learned is not None:
        return structs.replace(msgspec.convert(router.learned, Learned), **identity)
    decided, ids = verdict.decision(session, run), [teacher.id for teacher in lookup.teachers(session, run.id)]
    if decided is None:
        raise UsageError(
            f"run {run.name!r} has no verdict on its router yet, which is decided when it assigns prompts; export the "
            "router when it has come so far (a run that an earlier version started has none)"
        )
    ranking = [ids.index(teacher_id) for teacher_id in decided.ranking]
    of_verdict = {"verdict": decided.verdict, "why": decided.why, "ranking": ranking}
    return msgspec.convert({**identity, **of_verdict, "router": router}, Learned, from_attributes=True)


def _identity(session: Session, run: Run) -> dict[str, Any]:
    """The teachers and the reward of a run: the fields of `Learned` that must agree where a router is used."""
    table = load_config(run.config).run
    is_learnable = table.alpha > 0
    ids = [run.quality_scorer_id, *(each.id for each in lookup.quality_scorers(session, run))]
    ids += [run.learnability_scorer_id] if is_learnable and run.learnability_scorer_id is not None else []
    student = session.get(Student, run.student_id) if is_learnable and run.student_id is not None else None
    return {
        "teachers": [_columns(row, _OF_TEACHER) for row in lookup.teachers(session, run.id)],
        "student": None if student is None else _columns(student, _OF_STUDENT),
        "quality": [_columns(session.get_one(Scorer, each), _OF_SCORER) for each in dict.fromkeys(ids)],
        "reward": {name: getattr(table, name) for name in (_REWARD if is_learnable else _WITHOUT_LEARNABILITY)},
    }


def _columns(row: Teacher | Student | Scorer, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(row, name) for name in names}


def read(file: Path) -> Learned:
    """What the router of a file was fitted to; raise `UsageError` for a file that is not an exported router."""
    with _opened(file) as archive:
        return msgspec.json.decode(archive.read(_LEARNED), type=Learned)


@contextmanager
def _opened(file: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive with the members of an exported router; `UsageError` if it is another file, or damaged."""
    if not file.is_file():
        raise UsageError(f"there is no file {file}")
    try:
        with zipfile.ZipFile(file) as archive:
            _require_parts(archive, file)
            yield archive
    except _DAMAGE as error:
        raise UsageError(
            f"{file} cannot be imported: {error}; give a file that 'persyn router export' has written, undamaged"
        ) from error


def _require_parts(archive: zipfile.ZipFile, file: Path) -> None:
    members = archive.infolist()
    if strange := [member.filename for member in members if not _is_part(member)]:
        raise UsageError(f"{file} contains {strange[0]!r}, which is not part of an exported router")
    names = {member.filename for member in members}
    # Members that share their bytes could be far larger than the file.
    if len(names) != len(members) or sum(member.file_size for member in members) > file.stat().st_size:
        raise UsageError(f"{file} contains a part twice, which no exported router does")


def _is_part(member: zipfile.ZipInfo) -> bool:
    """Whether a member can be part of an exported router: none is a folder, compressed or encrypted."""
    parts = PurePosixPath(member.filename).parts
    is_of_checkpoint = parts[:1] == (_CHECKPOINT,) and len(parts) > 1 and ".." not in parts
    is_plain = not member.is_dir() and member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1
    return is_plain and (is_of_checkpoint or member.filename == _LEARNED)


def import_from(database: Database, file: Path, home: Path) -> str:
    """Store the router of a file, with its checkpoint in the home's `routers/`; return its id.

    Importing it twice changes nothing. Raises `UsageError` for a file that is not an exported router, or not as it was
    exported.
    """
    learned = msgspec.to_builtins(read(file))
    router = learned["router"]
    fingerprint = fingerprint_of(["imported", learned])
    wanted = select(Router).where(Router.fingerprint == fingerprint)
    with database.read() as session:
        known = session.scalars(wanted).one_or_none()
    path = f"routers/{fingerprint[:ID_LENGTH]}-imported"
    if known is None or not (home / known.path).is_dir():
        _unpack(file, home / path, router["sha256"])
        row = {**router, "fingerprint": fingerprint, "teacher_ids": [], "path": path, "learned": learned}
        with database.write() as session:
            bulk.insert_new(session, Router, [row])
    return fingerprint[:ID_LENGTH]


def _unpack(file: Path, folder: Path, sha256: str) -> None:
    """Write the checkpoint of a file into a folder, replacing an earlier one."""
    from persyn.router import checkpoint  # brings torch

    with replaced(folder) as new, _opened(file) as archive:
        for member in archive.infolist():
            if member.filename != _LEARNED:
                path = new / PurePosixPath(member.filename).relative_to(_CHECKPOINT)
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, path.open("xb") as to:
                    shutil.copyfileobj(source, to, _PIECE)
        try:
            checkpoint.read_manifest(new)
        except HostLacks as error:
            raise UsageError(f"{file}: {error}") from None
        if checkpoint.sha256(new) != sha256:
            raise UsageError(f"{file} is damaged: its checkpoint is not the one that was exported; export it again")


def find(session: Session, given: str) -> Router:
    """The imported router with this id; `UsageError` names those that there are."""
    routers = session.scalars(select(Router).where(Router.learned.is_not(None)).order_by(Router.id)).all()
    found = [row for row in routers if row.fingerprint[:ID_LENGTH] == given]
    if len(found) != 1:
        known = ", ".join(row.fingerprint[:ID_LENGTH] for row in routers) or "none"
        raise UsageError(
            f"[router] fitted: no router {given!r} was imported into this store; imported: {known}. 'persyn router "
            "import FILE' imports one"
        )
    return found[0]


def table(session: Session, given: RouterTable) -> RouterTable:
    """The table of a router that was fitted before, with everything that determines its scores."""
    if given.fitted is None:
        return given
    row = find(session, given.fitted)
    reads = msgspec.convert(row.metrics, _Reads)
    return structs.replace(
        given,
        kind=row.kind,
        encoders=reads.encoders,
        features=reads.features,
        backbone=row.backbone or given.backbone,
        version=row.revision,
        embedding=reads.embedding or None,
        embedding_version=reads.embedding_version,
    )


def use(session: Session, run: Run) -> None:
    """Let a new run use the router that its file names, and decide on the verdict that came with it.

    Raises `UsageError` with each difference between what the router was fitted to and the run.
    """
    given = load_config(run.config).router.fitted
    if given is None:
        return
    router = find(session, given)
    learned = msgspec.convert(router.learned, Learned)
    if found := list(_differences(msgspec.to_builtins(learned), _identity(session, run))):
        more = f"; and {len(found) - _MOST} more" if len(found) > _MOST else ""
        raise UsageError(
            f"[router] fitted: router {given} was fitted to other teachers or another reward: "
            f"{'; '.join(map(str, found[:_MOST]))}{more}. Use the same, or remove the key, so that a router is fitted"
        )
    ids = [teacher.id for teacher in lookup.teachers(session, run.id)]
    run.router_id, router.teacher_ids = router.id, ids
    session.flush()
    verdict.record(session, run, learned.verdict, learned.why, [ids[place] for place in learned.ranking])


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    """What differs between two identities; versions with equal fingerprints are equal, wherever their models are."""
    for name in ("teachers", "student", "quality", "reward"):
        one, other = was[name], now[name]
        if not isinstance(one, list) or len(one) != len(other):
            yield from _of_part(one, other, name)
            continue
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from _of_part(*pair, f"{name}[{number}]")


def _of_part(one: Any, other: Any, place: str) -> list[Difference]:
    has_version = isinstance(one, dict) and isinstance(other, dict) and "fingerprint" in one
    if has_version and one["fingerprint"] == other["fingerprint"]:
        return []
    found = differences(one, other, place)
    said = [each for each in found if not each.key.endswith((".fingerprint", ".name"))]
    return said or found
