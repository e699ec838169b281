"""The rows of a dataset to fine-tune on: each prompt with its assigned teacher's response."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from sqlalchemy import Result, and_, func, select
from sqlalchemy.orm import Session

from persyn.config import load_config
from persyn.dataset import source, tool_use
from persyn.dataset.filters import AssignedRow, Caps, Filters
from persyn.dataset.formats import Example, domain_of, inlined
from persyn.dataset.manifest import ExportCounts
from persyn.dataset.options import ExportOptions
from persyn.dataset.source import Dropped, Snapshot
from persyn.dataset.verdicts import known_wrong
from persyn.db import lookup
from persyn.db.catalog import Prompt, Run
from persyn.db.results import Assignment, Response, Score
from persyn.errors import UsageError
from persyn.stages.batch import conversation, response_turn


class AssignedResponses:
    """The source of the rows: one per assignment, or one per sample if all are rows."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._session, self._run, self._options = snapshot.session, snapshot.run, snapshot.options
        self._benchmarks, self._progress = snapshot.benchmarks, snapshot.progress
        self._teachers = {teacher.id: teacher for teacher in lookup.teachers(self._session, self._run.id)}
        self._samples = load_config(self._run.config).generation.rows
        self.is_verdict = known_wrong(self._session, self._run) is not None
        keeps_reasoning = self._options.reasoning != "drop"
        self.tools = tool_use.of_responses(self._session, self._run, has_reasoning=keeps_reasoning)
        self.has_reasoning = source.has_reasoning(self._session, self._run, lookup.of_dataset)
        self.counts = ExportCounts()

    def rows(self, dropped: Dropped) -> Generator[AssignedRow]:
        """Yield the dataset's rows in prompt order; count the others by reason."""
        source.require_finish_reasons(self._session, self._run, lookup.of_dataset, self._options.finish_reasons)
        _require_decided(self._session, self._run, self._options)
        source.require_verdict(self._run, self._options, is_verdict=self.is_verdict)
        caps = self._caps()
        filters = Filters(self._options, self._benchmarks)
        with assigned(self._session, self._run) as rows:
            for number, row in enumerate(rows):
                if number % source.REPORT_ROWS == 0:
                    self._progress(number)
                if not self.counts.has_text(row):
                    continue
                if drop := filters.drop(row) or (caps.drop(row) if caps else None):
                    self.counts.drop(drop)
                    dropped(drop, row)
                else:
                    self.counts.used += 1
                    yield row

    def example(self, row: AssignedRow, *, inline: bool) -> Example:
        """A row as formats write it; inline: with the reasoning in the text of the response."""
        is_dropped = self._options.reasoning == "drop"
        response = response_turn(inlined(row.response, row.reasoning) if inline else row.response, row.tool_calls)
        if self.has_reasoning and not inline and not is_dropped:
            response["reasoning_content"] = row.reasoning or ""
        prompt = row.source_id or row.content_hash
        return Example(
            id=f"{prompt}#{row.sample}" if self._samples > 1 else prompt,
            prompt_id=row.prompt_id,
            sample=row.sample,
            messages=[*conversation(row), response],
            reasoning=None if is_dropped else row.reasoning,
            answer=row.answer,
            source=row.source,
            source_id=row.source_id,
            domain=domain_of(row.meta),
            meta=row.meta,
            teacher=self._teachers[row.teacher_id].name,
            teacher_fingerprint=self._teachers[row.teacher_id].fingerprint,
            finish_reason=row.finish_reason,
            reason=row.reason,
            margin=row.margin,
            response_tokens=row.response_tokens,
            reasoning_tokens=row.reasoning_tokens,
            quality=row.quality,
            tools=(row.tools or []) if self.tools.found else None,
        )

    def count(self, row: AssignedRow, split: str) -> None:
        """Count a row of the dataset."""
        self.counts.export([row], split)

    def expected(self) -> int:
        """The number of assignments, or of the samples asked for if all are rows."""
        counted = select(func.count()).select_from(Assignment).where(Assignment.run_id == self._run.id)
        return self._session.scalars(counted).one() * self._samples

    def _caps(self) -> Caps | None:
        """Read all rows once, through the same filters that the export applies afterwards."""
        if self._options.cap is None:
            return None
        filters = Filters(self._options, self._benchmarks)
        with assigned(self._session, self._run) as rows:
            left = (row for row in rows if row.response is not None and filters.drop(row) is None)
            return Caps(left, cap=self._options.cap, seed=self._run.seed)


def _require_decided(session: Session, run: Run, options: ExportOptions) -> None:
    """Require an option for unscored responses, if there are any."""
    if options.min_quality is None or options.unscored is not None:
        return
    n_rows, n_scored = session.execute(
        lookup.of_dataset(run, func.count(), func.count(Score.value)).outerjoin(
            Score, and_(Score.response_id == Response.id, Score.scorer_id == run.quality_scorer_id)
        )
    ).one()
    if n_scored < n_rows:
        raise UsageError(
            f"{n_rows - n_scored:,} of the {n_rows:,} responses have no quality: a run scores its calibration prompts, "
            "the others have scores only if these were imported with the responses; with a minimum quality, set "
            "unscored to 'keep' or 'drop'"
        )


def assigned(session: Session, run: Run) -> Result[Any]:
    """Select a run's assignments in prompt order, with prompts and responses where they exist.

    A row for each response that the dataset should have: one per assignment, or every sample.

    The result is streamed from the server; use it as a context manager.
    """
    query = lookup.with_rows(
        select(
            Assignment.prompt_id,
            Assignment.teacher_id,
            Assignment.rejected,
            Assignment.reason,
            Assignment.margin,
            *source.PROMPT,
            Response.id.label("response_id"),
            Response.text.label("response"),
            Response.reasoning,
            Response.tool_calls,
            Response.failure,
            Response.finish_reason,
            Response.response_tokens,
            Response.reasoning_tokens,
            Response.engine,
            Score.value.label("quality"),
        )
        .select_from(Assignment)
        .join(Prompt, Prompt.id == Assignment.prompt_id),
        run,
    )
    return session.execute(
        query.outerjoin(Score, and_(Score.response_id == Response.id, Score.scorer_id == run.quality_scorer_id))
        .where(Assignment.run_id == run.id)
        .order_by(Assignment.prompt_id, Response.sample),
        execution_options={"yield_per": 1_000},
    )
