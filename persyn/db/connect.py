"""Connect to the store, a SQLite file or PostgreSQL, and keep its schema at this code's revision."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import msgspec
from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.orm import Session

from persyn.errors import StoreUnavailable, UsageError

if TYPE_CHECKING:
    from alembic.config import Config

    from persyn.db.patience import Patience

#: The revision of a store that is being copied to; nothing else may use it until it is complete.
UNFINISHED_COPY = "unfinished copy"
_BUSY_SECONDS = 30
#: Both sides detect a vanished peer within a minute, so the server releases its locks.
_ALIVE = {
    "connect_timeout": 10,
    "keepalives_idle": 20,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
_SERVER_ALIVE = (
    "-c tcp_keepalives_idle=20 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3 -c tcp_user_timeout=60000"
)
#: The server ends a write transaction that stays idle for this long; a frozen client would keep its locks.
_IDLE_SECONDS = 60.0
#: The same for frequent writers that others wait for, and for transactions that compute between two statements.
BRISK_SECONDS, _THINKING_SECONDS = 5.0, 120
#: After this long without an answer, check whether the server is working or the connection is frozen.
_SILENCE_SECONDS = 15.0
_COMMON: dict[str, Any] = {
    "hide_parameters": True,  # errors are logged; prompts and responses must not be
    "json_serializer": lambda value: msgspec.json.encode(value).decode(),
    "json_deserializer": msgspec.json.decode,
}


class Database:
    """One store. Its sessions are short; none is open while a model computes.

    url:             SQLAlchemy URL: sqlite:///persyn.db or postgresql+psycopg://user@host/name.
    idle_seconds:    how long a write transaction may be idle between two statements before PostgreSQL ends it; a
                     frozen client keeps its locks for as long.
    silence_seconds: how long PostgreSQL may be silent before another connection checks whether it is working.
    """

    def __init__(
        self, url: str, *, idle_seconds: float = _IDLE_SECONDS, silence_seconds: float = _SILENCE_SECONDS
    ) -> None:
        self.url = _parse(url)
        self._ends_at = float("inf")
        self._patience: Patience | None = None
        #: Wraps the wait for another process's transaction, which may take a while; lets a caller report the wait.
        self.announce: Callable[[], AbstractContextManager[None]] = nullcontext
        if self.url.get_backend_name() == "sqlite":
            self.engine = _sqlite(self.url, query_only=False)
            event.listen(self.engine, "begin", self._begin)
            self._reader = _sqlite(self.url, query_only=True)
            event.listen(self._reader, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
        else:
            self.engine, self._patience = _postgresql(self.url, idle_seconds, silence_seconds)
            self._reader = self.engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session that commits at the end, or rolls back on an error."""
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A read-only session on one consistent snapshot; it never blocks a writer."""
        with Session(self._reader, expire_on_commit=False) as session, session.begin():
            if self._patience is not None:  # readers block nobody, and may write files between two rows
                session.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
            yield session

    def hurry(self, seconds: float) -> None:
        """Limit all waiting to `seconds` from now, because the process has to stop."""
        self._ends_at = min(self._ends_at, time.monotonic() + seconds)
        if self._patience is not None:
            self._patience.ends_at = self._ends_at

    @property
    def is_given_up(self) -> bool:
        """Whether the time limit set by `hurry` has passed."""
        return time.monotonic() > self._ends_at

    def _begin(self, connection: Connection) -> None:
        """Take the write lock at once: a transaction that reads first and writes later can fail without waiting."""
        with self.announce():
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()
        self._reader.dispose()

    def upgrade(self) -> None:
        """Upgrade the schema to this code's revision; creates the file if it is missing and loses no data.

        Raises `UsageError` for an unfinished copy.
        """
        if not self._is_new_file() and self.revision() == UNFINISHED_COPY:
            raise self._unfinished()
        from alembic import command  # takes a tenth of a second, and most commands upgrade nothing

        _in_transaction(self.engine, lambda config: command.upgrade(config, "head"))

    def is_there(self) -> bool:
        """Whether a store of any revision exists here; does not create one."""
        return not self._is_new_file() and self.revision() is not None

    def revision(self) -> str | None:
        """The schema's revision; None for an empty database."""
        with self._connect() as connection:
            if not inspect(connection).has_table("alembic_version"):
                return None
            return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()

    def require_head(self) -> None:
        """Raise `UsageError` unless the schema is at the revision this code was written for.

        A missing SQLite file is created. An empty one is being created by another process, which is waited for.
        """
        if self._is_new_file():
            Path(str(self.url.database)).parent.mkdir(parents=True, exist_ok=True)
            self.upgrade()
            return
        if self._is_file and self._is_empty():
            self.upgrade()
        found, head = self.revision(), self.head
        if found == head:
            return
        if found == UNFINISHED_COPY:
            raise self._unfinished()
        place = self.url.render_as_string(hide_password=True)
        if found is None:
            raise UsageError(f"the database {place} contains no PerSyn store yet; 'persyn db upgrade' creates it")
        if found in _revisions():
            raise UsageError(
                f"the database {place} is at revision {found}, this PerSyn needs {head}; run 'persyn db upgrade'"
            )
        raise UsageError(
            f"the database {place} is at revision {found}, which this PerSyn (at {head}) does not know; "
            "it was created by a newer version; install that version"
        )

    @property
    def head(self) -> str:
        """The revision this code was written for: that of the last migration, whose file is named after it."""
        return max(_revisions())

    def _unfinished(self) -> UsageError:
        place = self.url.render_as_string(hide_password=True)
        return UsageError(f"the database {place} is an unfinished copy of a store; 'persyn store copy' finishes it")

    @property
    def _is_file(self) -> bool:
        return self.url.get_backend_name() == "sqlite" and bool(self.url.database)

    def _is_new_file(self) -> bool:
        return self._is_file and not Path(str(self.url.database)).exists()

    def _is_empty(self) -> bool:
        """Whether the database has no tables."""
        with self._connect() as connection:
            return not inspect(connection).get_table_names()

    @contextmanager
    def _connect(self) -> Iterator[Connection]:
        try:
            with self._reader.connect() as connection:
                yield connection
        except DBAPIError as error:
            place = self.url.render_as_string(hide_password=True)
            reason = " ".join(str(error.orig).split())
            raise StoreUnavailable(
                f"cannot open the database {place}: {reason}; check its address (PERSYN_DATABASE_URL, or the argument "
                "url of persyn.open)"
            ) from error


def take_time(session: Session) -> None:
    """Allow the rest of a transaction to compute for longer between its statements, e.g. to plan a stage."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text(f"SET LOCAL idle_in_transaction_session_timeout = '{_THINKING_SECONDS}s'"))


@contextmanager
def scratch() -> Iterator[Database]:
    """An empty store at this code's revision in the system's temporary folder, deleted afterwards."""
    with TemporaryDirectory(prefix="persyn-") as folder:
        database = Database(f"sqlite:///{folder}/scratch.db")
        try:
            database.upgrade()
            yield database
        finally:
            database.close()


def alembic_config(connection: Connection | None = None) -> Config:
    """Alembic's configuration for the migrations of the installed package, with an optional connection."""
    config = _alembic()
    config.attributes["connection"] = connection
    return config


def _alembic() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(files("persyn.migrations")).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _in_transaction(engine: Engine, act: Any) -> None:
    # Batch migrations copy and drop tables; with foreign keys on, SQLite would delete the dependent rows.
    is_sqlite = engine.dialect.name == "sqlite"
    with engine.connect() as connection:
        if is_sqlite:
            connection.connection.driver_connection.execute("PRAGMA foreign_keys=OFF")  # type: ignore[union-attr]
        with connection.begin():
            act(alembic_config(connection))
            if is_sqlite and (broken := connection.exec_driver_sql("PRAGMA foreign_key_check").first()):
                raise UsageError(f"the migration would orphan a row: {tuple(broken)}; nothing was changed")
        if is_sqlite:
            connection.connection.driver_connection.execute("PRAGMA foreign_keys=ON")  # type: ignore[union-attr]


def _revisions() -> set[str]:
    versions = (files("persyn.migrations") / "versions").iterdir()
    return {file.name.partition("_")[0] for file in versions if file.name.endswith(".py")}


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
        parsed.get_dialect()
    except (ArgumentError, NoSuchModuleError) as error:
        raise UsageError(
            "invalid database URL; give sqlite:///persyn.db or postgresql+psycopg://user@host/name "
            "(PERSYN_DATABASE_URL, or the argument url of persyn.open)"
        ) from error
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise UsageError(
            f"the database URL names {parsed.get_backend_name()}; PerSyn supports only SQLite and PostgreSQL"
        )
    return parsed


def _postgresql(url: URL, idle_seconds: float, silence_seconds: float) -> tuple[Engine, Patience]:
    from persyn.db import patience

    limit = f"-c idle_in_transaction_session_timeout={int(idle_seconds * 1000)}"
    alive = {**_ALIVE, "options": f"{_SERVER_ALIVE} {limit}"}
    engine = create_engine(url, pool_pre_ping=True, connect_args=alive, **_COMMON)
    patient = patience.Patience(silence_seconds)
    patience.install(engine, patient)
    return engine, patient


def _sqlite(url: URL, *, query_only: bool) -> Engine:
    """A SQLite engine; the caller decides how its transactions begin."""
    engine = create_engine(url, connect_args={"timeout": _BUSY_SECONDS}, **_COMMON)

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # stop the driver from starting transactions itself
        for pragma in (
            "journal_mode=WAL",
            "synchronous=NORMAL",
            "foreign_keys=ON",
            "cache_size=-65536",
            f"query_only={'ON' if query_only else 'OFF'}",
        ):
            connection.execute(f"PRAGMA {pragma}")

    return engine
