"""Rename a run, with what is named after it."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec.structs import replace
from sqlalchemy import select
from sqlalchemy.orm import Session

from persyn.config import Name, load_config
from persyn.dataset import export
from persyn.dataset.kinds import KINDS
from persyn.db import lookup, notes
from persyn.db.catalog import Run
from persyn.db.connect import Database
from persyn.db.work import Event
from persyn.errors import UsageError, shorten
from persyn.runs import start
from persyn.student import identity


def rename(database: Database, run_id: int, name: str, home: Path, *, actor: str) -> list[Path]:
    """Rename a run, also while it is worked; its datasets in `home` move to their new folders, which are returned.

    Raises `UsageError` for a name that is taken or invalid, or whose folder has a dataset. Trainings stay those of the
    run's dataset. After an interruption, the same call moves what is left.
    """
    try:
        name = msgspec.convert(name, Name)
    except msgspec.ValidationError as error:
        raise UsageError(f"{shorten(repr(name))} cannot be the name of a run: {error}") from error
    with database.write() as session:
        run = lookup.whole(session, run_id)
        was, is_renamed = run.name, run.name == name
        if is_renamed:
            was = _earlier_name(session, run)
        else:
            _require_free(session, name, home)
            _rename(session, run, name, actor)
    folders = [(export.default_folder(home, was, kind), export.default_folder(home, name, kind)) for kind in KINDS]
    return [_move(old, new) for old, new in folders if old.is_dir()]


def _earlier_name(session: Session, run: Run) -> str:
    """The name before a run's own; raise `UsageError` if it never had another, or if another run has that one now."""
    to_this = Event.run_id == run.id, Event.detail["renamed"].as_string() == run.name
    names = select(Event.detail["was"].as_string()).where(*to_this).order_by(Event.id.desc())
    was: str | None = session.scalars(names.limit(1)).first()
    if was is None or _is_taken(session, was):
        raise start.taken(run.name)
    return was


def _require_free(session: Session, name: str, home: Path) -> None:
    """Raise `UsageError` if another run has a name, or a dataset that was kept when its run was deleted."""
    if _is_taken(session, name):
        raise start.taken(name)
    for folder in (export.default_folder(home, name, kind) for kind in KINDS):
        if folder.exists():
            raise UsageError(f"there is a dataset in {folder} already; move it away, or choose another name")


def _is_taken(session: Session, name: str) -> bool:
    return session.scalars(select(Run.id).where(Run.name == name)).first() is not None


def _rename(session: Session, run: Run, name: str, actor: str) -> None:
    config = load_config(run.config)
    renamed = replace(config, run=replace(config.run, name=name))
    detail = {"renamed": name, "was": run.name}
    notes.note(session, run, detail, actor=actor)
    run.name, run.config, run.config_hash = name, renamed.frozen(), renamed.digest()
    start.write_name(session, run)
    identity.rename(session, run)


def _move(old: Path, new: Path) -> Path:
    """Move a dataset to the folder that the new name gives; the next export and training find it there."""
    if new.exists():
        raise UsageError(
            f"the run is renamed, but {old} was not moved, because there is a dataset in {new}; move that away, then: "
            f"persyn run rename {new.name} {new.name}"
        )
    return old.rename(new)
