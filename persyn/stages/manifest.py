"""What a dataset says of itself: its run, what became of each assignment, its files and their digests."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from sqlalchemy import Row

MANIFEST = "manifest.json"
DATASET_INFO = "dataset_info.json"
_KIND = "persyn-dataset/1"


@dataclass(frozen=True, slots=True)
class File:
    """One file of a dataset."""

    name: str
    format: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class TeacherCount:
    """A teacher of the run, and how many of its responses are in the dataset."""

    name: str
    fingerprint: str
    exported: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a dataset is. Always: assigned = exported + the sum of failed + missing."""

    run: str
    config_hash: str
    config: dict[str, Any]
    assigned: int
    exported: int
    #: Responses that are cut off at max_tokens; they are among the exported.
    truncated: int
    #: First word of the reason -> assignments whose teacher gave no text.
    failed: dict[str, int]
    #: Assignments without a response so far.
    missing: int
    teachers: list[TeacherCount]
    #: What served the teachers' models -> exported responses.
    engines: dict[str, int]
    files: list[File]
    versions: dict[str, str]
    created_at: datetime
    kind: str = _KIND


@dataclass(slots=True)
class Tally:
    """The counts of a manifest, while the assignments go by."""

    exported: Counter[int] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    engines: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    missing: int = 0

    def add(self, row: Row[Any]) -> bool:
        """Count an assignment; return whether it has a text to export."""
        if row.response_id is None:
            self.missing += 1
        elif row.failure is not None:
            self.failed[row.failure.split(":", 1)[0]] += 1
        else:
            self.exported[row.teacher_id] += 1
            self.engines[row.engine or ""] += 1
            self.truncated += row.finish_reason == "length"
            return True
        return False


class _FileName(Struct):
    name: str


class _Earlier(Struct):
    """What must be known of a dataset that may have been written by another version."""

    kind: str
    files: list[_FileName]


def files_of(folder: Path) -> set[str]:
    """The names of the files of the dataset in a folder; none if it holds no dataset."""
    try:
        earlier = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=_Earlier)
    except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
        return set()
    if not earlier.kind.startswith("persyn-dataset/"):
        return set()
    return {MANIFEST, DATASET_INFO, *(file.name for file in earlier.files)}
