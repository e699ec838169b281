"""Load the saved queries that ship with PerSyn, one SQL file each.

A file begins with `-- asker: title`, followed by a line that says how to read the answer. The subject of a query is a
parameter: `:run`, `:prompt` or `:job`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from msgspec import Struct
from sqlalchemy import select
from sqlalchemy.orm import Session

from persyn.db.catalog import Prompt, Run
from persyn.db.work import Job
from persyn.errors import UsageError, shorten
from persyn.sql.tokens import parameters

#: The audiences, in display order.
ASKERS = ("operator", "engineer", "researcher")
#: Parameters: the column that holds their values, and where a user finds them.
_ABOUT: Mapping[str, tuple[Any, str]] = {
    "run": (Run.name, "'persyn run list' lists them"),
    "prompt": (Prompt.id, "rows of a dataset have their prompt_id"),
    "job": (Job.id, "'persyn jobs list RUN' lists them"),
}
#: A longer number cannot be an id.
_DIGITS = 19
_HEAD = re.compile(r"-- (?P<asker>\w+): (?P<title>.+)\n-- (?P<note>.+)\n(?P<sql>(?s:.+))")


class SavedQuery(Struct, frozen=True):
    """A saved query, with its usual audience."""

    name: str
    asker: str
    title: str
    #: How to read the answer.
    note: str
    sql: str
    #: Names of the parameters that need a value.
    parameters: list[str]


@cache
def queries() -> dict[str, SavedQuery]:
    """All saved queries by name, in display order."""
    found = [
        _read(file.name.removesuffix(".sql"), file.read_text()) for file in (files(__package__) / "queries").iterdir()
    ]
    return {
        question.name: question for question in sorted(found, key=lambda each: (ASKERS.index(each.asker), each.name))
    }


def find(name: str) -> SavedQuery:
    """The query of this name; raise `UsageError` if there is none."""
    known = queries()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    raise UsageError(f"there is no saved query named {name!r}; {meant}'persyn sql --list' lists them")


def require_there(session: Session, given: Mapping[str, str]) -> None:
    """Raise `UsageError` for a run, prompt or job that is not in the store."""
    for name, value in given.items():
        column, where = _ABOUT[name]
        is_id = column.type.python_type is int
        if is_id and not (value.isascii() and value.isdigit() and len(value) < _DIGITS):
            raise UsageError(f"{name} must be a number, got {shorten(value)!r}; {where}")
        if session.scalars(select(column).where(column == (int(value) if is_id else value))).one_or_none() is None:
            raise UsageError(f"there is no {name} {shorten(value)!r}; {where}")


def _read(name: str, text: str) -> SavedQuery:
    told = _HEAD.fullmatch(text)
    assert told is not None, f"{name}.sql does not begin with the header of a saved query"
    return SavedQuery(name, told["asker"], told["title"], told["note"], told["sql"].strip(), parameters(told["sql"]))
