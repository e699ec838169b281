"""A store is copied to another database with all its values, goes on there, and a copy that was killed is finished."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, text, update

from persyn.analysis.audit import audit
from persyn.db.base import Base
from persyn.db.catalog import Prompt, Run, RunState
from persyn.db.connect import Database
from persyn.db.results import Response, Score
from persyn.db.time import now
from persyn.db.work import Event, Job, JobState, Leader, RateLimit
from persyn.errors import PersynError, UsageError
from persyn.jobs import queue
from persyn.operations import copying
from persyn.operations.copying import copy_store
from persyn.settings import Settings
from persyn.workers.runner.worker import Worker
from tests.factories import make_job, make_prompt, make_response, make_router, make_run, make_scorer
from tests.one_database import POSTGRESQL
from tests.postgres import Postgres
from tests.run_files import PROMPTS, write_run

CONCURRENCY = 4


@pytest.fixture
def empty(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[str], str]]:
    """Makes the URL of an empty database of a kind."""
    names: list[str] = []

    def make(kind: str) -> str:
        if kind == "sqlite":
            return f"sqlite:///{tmp_path / 'new' / f'{uuid.uuid4().hex}.db'}"
        server: Postgres = request.getfixturevalue("postgres")
        names.append(f"t{uuid.uuid4().hex}")
        return server.create(names[-1])

    yield make
    for name in names:
        request.getfixturevalue("postgres").drop(name)


@pytest.fixture
def sqlite(tmp_path: Path, migrated: Path) -> Iterator[Database]:
    """A SQLite store."""
    shutil.copy(migrated, tmp_path / "persyn.db")
    store = Database(f"sqlite:///{tmp_path / 'persyn.db'}")
    yield store
    store.close()


def other(kind: str) -> str:
    return "postgresql" if kind == "sqlite" else "sqlite"


def fill(database: Database, *, prompts: int = 20) -> None:
    """A run with rows in most tables, and values that databases store differently."""
    odd = {
        "ß": "\u2028\U0001f600",
        "b": [1, 1.0, 1e16, -0.0, 2**60, 0.1, None, True],
        "a": {"z": "", "a": "\\u0000"},
    }
    with database.write() as session:
        made = make_run(session, prompts=prompts)
        job = make_job(session, made.id, teacher_id=made.teacher_ids[0])
        make_prompt(
            session, 'quo"te\r\n\ttab \\N \\ \x01\x7f\ufeff\u0301 \U0010ffff' + "x" * 100_000, meta=odd, history=[odd]
        )
        for place, prompt_id in enumerate(made.prompt_ids):
            response = make_response(
                session, prompt_id, made.teacher_ids[0], f"{place} \u0416", job_id=job, seed=2**62 + place
            )
            value = [-0.0, 5e-324, 0.1, -1.7976931348623157e308, math.inf][place % 5]
            session.add(Score(response_id=response, scorer_id=make_scorer(session, "fake"), value=value, detail=odd))
        make_router(session, made, metrics=odd)
        session.add(Event(actor="me", to_state="x", detail={}, at=datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)))
        moment = datetime(2026, 10, 25, 1, 30, tzinfo=UTC)
        for account in ("a", "B", "ä", "_", "Z"):  # in another order in most languages
            session.add(
                RateLimit(account=account, requests_until=moment, tokens_until=moment + timedelta(microseconds=1))
            )
        session.add(Leader(id=1, owner="dispatcher", fence=7, lease_until=moment))


def content(database: Database) -> dict[str, list[Any]]:
    """All rows, by value."""
    with database.read() as session:
        found = {}
        for table in Base.metadata.sorted_tables:
            if table.name != "leader":
                rows = [tuple(row) for row in session.execute(select(table))]
                found[table.name] = sorted(rows, key=lambda row: str(row[: len(table.primary_key.columns)]))
        return found


def test_a_copy_has_every_value_and_can_be_written_to(
    database: Database, database_url: str, empty: Callable[[str], str]
) -> None:
    fill(database)
    seen: list[tuple[str, int, int]] = []
    target = empty(other(database.engine.dialect.name))

    found = copy_store(database_url, target, progress=lambda what, total, done, table: seen.append((what, total, done)))

    copy = Database(target)
    copy.require_head()
    was, now_ = content(database), content(copy)
    assert {name: rows for name, rows in now_.items() if rows != was[name]} == {}
    assert found.rows == {name: len(rows) for name, rows in was.items()}
    assert (found.rows["responses"], found.rows["scores"], found.rows["rate_limits"]) == (20, 20, 5)
    total = sum(found.rows.values())
    assert [each for each in seen if each[2] == total][-1] == ("compared", total, total)
    with copy.write() as session:
        largest = session.scalars(select(func.max(Prompt.id))).one()
        assert make_prompt(session, "a new one") == largest + 1
        assert session.scalars(select(func.count()).select_from(Leader)).one() == 0  # a dispatcher is elected anew
    with pytest.raises(UsageError, match=r"is not empty: it has the table \w+"):
        copy_store(database_url, target)
    copy.close()


def test_a_run_is_copied_while_it_is_half_done_and_finished_in_the_copy(
    sqlite: Database, empty: Callable[[str], str], tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    options = {"latency_seconds": 0.2, "concurrency": CONCURRENCY, "journal": str(journal)}
    file = write_run(tmp_path, strategy="random", teachers=("ada", "bob"), options=options)
    with worked(sqlite, file) as kill:
        while len(asked(journal)) < PROMPTS / 2:
            time.sleep(0.01)
        kill()
    with sqlite.read() as session:
        before = session.scalars(select(func.count(Response.id))).one()
        assert 0 < before < PROMPTS
        assert JobState.RUNNING in set(session.scalars(select(Job.state)))

    target = empty("postgresql")
    copy_store(str(sqlite.url), target)

    copy = Database(target)
    with copy.read() as session:
        run_id = session.scalars(select(Run.id)).one()
    Worker(copy, Settings.from_environment({"PERSYN_HOME": str(tmp_path / "home")}), run_id=run_id).run()
    with copy.read() as session:
        run = session.get_one(Run, run_id)
        assert run.state is RunState.DONE
        assert session.scalars(select(func.count(Response.text))).one() == PROMPTS
        assert list(audit(session, run)) == []
    taken = asked(journal)
    assert len(set(taken)) == PROMPTS
    assert len(taken) - PROMPTS <= 2 * CONCURRENCY  # what was in flight when the worker was killed
    copy.close()


@contextmanager
def worked(store: Database, file: Path) -> Iterator[Callable[[], None]]:
    """Start a run in another process; yields a function that kills it with its engines."""
    where = {"PERSYN_DATABASE_URL": str(store.url), "PERSYN_HOME": str(file.parent / "home")}
    command = [sys.executable, "-m", "persyn.cli", "run", "start", str(file)]
    process = subprocess.Popen(command, env=os.environ | where, stderr=subprocess.DEVNULL, start_new_session=True)

    def kill() -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    try:
        yield kill
    finally:
        kill()


def asked(journal: Path) -> list[tuple[str, str]]:
    if not journal.exists():
        return []
    return [tuple(json.loads(line)) for line in journal.read_text().splitlines() if line.endswith('"]')]


KILLED = """
import os, signal, sys
from persyn.operations import copying
copying._ROWS = 3
steps = int(sys.argv[3])
def progress(what, total, done, table):
    global steps
    steps -= 1
    if not steps:
        os.kill(os.getpid(), signal.SIGKILL)
copying.copy_store(sys.argv[1], sys.argv[2], progress=progress)
"""


def test_a_copy_that_is_killed_goes_on_where_it_stopped(sqlite: Database, empty: Callable[[str], str]) -> None:
    fill(sqlite, prompts=30)
    target = empty("postgresql")
    total = sum(map(len, content(sqlite).values()))
    reached = 0
    for steps in (1, 30, 70):  # the last is killed while it compares
        killed = subprocess.run([sys.executable, "-c", KILLED, str(sqlite.url), target, str(steps)], check=False)
        assert killed.returncode == -signal.SIGKILL
        with closing(Database(target)) as copy, copy.engine.connect() as connection:
            rows = connection.scalar(text("SELECT sum(rows) FROM copied_tables"))
            stored = sum(connection.scalar(text(f"SELECT count(*) FROM {table.name}")) for table in copying._tables())
        assert rows == stored >= reached
        reached = stored
    assert 0 < reached == total

    found = copy_store(str(sqlite.url), target)

    assert sum(found.rows.values()) == total
    copy = Database(target)
    copy.require_head()
    assert content(copy) == content(sqlite)
    copy.close()


def interrupted(source: Database, target: str, monkeypatch: pytest.MonkeyPatch, *, table: str = "responses") -> None:
    """Copy up to the first rows of a table."""

    def stop(what: str, total: int, done: int, name: str) -> None:
        if name == table and done:
            raise KeyboardInterrupt

    monkeypatch.setattr(copying, "_ROWS", 3)
    with pytest.raises(KeyboardInterrupt):
        copy_store(str(source.url), target, progress=stop)


def test_an_unfinished_copy_is_no_store(
    sqlite: Database, empty: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(sqlite)
    target = empty("sqlite")
    interrupted(sqlite, target, monkeypatch)
    copy = Database(target)
    for use in (copy.require_head, copy.upgrade):
        with pytest.raises(UsageError, match="is an unfinished copy of a store; 'persyn store copy' finishes it"):
            use()
    copy.close()


@pytest.mark.parametrize(
    "change", ["UPDATE prompts SET answer = 'new' WHERE id = 2", "DELETE FROM responses WHERE id < 3"]
)
def test_a_copy_of_a_source_that_has_changed_is_not_continued(
    sqlite: Database, empty: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    fill(sqlite)
    target = empty("sqlite")
    interrupted(sqlite, target, monkeypatch)
    with sqlite.write() as session:
        session.execute(text(change))
    with pytest.raises(
        PersynError, match=r"or the source has changed since: the first \d+ rows of (prompts|responses) differ"
    ):
        copy_store(str(sqlite.url), target)


def test_nobody_writes_to_the_source_meanwhile(
    database: Database, database_url: str, empty: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(database)
    monkeypatch.setattr(copying, "_ROWS", 3)
    is_written, writer = threading.Event(), threading.Thread()
    during: list[bool] = []

    def write() -> None:
        with database.write() as session:
            session.execute(update(Run).values(priority=1))
        is_written.set()

    def progress(what: str, total: int, done: int, table: str) -> None:
        nonlocal writer
        if writer.ident is None:
            writer = threading.Thread(target=write)
            writer.start()
        during.append(is_written.wait(0.02))

    copy_store(database_url, empty("sqlite"), progress=progress)
    writer.join()
    assert during
    assert not any(during)


def test_values_that_the_target_cannot_store_are_named(
    sqlite: Database, empty: Callable[[str], str], tmp_path: Path
) -> None:
    with sqlite.write() as session:
        make_prompt(session, "fine")
        bad = make_prompt(session, "nul \0 here")
    with pytest.raises(
        PersynError, match=rf"table prompts .*: column text of the row with id {bad} has a NUL character"
    ):
        copy_store(str(sqlite.url), empty("postgresql"))
    with sqlite.write() as session:
        session.execute(update(Prompt).where(Prompt.id == bad).values(text="x", meta={"a": ["\0"]}))
    with pytest.raises(PersynError, match=rf"column meta of the row with id {bad} has a NUL character"):
        copy_store(str(sqlite.url), empty("postgresql"))


@POSTGRESQL  # SQLite stores none
def test_a_value_that_is_not_a_number_is_not_made_null(empty: Callable[[str], str], database: Database) -> None:
    fill(database)
    with database.write() as session:
        session.execute(update(Score).where(Score.response_id == 1).values(value=math.nan))
    with pytest.raises(PersynError, match=r"column value of the row with response_id 1, scorer_id \d+ is not a number"):
        copy_store(database.url.render_as_string(hide_password=False), empty("sqlite"))


def test_a_copy_that_differs_is_found(
    sqlite: Database, empty: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(sqlite)
    target = empty("sqlite")

    def spoil(what: str, total: int, done: int, table: str) -> None:
        if what == "copied" and done == total:
            with closing(Database(target)) as copy, copy.engine.begin() as connection:
                connection.execute(text("UPDATE scores SET value = value + 1 WHERE response_id = 3"))

    with pytest.raises(PersynError, match="the copy of table scores has 20 rows and differs from the source"):
        copy_store(str(sqlite.url), target, progress=spoil)


def test_a_lease_of_a_live_worker_is_refused_and_an_expired_one_is_not(
    sqlite: Database, empty: Callable[[str], str]
) -> None:
    with sqlite.write() as session:
        run = make_run(session)
        make_job(session, run.id)
        queue.claim(session, owner="far/1/2/x")
    with pytest.raises(UsageError, match=r"far:1 holds jobs in the source"):
        copy_store(str(sqlite.url), empty("sqlite"))
    with sqlite.write() as session:
        session.execute(update(Job).values(lease_until=now(timedelta(seconds=-1))))
    assert copy_store(str(sqlite.url), empty("sqlite")).rows["jobs"] == 1


def test_only_a_store_of_this_version_is_copied(sqlite: Database, empty: Callable[[str], str], tmp_path: Path) -> None:
    target = empty("sqlite")
    with pytest.raises(UsageError, match="there is no store to copy at"):
        copy_store(tmp_path / "none.db", target)
    assert not (tmp_path / "none.db").exists()
    with pytest.raises(UsageError, match="source and target are the same database"):
        copy_store(str(sqlite.url), str(sqlite.url))
    with sqlite.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0021'"))
    with pytest.raises(UsageError, match="is at revision 0021, this PerSyn needs"):
        copy_store(str(sqlite.url), target)
