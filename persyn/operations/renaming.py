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
from persyn.db import bulk, lookup
from persyn.db.catalog import Run
from persyn.db.connect import Database
from persyn.db.work import Event
from persyn.errors import UsageError, shorten
from persyn.student import identity


def rename(database: Database, run_id: int, name: str, home: Path, *, actor: str) -> list[Path]:
    """Rename a run, also while it is worked; its datasets in `home` move to their new folders, which are returned.

    Raises `UsageError` for a name that is taken or invalid. Trainings stay those of the run's dataset.
    """
    try:
        name = msgspec.convert(name, Name)
    except msgspec.ValidationError as error:
        raise UsageError(f"{shorten(repr(name))} cannot be the name of a run: {error}") from error
    with database.write() as session:
        run = lookup.whole(session, run_id)
        was = run.name
        if session.scalars(select(Run.id).where(Run.name == name)).first() is not None:
            raise UsageError(f"there is a run named {name!r} already; 'persyn run list' lists the runs")
        _rename(session, run, name, actor)
    return [moved for kind in KINDS if (moved := _move(home, was, name, kind)) is not None]


def _rename(session: Session, run: Run, name: str, actor: str) -> None:
    config = load_config(run.config)
    renamed = replace(config, run=replace(config.run, name=name))
    detail = {"renamed": name, "was": run.name}
    event = {"actor": actor, "run_id": run.id, "from_state": run.state, "to_state": run.state, "detail": detail}
    bulk.insert_new(session, Event, [event])
    run.name, run.config, run.config_hash = name, renamed.frozen(), renamed.digest()
    session.flush()
    identity.rename(session, run)


def _move(home: Path, was: str, name: str, kind: str) -> Path | None:
    """Move a dataset to the folder that the new name gives; the next export and training find it there."""
    old, new = (export.default_folder(home, run, kind) for run in (was, name))
    if not old.is_dir() or new.exists():
        return None
    return old.rename(new)
