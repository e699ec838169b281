"""Import rows from files in batches, counting and listing bad rows; a rejected import stores nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

from persyn.errors import UsageError
from persyn.ingest.rows import BadRow

_BATCH = 1_000
_BAD_SHOWN = 20
T = TypeVar("T")

OnError: TypeAlias = Literal["stop", "skip"]
"""How a bad row is handled: it stops the import, which then stores nothing, or is skipped and counted."""

Remedy: TypeAlias = Literal["none", "map", "options", "command"]
"""What a user can do about bad rows besides correcting them: nothing, name fields with --map, also skip rows with
--on-error, or import the prompts of a run with the command that has both options."""


@dataclass(frozen=True, slots=True)
class ImportReport:
    """The result of an import; always rows = new + replaced + duplicates + bad."""

    rows: int
    new: int
    #: Rows that replaced a failed one.
    replaced: int
    #: Rows that were already in the store, or earlier in the files.
    duplicates: int
    #: Rows that differ from the stored ones, which are kept.
    conflicts: int
    bad: int
    #: Scores stored with responses, whether those are new or not.
    new_scores: int
    first_bad: tuple[BadRow, ...]
    #: (file name, number of ids shared by several prompts, one such id), for each file with such ids.
    repeated_ids: tuple[tuple[str, int, str], ...] = ()
    #: Scores that were left out: the stored one of the same response differs, or they are of a response that is not
    #: stored.
    other_scores: int = 0
    #: Values that rows lack in the fields with scores.
    missing_scores: int = 0


@dataclass(slots=True)
class ImportCounts:
    """Running counts of an import."""

    on_error: OnError
    remedy: Remedy = "none"
    #: The names of the files.
    sources: list[str] = field(default_factory=list)
    rows: int = 0
    new: int = 0
    replaced: int = 0
    conflicts: int = 0
    bad: int = 0
    new_scores: int = 0
    other_scores: int = 0
    missing_scores: int = 0
    first_bad: list[BadRow] = field(default_factory=list)
    repeated_ids: tuple[tuple[str, int, str], ...] = ()

    def take(self, chunk: Sequence[T | BadRow]) -> list[T]:
        """Count the rows of a chunk and return the good ones."""
        bad = [row for row in chunk if isinstance(row, BadRow)]
        n_bad = sum(row.rows for row in bad)
        self.rows += len(chunk) - len(bad) + n_bad
        self.bad += n_bad
        for row in bad[: _BAD_SHOWN - len(self.first_bad)]:
            is_said = any(row.advice == other.advice for other in self.first_bad)
            self.first_bad.append(replace(row, advice="") if is_said else row)
        if self.on_error == "stop" and len(self.first_bad) >= _BAD_SHOWN:
            raise self.refusal(f"at least {self.bad:,} of the first {self.rows:,} rows")
        return [row for row in chunk if not isinstance(row, BadRow)]

    def refusal(self, which: str) -> UsageError:
        """The error that lists the first bad rows, those of a file with the same defect together."""
        alike: dict[tuple[str, str], list[BadRow]] = {}
        for row in self.first_bad:
            alike.setdefault((row.file, row.reason), []).append(row)
        listed = (
            f"{file}:{', '.join(str(row.line) for row in rows)}: {rows[0].said}" for (file, _), rows in alike.items()
        )
        return UsageError(f"{which} cannot be imported, so nothing was imported; {self._advice()}: {'; '.join(listed)}")

    def _advice(self) -> str:
        options: list[str] = []
        if self.remedy != "none":
            options += dict.fromkeys(f"--map {name}" for row in self.first_bad for name in row.names)
        if self.remedy in ("options", "command") and self.on_error == "stop" and self.bad < self.rows:
            options.append("--on-error skip")
        if not options:
            return "correct them"
        if self.remedy != "command":
            return f"correct them, or use {' or '.join(options)}"
        others = f" (or {' or '.join(options[1:])})" if options[1:] else ""
        source = json.dumps(self.sources if len(self.sources) > 1 else self.sources[0], ensure_ascii=False)
        return (
            f"correct them, or import the file with 'persyn prompts import FILE {options[0]}'{others} and set "
            f"source = {source} in [prompts] instead of file"
        )

    def report(self) -> ImportReport:
        """The final counts; raise `UsageError` if a bad row stops the import."""
        if self.bad and self.on_error == "stop":
            raise self.refusal(f"{self.bad:,} of {self.rows:,} rows")
        duplicates = self.rows - self.bad - self.new - self.replaced
        return ImportReport(
            rows=self.rows,
            new=self.new,
            replaced=self.replaced,
            duplicates=duplicates,
            conflicts=self.conflicts,
            bad=self.bad,
            new_scores=self.new_scores,
            other_scores=self.other_scores,
            missing_scores=self.missing_scores,
            first_bad=tuple(self.first_bad),
            repeated_ids=self.repeated_ids,
        )


def batches(
    paths: Sequence[Path], read: Callable[[Path], Iterator[T | BadRow]], tally: ImportCounts
) -> Iterator[tuple[str, list[T]]]:
    """Yield the good rows of files in batches, each with the name of its file.

    After a bad row that stops the import no more batches are yielded, but all rows are still checked. Raises
    `UsageError` for a file that cannot be read, has no rows, or has no good ones.
    """
    readers = [(path, read(path)) for path in paths]  # check every file name before storing a row
    tally.sources = [os.fsencode(path.name).decode(errors="replace") for path in paths]
    for (path, reader), source in zip(readers, tally.sources, strict=True):
        before, n_good = tally.rows, 0
        while chunk := list(islice(reader, _BATCH)):
            good = tally.take(chunk)
            n_good += len(good)
            if good and not (tally.bad and tally.on_error == "stop"):
                yield source, good
        if tally.rows == before:
            raise UsageError(f"{path} has no rows")
        if not n_good:
            raise tally.refusal(f"all {tally.rows - before:,} rows of {path}")
