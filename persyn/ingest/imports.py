"""What every import of files does: rows in batches, bad ones counted and listed, nothing left of a refused one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

from persyn.errors import UsageError
from persyn.ingest.rows import BadRow

_BATCH = 1_000
_BAD_SHOWN = 20
T = TypeVar("T")

OnError: TypeAlias = Literal["stop", "skip"]
"""What a bad row does: stop the import before it leaves anything, or be skipped and counted."""


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What came of an import. Always: rows = new + replaced + duplicates + bad."""

    rows: int
    new: int
    #: Rows that took the place of one that had failed.
    replaced: int
    #: Rows that were in the store, or earlier in the files.
    duplicates: int
    #: Those that came with something else than what is stored, which stays.
    conflicts: int
    bad: int
    #: Stored with responses, whether those are new or not.
    new_scores: int
    first_bad: tuple[BadRow, ...]
    #: Of each file whose ids are not those of one prompt alone: its name, how many such ids, and one of them.
    repeated_ids: tuple[tuple[str, int, str], ...] = ()


@dataclass(slots=True)
class Tally:
    """Counts while an import goes on."""

    on_error: OnError
    rows: int = 0
    new: int = 0
    replaced: int = 0
    conflicts: int = 0
    bad: int = 0
    new_scores: int = 0
    first_bad: list[BadRow] = field(default_factory=list)
    repeated_ids: tuple[tuple[str, int, str], ...] = ()

    def take(self, chunk: Sequence[T | BadRow]) -> list[T]:
        """Count a chunk's rows and return the good ones."""
        bad = [row for row in chunk if isinstance(row, BadRow)]
        n_bad = sum(row.rows for row in bad)
        self.rows += len(chunk) - len(bad) + n_bad
        self.bad += n_bad
        self.first_bad.extend(bad[: _BAD_SHOWN - len(self.first_bad)])
        if self.on_error == "stop" and len(self.first_bad) >= _BAD_SHOWN:
            raise self.refusal(f"at least {self.bad:,} of the first {self.rows:,} rows")
        return [row for row in chunk if not isinstance(row, BadRow)]

    def refusal(self, which: str) -> UsageError:
        """The error that lists the first bad rows."""
        listed = "; ".join(map(str, self.first_bad))
        return UsageError(f"{which} cannot be imported, so nothing was; {self._advice()}: {listed}")

    def _advice(self) -> str:
        return "mend or skip them" if self.on_error == "stop" else "mend them"

    def report(self) -> ImportReport:
        """The counts at the end; `UsageError` when a bad row stops the import."""
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
            first_bad=tuple(self.first_bad),
            repeated_ids=self.repeated_ids,
        )


def batches(
    paths: Sequence[Path], read: Callable[[Path], Iterator[T | BadRow]], tally: Tally
) -> Iterator[tuple[str, list[T]]]:
    """The good rows of files, a batch at a time, each with its file's name.

    After a bad row that stops the import there are no more batches, but all rows are looked at.
    Raises `UsageError` for a file that cannot be read, has no rows, or no good ones.
    """
    readers = [(path, read(path)) for path in paths]  # every name is checked before a row is stored
    for path, reader in readers:
        before, n_good = tally.rows, 0
        source = os.fsencode(path.name).decode(errors="replace")
        while chunk := list(islice(reader, _BATCH)):
            good = tally.take(chunk)
            n_good += len(good)
            if good and not (tally.bad and tally.on_error == "stop"):
                yield source, good
        if tally.rows == before:
            raise UsageError(f"{path} has no rows")
        if not n_good:
            raise tally.refusal(f"all {tally.rows - before:,} rows of {path}")
