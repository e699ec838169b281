"""Define what file readers yield: records, or the reason why one cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

#: Limit on a line or CSV cell; without it, one would be read into memory whole.
MAX_BYTES = 16 * 2**20

Record: TypeAlias = dict[str, Any]
"""One row: plain JSON values by field name."""


@dataclass(frozen=True, slots=True)
class UnreadableRecord:
    """An unreadable record, with the reason."""

    reason: str
    #: Rows lost with it, including itself; at most the number of its lines.
    rows: int = 1
    #: See `Flaw`.
    advice: str = ""


Numbered: TypeAlias = tuple[int, Record | UnreadableRecord]
"""A record with its first line (JSONL, CSV) or its row number (JSON, Parquet), counted from 1."""


class Flaw(Exception):
    """A defect of a row.

    advice: what to do about every row with this defect.
    names:  values of --map, FIELD=NAME, that would correct it.
    """

    def __init__(self, reason: str, *, advice: str = "", names: Sequence[str] = ()) -> None:
        """Describe the defect in a few words."""
        super().__init__(reason)
        self.advice, self.names = advice, tuple(names)
