"""What a kind of dataset reads from the store: its rows, and the properties that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy import Select
from sqlalchemy.orm import Session

from persyn.config import load_config
from persyn.dataset.contamination import Benchmark
from persyn.dataset.filters import AssignedRow, Drop
from persyn.dataset.manifest import ExportCounts
from persyn.dataset.options import FINISH_REASONS, ExportOptions
from persyn.dataset.tool_use import ToolUse
from persyn.db.catalog import Prompt, Run
from persyn.db.results import Response
from persyn.errors import UsageError
from persyn.llm import quality
from persyn.stages.batch import TURNS

#: Rows between two progress reports.
REPORT_ROWS = 1_000
#: The columns of a prompt that the rows of every kind of dataset are made of.
PROMPT = (
    Prompt.content_hash,
    *TURNS,
    Prompt.tools,
    Prompt.answer,
    Prompt.source,
    Prompt.source_id,
    Prompt.meta,
)
Dropped = Callable[[Drop, AssignedRow], object]
"""Receives each row that is left out, and why."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one export reads: a run within one snapshot of the store, with the export's options.

    progress: called from time to time with the number of units processed.
    """

    session: Session
    run: Run
    options: ExportOptions
    benchmarks: Sequence[Benchmark]
    progress: Callable[[int], None]


class Source(Protocol):
    """The rows of one export, in prompt order."""

    counts: ExportCounts
    tools: ToolUse
    #: Whether any response has reasoning; it decides the keys of all rows, whatever is filtered out.
    has_reasoning: bool
    #: Whether quality says which responses are wrong.
    is_verdict: bool

    def rows(self, dropped: Dropped) -> Generator[Any]:
        """Yield the rows, each with a `content_hash`; count what is left out, and pass it to `dropped`."""

    def example(self, row: Any, *, inline: bool) -> Any:
        """A row as formats write it; inline: with the reasoning in the text of the response."""

    def count(self, row: Any, split: str) -> None:
        """Count a row of the dataset."""

    def expected(self) -> int:
        """The number of units that rows are made of, by a separate count: `counts.assigned` must come to it."""


def has_reasoning(session: Session, run: Run, of: Callable[..., Select[Any]]) -> bool:
    """Whether any response has reasoning; of: `lookup.of_dataset` or `lookup.of_grid`."""
    return session.execute(of(run, Response.id).where(Response.reasoning.is_not(None)).limit(1)).first() is not None


def require_finish_reasons(session: Session, run: Run, of: Callable[..., Select[Any]], asked: Sequence[str]) -> None:
    """Raise `UsageError` for a finish reason that no response has, since a misspelt one would drop every row."""
    if set(asked) <= FINISH_REASONS:
        return
    found = session.scalars(of(run, Response.finish_reason).where(Response.finish_reason.is_not(None)).distinct())
    known = FINISH_REASONS | {reason for reason in found if reason}
    if unknown := set(asked) - known:
        raise UsageError(f"unknown finish reason {min(unknown)!r}; known: {', '.join(sorted(known))}")


def require_verdict(run: Run, options: ExportOptions, *, is_verdict: bool) -> None:
    """Raise `UsageError` where wrong responses are to be dropped and nobody knows which these are."""
    if options.drop_wrong and not is_verdict:
        raise UsageError(
            f"quality {quality.name(load_config(run.config))!r} of run {run.name} does not say which "
            "responses are wrong; set a minimum quality instead"
        )
