"""The store: typed tables on SQLite and PostgreSQL."""

from persyn.db import catalog, results, spending, trained, work
from persyn.db.base import Base

__all__ = ["Base", "catalog", "results", "spending", "trained", "work"]
