"""Detect conversations that overlap with the texts of a benchmark."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persyn.dataset.ngrams import n_grams, words
from persyn.errors import UsageError
from persyn.ingest import files
from persyn.ingest.record import UnreadableRecord

#: Words per n-gram; 13 is the usual choice in contamination checks, as longer matches are unlikely by chance.
N = 13


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark's texts as hashes of their 13-grams and of each whole text."""

    name: str
    sha256: str
    rows: int
    grams: frozenset[int]
    wholes: frozenset[int]

    def overlaps(self, prompt: Sequence[str], others: Sequence[Sequence[str]]) -> bool:
        """Whether a prompt equals a benchmark text, or it or another text (as words) shares a 13-gram with one."""
        if hash(" ".join(prompt)) in self.wholes:
            return True
        return any(hash(gram) in self.grams for text in (prompt, *others) for gram in n_grams(text, N))


def read(path: Path) -> Benchmark:
    """Read a benchmark from a JSONL, JSON, CSV or Parquet file, using every text in a row, whatever its field.

    Raises `UsageError` for a file that is missing, unreadable or without text.
    """
    grams: set[int] = set()
    wholes: set[int] = set()
    rows = 0
    for number, record in files.records(path):
        if isinstance(record, UnreadableRecord):
            raise UsageError(f"{path.name}:{number}: {record.reason}")
        rows += 1
        for text in _texts(record):
            of = words(text)
            grams.update(map(hash, n_grams(of, N)))
            wholes.add(hash(" ".join(of)))
    wholes.discard(hash(""))
    if not wholes:
        raise UsageError(f"the benchmark {path} contains no text")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Benchmark(path.name, digest, rows, frozenset(grams), frozenset(wholes))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
