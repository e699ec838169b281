"""Filter the rows of a dataset one at a time, and record why each dropped row is left out."""

from __future__ import annotations

import hashlib
import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from persyn.dataset.contamination import Benchmark
from persyn.dataset.near_duplicates import NearDuplicates
from persyn.dataset.ngrams import words
from persyn.dataset.options import UNKNOWN, ExportOptions
from persyn.llm.tools import written
from persyn.method.combined_quality import WRONG

AssignedRow: TypeAlias = Any
"""An assignment with its prompt and response text, as `export.assigned` returns it."""

#: The filters, in the order in which they are applied.
FILTERS = ("finish_reason", "quality", "unscored", "wrong", "contaminated", "near_duplicate", "cap")


@dataclass(frozen=True, slots=True)
class Drop:
    """Why a row is left out: the filter, and what it found."""

    filter: str
    found: str


class Filters:
    """All filters except caps. Rows must be passed once, in prompt order: of two near-duplicates the first is kept."""

    def __init__(self, options: ExportOptions, benchmarks: Sequence[Benchmark]) -> None:
        self._options = options
        self._benchmarks = benchmarks
        self._prompts = NearDuplicates(options.near_duplicates) if options.near_duplicates is not None else None
        self._asked: list[Callable[[AssignedRow], Drop | None]] = [
            *([self._finish_reason] if options.finish_reasons else []),
            *([self._quality] if options.min_quality is not None else []),
            *([self._wrong] if options.drop_wrong else []),
            *([self._contaminated] if benchmarks else []),
            *([self._near_duplicate] if self._prompts else []),
        ]

    def drop(self, row: AssignedRow) -> Drop | None:
        """Why a row is left out; None if it is kept."""
        return next((found for ask in self._asked if (found := ask(row))), None)

    def _finish_reason(self, row: AssignedRow) -> Drop | None:
        reason = row.finish_reason or UNKNOWN
        return None if reason in self._options.finish_reasons else Drop("finish_reason", reason)

    def _quality(self, row: AssignedRow) -> Drop | None:
        if row.quality is None:
            return Drop("unscored", "") if self._options.unscored == "drop" else None
        assert self._options.min_quality is not None
        return Drop("quality", repr(row.quality)) if row.quality < self._options.min_quality else None

    def _wrong(self, row: AssignedRow) -> Drop | None:
        return Drop("wrong", repr(row.quality)) if row.quality == WRONG else None

    def _contaminated(self, row: AssignedRow) -> Drop | None:
        response = written({"content": row.response, "tool_calls": row.tool_calls})
        turns = [words(written(turn)) for turn in row.history or () if turn["role"] != "system"]
        reasoning = [words(row.reasoning)] if row.reasoning and self._options.reasoning != "drop" else []
        prompt, others = words(row.text), [*turns, *reasoning, words(response)]
        found = next((each.name for each in self._benchmarks if each.overlaps(prompt, others)), None)
        return Drop("contaminated", found) if found else None

    def _near_duplicate(self, row: AssignedRow) -> Drop | None:
        assert self._prompts is not None
        asked = [turn["content"] for turn in row.history or () if turn["role"] == "user"]
        earlier = self._prompts.earlier(row.prompt_id, "\n".join([*asked, row.text]))
        is_own = earlier == row.prompt_id  # of another sample
        return None if earlier is None or is_own else Drop("near_duplicate", f"prompt {earlier}")


class Caps:
    """Limit the rows of each teacher to a random sample, drawn with the run's seed.

    rows: all rows that pass the other filters. Memory: `cap` integers per teacher.
    """

    def __init__(self, rows: Iterable[AssignedRow], *, cap: int, seed: int) -> None:
        self._seed = seed
        heaps: dict[int, list[int]] = defaultdict(list)
        for row in rows:
            heap, lot = heaps[row.teacher_id], -self._lot(row)
            if len(heap) < cap:
                heapq.heappush(heap, lot)
            else:
                heapq.heappushpop(heap, lot)
        self._highest: Mapping[int, int] = {teacher_id: -heap[0] for teacher_id, heap in heaps.items()}

    def drop(self, row: AssignedRow) -> Drop | None:
        """Why a row is left out; None if it is kept."""
        return Drop("cap", "") if self._lot(row) > self._highest[row.teacher_id] else None

    def _lot(self, row: AssignedRow) -> int:
        # A separate hash: the one that drew the calibration prompts would favour them here.
        key = self._seed.to_bytes(8, "big")
        which = f"{row.content_hash}:{row.sample}" if row.sample else row.content_hash
        digest = hashlib.blake2b(which.encode(), key=key, digest_size=8, person=b"persyn cap").digest()
        return int.from_bytes(digest, "big")
