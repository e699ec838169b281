"""What a dataset says of itself: its run, what became of each assignment, its files and their digests.

docs/dataset.md says what each key of a manifest is.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from persyn.dataset.filters import FILTERS, Row
from persyn.dataset.formats import domain_of
from persyn.dataset.options import Options
from persyn.dataset.verdicts import WRONG
from persyn.errors import UsageError

MANIFEST = "manifest.json"
DATASET_INFO = "dataset_info.json"
CARD = "README.md"
DROPPED = "dropped.jsonl"
_KIND = "persyn-dataset/"


@dataclass(frozen=True, slots=True)
class File:
    """One file of a dataset."""

    name: str
    format: str
    split: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class TeacherCount:
    """A teacher of the run, and how many of its responses are in the dataset."""

    name: str
    fingerprint: str
    model: str
    revision: str | None
    #: As the run file states it.
    license: str | None
    exported: int
    #: Of these, cut off at max_tokens.
    truncated: int = 0


@dataclass(frozen=True, slots=True)
class StudentVersion:
    """The model the dataset is for."""

    name: str
    model: str
    revision: str | None


@dataclass(frozen=True, slots=True)
class RouterVersion:
    """What chose the teachers."""

    backbone: str
    revision: str | None
    fingerprint: str
    #: Of its checkpoint's files.
    sha256: str


@dataclass(frozen=True, slots=True)
class BenchmarkCount:
    """A benchmark that rows were compared with, and how many of them overlapped."""

    name: str
    sha256: str
    rows: int
    dropped: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a dataset is. Always: assigned = exported + the sums of dropped and of failed + missing.

    It says nothing of when or where it was written: the same data gives the same bytes.
    """

    run: str
    #: When the run was done; None while it is not, and more responses may come.
    finished_at: datetime | None
    config_hash: str
    config: dict[str, Any]
    #: What was asked for.
    export: Options
    assigned: int
    exported: int
    #: Responses that are cut off at max_tokens; they are among the exported.
    truncated: int
    #: Responses that are known to be wrong, among the exported; None where the run's quality is no verdict.
    wrong: int | None
    #: The prompts' `domain`, a field of their rows -> exported rows; empty text for those without.
    domains: dict[str, int]
    #: Filter -> assignments with a text that it left out; every filter that was asked for is named.
    dropped: dict[str, int]
    #: First word of the reason -> assignments whose teacher gave no text.
    failed: dict[str, int]
    #: Assignments without a response so far.
    missing: int
    #: Split -> exported rows.
    splits: dict[str, int]
    benchmarks: list[BenchmarkCount]
    teachers: list[TeacherCount]
    student: StudentVersion
    router: RouterVersion | None
    #: What served the teachers' models -> exported responses.
    engines: dict[str, int]
    files: list[File]
    #: Names of what else is in the folder, the manifest apart.
    others: list[str]
    versions: dict[str, str]
    kind: str = f"{_KIND}2"


@dataclass(slots=True)
class Tally:
    """The counts of a manifest, while the assignments go by."""

    exported: Counter[int] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    #: Benchmark -> rows it dropped.
    contaminated: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    engines: Counter[str] = field(default_factory=Counter)
    #: Teacher -> exported responses that are cut off.
    truncated: Counter[int] = field(default_factory=Counter)
    domains: Counter[str] = field(default_factory=Counter)
    #: Exported responses of the lowest quality that a verdict has.
    wrong: int = 0
    missing: int = 0

    def has_text(self, row: Row) -> bool:
        """Whether an assignment has a text; one that has none is counted."""
        if row.response_id is None:
            self.missing += 1
        elif row.failure is not None:
            self.failed[row.failure.split(":", 1)[0]] += 1
        return row.response is not None

    def export(self, row: Row, split: str) -> None:
        """Count a row that is in the dataset."""
        self.exported[row.teacher_id] += 1
        self.splits[split] += 1
        self.engines[row.engine or ""] += 1
        self.truncated[row.teacher_id] += row.finish_reason == "length"
        self.domains[domain_of(row.meta)] += 1
        self.wrong += row.quality == WRONG

    @property
    def assigned(self) -> int:
        """All that went by."""
        return self.exported.total() + self.dropped.total() + self.failed.total() + self.missing

    def dropped_by(self, options: Options) -> dict[str, int]:
        """Every filter that was asked for, in the order they were asked, with what it dropped."""
        asked = {
            "finish_reason": bool(options.finish_reasons),
            "quality": options.min_quality is not None,
            "unscored": options.unscored == "drop",
            "wrong": options.drop_wrong,
            "contaminated": bool(options.benchmarks),
            "near_duplicate": options.near_duplicates is not None,
            "cap": options.cap is not None,
        }
        return {name: self.dropped[name] for name in FILTERS if asked[name]}


class _FileName(Struct):
    name: str


class _Earlier(Struct):
    """What must be known of a dataset that may have been written by another version."""

    kind: str
    files: list[_FileName]
    #: Before 2, a dataset could have no other file than these.
    others: tuple[str, ...] = (DATASET_INFO,)


def files_of(manifest: bytes) -> set[str]:
    """The names of the files of the dataset that has this manifest; none if it is no dataset's."""
    try:
        earlier = msgspec.json.decode(manifest, type=_Earlier)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return set()
    if not earlier.kind.startswith(_KIND):
        return set()
    return {MANIFEST, *earlier.others, *(file.name for file in earlier.files)}


class _Exported(Struct):
    #: Before 2, a manifest had none.
    export: Options | None = None


def options_of(folder: Path) -> Options | None:
    """The options with which the dataset in a folder was exported; None where there is none, or of an older kind.

    Raises `UsageError` for a manifest that cannot be read: what it left out must not come back in silence.
    """
    path = folder / MANIFEST
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Exported).export
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} does not say how the dataset was exported ({error}); restore it, or move its folder away "
            "for a dataset with nothing left out"
        ) from error
