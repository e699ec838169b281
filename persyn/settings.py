"""Read the environment variables into one frozen object."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from persyn.errors import UsageError


@dataclass(frozen=True)
class Settings:
    """Where this process finds its store and keeps its files; each field is a variable such as `PERSYN_HOME`."""

    #: URL of the store; `postgresql+psycopg://user@host/name` for PostgreSQL.
    database_url: str
    #: Folder for router checkpoints, datasets, trained students, cached features and engine logs.
    home: Path
    #: URL of Redis or Valkey, to use many hosts; without one, the process that starts a run executes it.
    broker_url: str | None = None
    #: How long a silent worker keeps its jobs; the same on every host.
    lease_seconds: float = 90.0
    #: How long a loading model may be silent before it counts as hung.
    load_seconds: float = 3600.0
    #: How long an engine with work may be silent before it counts as hung.
    stall_seconds: float = 600.0
    #: How long a loaded engine with work may return no result, even if it shows signs of life, before it is replaced
    #: and its jobs have a failed attempt; must exceed the longest response and, for a router, the whole fit. None:
    #: unlimited.
    result_seconds: float | None = None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read the variables; each has a default that works on a single machine."""
        home = Path(environ.get("PERSYN_HOME") or "persyn-data").absolute()
        return cls(
            database_url=environ.get("PERSYN_DATABASE_URL") or f"sqlite:///{home / 'persyn.db'}",
            home=home,
            broker_url=environ.get("PERSYN_BROKER_URL") or None,
            lease_seconds=_seconds(environ, "PERSYN_LEASE_SECONDS", cls.lease_seconds),
            load_seconds=_seconds(environ, "PERSYN_LOAD_SECONDS", cls.load_seconds),
            stall_seconds=_seconds(environ, "PERSYN_STALL_SECONDS", cls.stall_seconds),
            result_seconds=_seconds(environ, "PERSYN_RESULT_SECONDS", 0.0) or None,
        )


def _seconds(environ: Mapping[str, str], name: str, default: float) -> float:
    given = environ.get(name)
    if not given:
        return default
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if seconds <= 0:
        raise UsageError(f"{name} must be a number of seconds above zero, got {given!r}")
    return seconds
