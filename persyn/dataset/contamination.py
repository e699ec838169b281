"""Benchmarks that a dataset must not give away: which conversations overlap with their texts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persyn.dataset.words import n_grams, words
from persyn.errors import UsageError
from persyn.ingest import files
from persyn.ingest.record import Broken

#: So many words in a row that both have are no chance: the usual measure of contamination.
N = 13


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The texts of one file, as hashes: of every 13 words in a row, and of each text as a whole."""

    name: str
    sha256: str
    rows: int
    grams: frozenset[int]
    wholes: frozenset[int]

    def overlaps(self, prompt: Sequence[str], others: Sequence[Sequence[str]]) -> bool:
        """Whether a prompt is one of its texts, or shares 13 words in a row with one, or others (as words) do."""
        if hash(" ".join(prompt)) in self.wholes:
            return True
        return any(hash(gram) in self.grams for text in (prompt, *others) for gram in n_grams(text, N))


def read(path: Path) -> Benchmark:
    """A benchmark's file: JSONL, JSON, CSV or Parquet; every text in a row counts, whatever its field is called.

    Raises `UsageError` for a file that is not there, cannot be read, or holds no text.
    """
    grams: set[int] = set()
    wholes: set[int] = set()
    rows = 0
    for number, record in files.records(path):
        if isinstance(record, Broken):
            raise UsageError(f"{path.name}:{number}: {record.reason}")
        rows += 1
        for text in _texts(record):
            of = words(text)
            grams.update(map(hash, n_grams(of, N)))
            wholes.add(hash(" ".join(of)))
    wholes.discard(hash(""))
    if not wholes:
        raise UsageError(f"the benchmark {path} holds no text")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Benchmark(path.name, digest, rows, frozenset(grams), frozenset(wholes))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
