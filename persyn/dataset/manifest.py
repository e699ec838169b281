"""Describe a dataset: its run, the outcome of each assignment, its files and their digests.

docs/dataset.md documents each key of a manifest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from persyn.dataset.filters import FILTERS, AssignedRow, Drop
from persyn.dataset.formats import domain_of, is_ambiguous
from persyn.dataset.options import ExportOptions
from persyn.errors import UsageError
from persyn.method.combined_quality import WRONG
from persyn.runs.extension import Extension
from persyn.stages.recalibrations import Recalibration

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
    """A teacher of the run, and the number of its responses in the dataset."""

    name: str
    fingerprint: str
    model: str
    revision: str | None
    #: As the run file states it.
    license: str | None
    exported: int
    #: Of the exported responses, those truncated at max_tokens.
    truncated: int = 0


@dataclass(frozen=True, slots=True)
class StudentVersion:
    """The model the dataset is for."""

    name: str
    model: str
    revision: str | None


@dataclass(frozen=True, slots=True)
class RouterVersion:
    """The router that chose the teachers."""

    backbone: str
    revision: str | None
    fingerprint: str
    #: Of its checkpoint's files.
    sha256: str
    kind: str = "head"


@dataclass(frozen=True, slots=True)
class BenchmarkCount:
    """A benchmark that rows were compared with, and the number of rows that overlapped."""

    name: str
    sha256: str
    rows: int
    dropped: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """The description of a dataset; always assigned = used + sum(dropped) + sum(failed) + missing + rejected.

    It records neither time nor place of writing, so the same data gives the same bytes.
    """

    run: str
    #: When the run finished; None while it is unfinished and more responses may follow.
    finished_at: datetime | None
    config_hash: str
    config: dict[str, Any]
    #: The options of the export.
    export: ExportOptions
    #: Assignments, or the samples asked for if all are rows; in a dataset made of the grid, its prompts.
    assigned: int
    #: Rows. A response counts once for each row that it is in.
    exported: int
    #: Exported responses that are truncated at max_tokens.
    truncated: int
    #: Exported responses known to be wrong, except rejected ones; None where the run's quality is not a verdict.
    wrong: int | None
    #: Exported responses whose teacher reasoned first; None where no response of the run has reasoning.
    reasoning: int | None
    #: Exported responses with markers of reasoning in their own text, where a format has the reasoning in the text.
    ambiguous: int
    #: Prompts' `domain` field -> exported rows; empty text for prompts without one.
    domains: dict[str, int]
    #: Filter -> assignments with text that it dropped; every active filter is listed.
    dropped: dict[str, int]
    #: First word of the reason -> assignments whose response failed.
    failed: dict[str, int]
    #: Assignments without a response so far.
    missing: int
    #: Split -> exported rows.
    splits: dict[str, int]
    benchmarks: list[BenchmarkCount]
    teachers: list[TeacherCount]
    #: None for a run without a student.
    student: StudentVersion | None
    router: RouterVersion | None
    #: Serving engine -> exported responses.
    engines: dict[str, int]
    files: list[File]
    #: Names of the other files in the folder, except the manifest.
    others: list[str]
    versions: dict[str, str]
    #: Assignments without a correct response, in a run that keeps only these.
    rejected: int = 0
    #: Whether any row has tools or calls.
    tools: bool = False
    #: Of `assigned`, those that rows were made of.
    used: int = 0
    #: Rows of hold-out prompts.
    holdout: int = 0
    #: Prompts that were added to the run after its start.
    extensions: list[Extension] = field(default_factory=list)
    #: More calibration prompts, after which another router was fitted.
    recalibrations: list[Recalibration] = field(default_factory=list)
    kind: str = f"{_KIND}2"

    @property
    def responses(self) -> int:
        """Exported responses: several per row in some kinds, otherwise the rows."""
        return sum(each.exported for each in self.teachers)


@dataclass(slots=True)
class ExportCounts:
    """The counts of a manifest, updated row by row."""

    #: Whether a format has the reasoning in the text of the response.
    inlines: bool = False
    #: Units (assignments, samples or prompts) that rows were made of.
    used: int = 0
    holdout: int = 0
    #: Teacher -> exported responses.
    exported: Counter[int] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    #: Benchmark -> rows dropped for overlapping with it.
    contaminated: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    engines: Counter[str] = field(default_factory=Counter)
    #: Teacher -> exported responses that are truncated.
    truncated: Counter[int] = field(default_factory=Counter)
    domains: Counter[str] = field(default_factory=Counter)
    #: Exported responses with the lowest value of a verdict, except rejected ones.
    wrong: int = 0
    reasoning: int = 0
    ambiguous: int = 0
    missing: int = 0
    #: Prompts without a correct response.
    rejected: int = 0

    def has_text(self, row: AssignedRow) -> bool:
        """Whether an assignment has a response text; counts it if it has none."""
        if row.rejected:
            self.rejected += 1
        elif row.response_id is None:
            self.missing += 1
        elif row.failure is not None:
            self.failed[row.failure.split(":", 1)[0]] += 1
        return row.response is not None

    def drop(self, drop: Drop) -> None:
        """Count a unit without a row."""
        self.dropped[drop.filter] += 1
        if drop.filter == "contaminated":
            self.contaminated[drop.found] += 1

    def export(self, responses: Sequence[AssignedRow], split: str, *, rejected: Sequence[AssignedRow] = ()) -> None:
        """Count a row of the dataset and its responses; of those, `rejected` ones are not meant to be right."""
        self.splits[split] += 1
        self.domains[domain_of(responses[0].meta)] += 1
        self.wrong += sum(each.quality == WRONG for each in responses)
        for each in (*responses, *rejected):
            self.exported[each.teacher_id] += 1
            self.engines[each.engine or ""] += 1
            self.truncated[each.teacher_id] += each.finish_reason == "length"
            self.reasoning += bool(each.reasoning)
            self.ambiguous += self.inlines and is_ambiguous(each.response, each.reasoning)

    @property
    def assigned(self) -> int:
        """The number of units processed."""
        return self.used + self.dropped.total() + self.failed.total() + self.missing + self.rejected

    def dropped_by(self, options: ExportOptions) -> dict[str, int]:
        """Every active filter, in order of application, and then other reasons, with what was left out for them."""
        asked = {
            "finish_reason": bool(options.finish_reasons),
            "quality": options.min_quality is not None,
            "unscored": options.unscored == "drop",
            "wrong": options.drop_wrong,
            "contaminated": bool(options.benchmarks),
            "near_duplicate": options.near_duplicates is not None,
            "cap": options.cap is not None,
        }
        active = *(name for name in FILTERS if asked[name]), *options.of_kind.losses
        return {name: self.dropped[name] for name in active}


class _FileName(Struct):
    name: str


class _Earlier(Struct):
    """The keys read from a manifest that another version may have written."""

    kind: str
    files: list[_FileName]
    #: Before version 2, a dataset had no other files than these.
    others: tuple[str, ...] = (DATASET_INFO,)


def files_of(manifest: bytes) -> set[str]:
    """The names of the files of the dataset with this manifest; empty if it is not a dataset's."""
    try:
        earlier = msgspec.json.decode(manifest, type=_Earlier)
    except msgspec.DecodeError:
        return set()
    if not earlier.kind.startswith(_KIND):
        return set()
    return {MANIFEST, *earlier.others, *(file.name for file in earlier.files)}


class _Exported(Struct):
    #: Absent before version 2.
    export: ExportOptions | None = None


def options_of(folder: Path) -> ExportOptions | None:
    """The options with which the dataset in a folder was exported; None if there is none, or it is of an older version.

    Raises `UsageError` for an unreadable manifest, since otherwise excluded rows would silently return.
    """
    path = folder / MANIFEST
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Exported).export
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(
            f"{path} does not say how the dataset was exported ({error}); restore it, or move its folder away "
            "to use the dataset without filters"
        ) from error
