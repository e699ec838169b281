"""Copy a whole store to another database, table by table, and compare both.

Nothing is written to the source meanwhile: a lock keeps writers out, and ends with this process. Each transaction in
the target also records how far the copy is, so that a copy that was killed goes on there, after it has compared what it
has with the source. Until the copy is complete, its revision keeps every other use away.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from msgspec import Struct
from sqlalchemy import BigInteger, Column, Connection, MetaData, String, Table, func, inspect, select, text, update
from sqlalchemy.orm import Session

from persyn.db import transfer
from persyn.db.base import Base
from persyn.db.connect import UNFINISHED_COPY, Database
from persyn.db.transfer import Digest, Row
from persyn.db.work import Leader
from persyn.errors import PersynError, UsageError
from persyn.operations import at_work

#: Size of a transaction in the target.
_ROWS, _BYTES = 5_000, 4 * 2**20
#: How far a copy is, in the target; dropped at the end. `sha256` is the digest of the first `rows` rows.
_COPIED = Table(
    "copied_tables",
    MetaData(),
    Column("name", String(100), primary_key=True),
    Column("rows", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
)

Progress = Callable[[str, int, int, str], object]
"""Called with what is done ("copied", then "compared"), the total of rows, how many are done, and the table."""


class StoreCopy(Struct, frozen=True):
    """A complete copy of a store: the rows of each table, equal in both, and the addresses without passwords."""

    source: str
    target: str
    rows: dict[str, int]


class _Content(Struct, frozen=True):
    """How many rows a table has, and their digest."""

    rows: int
    sha256: str


def copy_store(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, progress: Progress = lambda *_: None
) -> StoreCopy:
    """Copy all rows of a store to an empty database, SQLite or PostgreSQL, with their ids, and compare both.

    source, target: database URLs, or paths of SQLite files; a missing target file is created.

    Called again, it continues an unfinished copy of the same source. Files in PERSYN_HOME are not copied: use the same
    home with the copy. Raises `UsageError` if the source is not at this version's revision, workers hold jobs in it,
    or the target is not empty.
    """
    with closing(Database(_url(source))) as ours, closing(Database(_url(target))) as theirs:
        _require_source(ours, theirs)
        tables = _tables()
        _prepare(theirs, tables)
        with _frozen(ours, tables) as connection:
            total = sum(_count(connection, table) for table in tables)
            contents = _copy(connection, theirs, tables, lambda done, name: progress("copied", total, done, name))
            _compare(theirs, tables, contents, lambda done, name: progress("compared", total, done, name))
            _finish(theirs, tables)
    return StoreCopy(_shown(ours), _shown(theirs), {name: content.rows for name, content in contents.items()})


def _url(place: str | os.PathLike[str]) -> str:
    found = os.fspath(place)
    return found if "://" in found else f"sqlite:///{Path(found).absolute()}"


def _tables() -> list[Table]:
    """The tables in the order of their foreign keys; the dispatcher that leads is elected anew in the copy."""
    return [table for table in Base.metadata.sorted_tables if table is not Leader.__table__]


def _require_source(source: Database, target: Database) -> None:
    if source.url == target.url:
        raise UsageError("source and target are the same database")
    if not source.is_there():
        raise UsageError(f"there is no store to copy at {source.url.render_as_string(hide_password=True)}")
    source.require_head()


def _prepare(target: Database, tables: Sequence[Table]) -> None:
    """Create an empty store that is marked as an unfinished copy, unless there is one."""
    if target.url.get_backend_name() == "sqlite":
        Path(str(target.url.database)).parent.mkdir(parents=True, exist_ok=True)
    if target.is_there():
        if target.revision() == UNFINISHED_COPY:
            return
        target.require_head()
    elif strange := inspect(target.engine).get_table_names():
        raise _not_empty(target, strange[0])
    else:
        target.upgrade()
    with target.engine.begin() as connection:
        if (full := next((table.name for table in tables if _count(connection, table)), None)) is not None:
            raise _not_empty(target, full)
        _COPIED.create(connection)
        empty = [{"name": table.name, "rows": 0, "sha256": Digest(table).hexdigest()} for table in tables]
        connection.execute(_COPIED.insert(), empty)
        _stamp(connection, UNFINISHED_COPY)


def _not_empty(target: Database, table: str) -> UsageError:
    return UsageError(
        f"the target {_shown(target)} is not empty: it has the table {table}; give an empty database or a new file"
    )


def _shown(database: Database) -> str:
    return database.url.render_as_string(hide_password=True)


def _stamp(connection: Connection, revision: str) -> None:
    connection.execute(text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})


def _count(connection: Connection, table: Table) -> int:
    return connection.scalars(select(func.count()).select_from(table)).one()


@contextmanager
def _frozen(source: Database, tables: Sequence[Table]) -> Iterator[Connection]:
    """A transaction on the source in which nobody else can write, so that nothing is written that the copy lacks."""
    with source.engine.connect() as connection, connection.begin():  # on SQLite, this takes the lock
        if connection.dialect.name == "postgresql":
            connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
            connection.execute(text(f"LOCK TABLE {', '.join(table.name for table in tables)} IN SHARE MODE"))
        with Session(connection) as session:
            workers = at_work.workers(session)
        if workers:
            raise UsageError(
                f"{at_work.named(workers)} hold{'s' * (len(workers) == 1)} jobs in the source; stop the workers and "
                "open 'run start' and 'run resume' (Ctrl-C or SIGTERM: they save what is finished and give their jobs "
                "back), then copy the store. The lease of a worker that was killed on another host ends after 90 s"
            )
        yield connection


def _copy(
    source: Connection, target: Database, tables: Sequence[Table], progress: Callable[[int, str], object]
) -> dict[str, _Content]:
    """Copy what the target lacks of each table; return what the source has."""
    with target.engine.connect() as connection:
        were = {name: _Content(*content) for name, *content in connection.execute(select(_COPIED))}
    if were.keys() != {table.name for table in tables}:
        raise PersynError(
            f"{_shown(target)} is an unfinished copy by another version of PerSyn; give an empty database"
        )
    contents: dict[str, _Content] = {}
    before = 0
    for table in tables:
        for content in _copy_table(source, target, table, were[table.name]):
            contents[table.name] = content
            progress(before + content.rows, table.name)
        before += contents[table.name].rows
    return contents


def _copy_table(source: Connection, target: Database, table: Table, was: _Content) -> Iterator[_Content]:
    """Copy the rows of a table after the first `was.rows`; yields what is copied so far, and in the end what there is.

    Raises `PersynError` if the first ones are not those that were copied.
    """
    digest, now, size = Digest(table), was, 0
    rows: list[Row] = []
    count = 0
    for row in transfer.rows(source, table):
        if count == was.rows:
            _require_same(target, table, was, digest)
        size += digest.add(row)
        count += 1
        if count <= was.rows:
            size = 0
            if count % _ROWS == 0:
                yield _Content(count, was.sha256)  # so far, they are only compared
            continue
        rows.append(row)
        if len(rows) >= _ROWS or size >= _BYTES:
            now, rows, size = _store(target, table, rows, now, digest), [], 0
            yield now
    if count <= was.rows:
        _require_same(target, table, was if count == was.rows else _Content(was.rows, ""), digest)
    yield _store(target, table, rows, now, digest) if rows else now


def _require_same(target: Database, table: Table, was: _Content, digest: Digest) -> None:
    if digest.hexdigest() != was.sha256:
        raise PersynError(
            f"{_shown(target)} is an unfinished copy of another store, or the source has changed since: the first "
            f"{was.rows:,} rows of {table.name} differ; drop that database, and copy into an empty one"
        )


def _store(target: Database, table: Table, rows: Sequence[Row], was: _Content, digest: Digest) -> _Content:
    """Write rows, and how far the copy of their table is, in one transaction."""
    now = _Content(was.rows + len(rows), digest.hexdigest())
    mine = update(_COPIED).where(_COPIED.c.name == table.name, _COPIED.c.rows == was.rows)
    with target.engine.begin() as connection:
        if not connection.execute(mine.values(rows=now.rows, sha256=now.sha256)).rowcount:
            raise PersynError(f"another process copies into {_shown(target)} too; wait for it")
        transfer.write(connection, table, rows)
    return now


def _compare(
    target: Database, tables: Sequence[Table], contents: Mapping[str, _Content], progress: Callable[[int, str], object]
) -> None:
    """Read the copy; raise `PersynError` unless it has the rows and values of the source."""
    done = 0
    with target.engine.connect() as connection:
        for table in tables:
            digest, count = Digest(table), 0
            for count, row in enumerate(transfer.rows(connection, table), start=1):
                digest.add(row)
                if count % _ROWS == 0:
                    progress(done + count, table.name)
            if _Content(count, digest.hexdigest()) != contents[table.name]:
                raise PersynError(
                    f"the copy of table {table.name} has {count:,} rows and differs from the source, which has "
                    f"{contents[table.name].rows:,}; {_shown(target)} remains unfinished: drop it"
                )
            done += count
            progress(done, table.name)


def _finish(target: Database, tables: Sequence[Table]) -> None:
    """Make the copy a store that can be used."""
    with target.engine.begin() as connection:
        transfer.restart_sequences(connection, tables)
        if connection.dialect.name == "postgresql":
            connection.execute(text("ANALYZE"))  # or queries would be planned as for empty tables
        _COPIED.drop(connection)
        _stamp(connection, str(target.head))
