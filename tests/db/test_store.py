"""The migrations create the schema of the models on both databases, and can be reverted."""

from __future__ import annotations

from pathlib import Path

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, select
from sqlalchemy.exc import DBAPIError, IntegrityError

from persyn.db import bulk
from persyn.db.catalog import Prompt
from persyn.db.connect import Database, alembic_config
from persyn.db.work import Event
from persyn.errors import UsageError


def head() -> str | None:
    return ScriptDirectory.from_config(alembic_config()).get_current_head()


def test_the_migrations_make_exactly_what_the_models_say(database: Database) -> None:
    with database.engine.begin() as connection:
        command.check(alembic_config(connection))  # raises if they differ


def test_upgrade_downgrade_upgrade_leaves_no_trace(database: Database) -> None:
    with database.engine.begin() as connection:
        command.downgrade(alembic_config(connection), "base")
        assert inspect(connection).get_table_names() == ["alembic_version"]
    database.upgrade()
    assert database.revision() == head()


def test_a_row_inserted_twice_is_there_once(database: Database) -> None:
    row = {"content_hash": "a" * 64, "text": "2+2?", "source": "x", "meta": {}}

    for _ in range(2):
        with database.write() as session:
            bulk.insert_new(session, Prompt, [row])

    with database.read() as session:
        assert session.scalars(select(Prompt.text)).all() == ["2+2?"]


def test_times_are_utc_and_aware(database: Database) -> None:
    with database.write() as session:
        bulk.insert_new(session, Event, [{"actor": "me", "to_state": "done", "detail": {}}])
    with database.read() as session:
        at = session.scalars(select(Event.at)).one()
    assert at.utcoffset() is not None
    assert at.utcoffset().total_seconds() == 0


def test_a_read_session_cannot_write(database: Database) -> None:
    row = {"content_hash": "a" * 64, "text": "2+2?", "source": "x", "meta": {}}
    with pytest.raises(DBAPIError), database.read() as session:
        bulk.insert_new(session, Prompt, [row])


def test_foreign_keys_are_enforced(database: Database) -> None:
    with pytest.raises(IntegrityError), database.write() as session:
        bulk.insert_new(session, Event, [{"actor": "me", "run_id": 7, "to_state": "done", "detail": {}}])


def test_a_database_that_is_not_there_yet_is_made(tmp_path: Path) -> None:
    store = Database(f"sqlite:///{tmp_path / 'new' / 'persyn.db'}")
    store.require_head()
    assert store.revision() == head()
    store.close()


def test_an_empty_file_is_made_a_store_and_a_file_of_somebody_else_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty.db").touch()
    store = Database(f"sqlite:///{tmp_path / 'empty.db'}")
    store.require_head()
    assert store.revision() == head()
    store.close()

    other = Database(f"sqlite:///{tmp_path / 'other.db'}")
    with other.engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE theirs (id INTEGER)")
    with pytest.raises(UsageError, match="contains no PerSyn store yet; 'persyn db upgrade' creates it"):
        other.require_head()
    other.close()


def test_an_unknown_revision_is_refused_with_what_to_do(database: Database) -> None:
    with database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(UsageError, match=r"9999.*created by a newer version"):
        database.require_head()


def test_a_password_never_shows_in_an_error() -> None:
    store = Database("postgresql+psycopg://me:secret@127.0.0.1:1/none")
    with pytest.raises(UsageError, match="cannot open the database") as caught:
        store.require_head()
    assert "secret" not in str(caught.value)
    store.close()
