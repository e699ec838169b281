"""What a file's reader yields: records, and in place of one that cannot be read, why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

#: A longer line, or CSV field, is no prompt; without a bound it would be read into memory whole.
MAX_BYTES = 16 * 2**20

Record: TypeAlias = dict[str, Any]
"""One row: plain JSON values by field name."""


@dataclass(frozen=True, slots=True)
class Broken:
    """Why there is no record in this place."""

    reason: str
    #: Rows that are lost with it, itself included; at most the lines that it takes.
    rows: int = 1


Numbered: TypeAlias = tuple[int, Record | Broken]
"""A record, and the line it begins in (JSONL, CSV) or its row (JSON, Parquet), from 1."""


class Flaw(Exception):
    """What is wrong with a row."""
