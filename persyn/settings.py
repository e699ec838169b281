"""What the environment says, read once into one frozen object."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Settings:
    """Where this process finds its store and keeps its files."""

    #: PERSYN_DATABASE_URL. The default is a file beside the data, for one machine.
    database_url: str
    #: PERSYN_HOME: router checkpoints, datasets and engine logs.
    home: Path

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read the variables; each has a default that works on one machine."""
        home = Path(environ.get("PERSYN_HOME") or "persyn-data").absolute()
        return cls(database_url=environ.get("PERSYN_DATABASE_URL") or f"sqlite:///{home / 'persyn.db'}", home=home)
