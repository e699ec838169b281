"""The rows of a dataset made of the calibration grid: each prompt with some of its responses, best first.

Hold-out prompts are included, as in the dataset to fine-tune on; their rows say so.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
from msgspec import structs
from sqlalchemy import func, select

from persyn.config import load_config
from persyn.dataset import source, tool_use
from persyn.dataset.filters import AssignedRow, Drop, Filters
from persyn.dataset.formats import domain_of, inlined
from persyn.dataset.manifest import ExportCounts
from persyn.dataset.options import ExportOptions
from persyn.dataset.rankings import RankedResponse, Ranking
from persyn.dataset.source import Dropped, Snapshot
from persyn.dataset.verdicts import known_wrong
from persyn.db import grid, lookup
from persyn.db.catalog import Prompt, Role, RunPrompt, RunTeacher
from persyn.db.results import Response
from persyn.method import pairs, rewards
from persyn.stages.batch import conversation, response_turn

#: Prompts read at once.
_CHUNK = 200
#: Why a prompt has no row: no response has a reward and a text, or no pair is allowed.
NO_REWARD, NO_PAIR = "no_reward", "no_pair"


@dataclass(frozen=True, slots=True)
class Rated:
    """A response of the grid with its reward; `may_win` is whether filters of quality keep it."""

    row: AssignedRow
    learnability: float
    reward: float
    may_win: bool


Choose: TypeAlias = Callable[[Sequence[Rated], ExportOptions], list[Sequence[int]]]
"""The rows of a prompt: for each, the indices of its responses, best first."""


@dataclass(frozen=True, slots=True)
class RankedRow:
    """One row: responses to a prompt, best first, and the row's number among those of the prompt."""

    responses: Sequence[Rated]
    number: int

    @property
    def content_hash(self) -> str:
        """Of the prompt; it determines the split."""
        return str(self.responses[0].row.content_hash)


def preferred(rated: Sequence[Rated], options: ExportOptions) -> list[Sequence[int]]:
    """Pairs of a chosen and a rejected response that differ in text and in reward."""
    texts = [_written(each.row, options) for each in rated]
    quality = np.array([each.row.quality for each in rated])
    may_pair = np.array([[one != other for other in texts] for one in texts])
    if options.higher_quality:
        may_pair &= quality[:, None] > quality[None, :]
    return list(
        pairs.choose(
            np.array([each.reward for each in rated]),
            np.array([each.may_win for each in rated]),
            may_pair,
            which=options.pairs,
            min_margin=options.min_margin,
        )
    )


def best(rated: Sequence[Rated], options: ExportOptions) -> list[Sequence[int]]:
    """The responses of a prompt with the highest rewards, of equal ones the first in head order."""
    allowed = [index for index, each in enumerate(rated) if each.may_win]
    found = sorted(allowed, key=lambda index: -rated[index].reward)[: options.best]
    return [found] if found else []


class RankedResponses:
    """The source of the rows, from the grid's prompts that have responses with rewards."""

    def __init__(self, snapshot: Snapshot, choose: Choose) -> None:
        self._session, self._run, self._options = snapshot.session, snapshot.run, snapshot.options
        self._benchmarks, self._progress, self._choose = snapshot.benchmarks, snapshot.progress, choose
        self._teachers = {teacher.id: teacher for teacher in lookup.teachers(self._session, self._run.id)}
        self._config = load_config(self._run.config).run
        self._measured = grid.measure(self._run)
        self.is_verdict = known_wrong(self._session, self._run, lookup.of_grid) is not None
        keeps_reasoning = self._options.reasoning != "drop"
        self.tools = tool_use.of_responses(self._session, self._run, lookup.of_grid, has_reasoning=keeps_reasoning)
        self.has_reasoning = source.has_reasoning(self._session, self._run, lookup.of_grid)
        self.counts = ExportCounts()

    def rows(self, dropped: Dropped) -> Generator[RankedRow]:
        """Yield the dataset's rows in prompt order; count the prompts that have none by reason."""
        source.require_finish_reasons(self._session, self._run, lookup.of_grid, self._options.finish_reasons)
        source.require_verdict(self._run, self._options, is_verdict=self.is_verdict)
        options = self._options
        # A wrong response may be rejected; only the chosen one has to be good.
        quality = Filters(ExportOptions(min_quality=options.min_quality, drop_wrong=options.drop_wrong), ())
        # Applied last: a prompt without a row must not remove one with a row.
        duplicates = Filters(ExportOptions(near_duplicates=options.near_duplicates), ())
        plain = structs.replace(options, min_quality=None, drop_wrong=False, near_duplicates=None)
        filters = Filters(plain, self._benchmarks)
        for number, (prompt, responses) in enumerate(self._prompts()):
            if number % source.REPORT_ROWS == 0:
                self._progress(number)
            rated, reasons = self._rated(responses, filters, quality, dropped)
            found = self._choose(rated, options) if rated else []
            if not found:
                self._leave_out(prompt, rated, reasons, dropped)
            elif drop := duplicates.drop(rated[0].row):
                self.counts.drop(drop)
                dropped(drop, prompt)
            else:
                self.counts.used += 1
                for place, indices in enumerate(found):
                    yield RankedRow([rated[index] for index in indices], place)

    def example(self, row: RankedRow, *, inline: bool) -> Ranking:
        """A row as formats write it; inline: with the reasoning in the texts of the responses."""
        prompt = row.responses[0].row
        of_file = prompt.source_id or prompt.content_hash
        has_several = self._options.kind == "preference" and self._options.pairs != "best-worst"
        return Ranking(
            id=f"{of_file}#{row.number}" if has_several else of_file,
            prompt_id=prompt.prompt_id,
            prompt=conversation(prompt),
            responses=[self._response(each, inline=inline) for each in row.responses],
            answer=prompt.answer,
            source=prompt.source,
            source_id=prompt.source_id,
            domain=domain_of(prompt.meta),
            meta=prompt.meta,
            is_holdout=prompt.role == Role.HOLDOUT,
            tools=(prompt.tools or []) if self.tools.found else None,
        )

    def count(self, row: RankedRow, split: str) -> None:
        """Count a row of the dataset."""
        responses = [each.row for each in row.responses]
        n_good = 1 if self._options.kind == "preference" else len(responses)
        self.counts.export(responses[:n_good], split, rejected=responses[n_good:])
        self.counts.holdout += row.responses[0].row.role == Role.HOLDOUT

    def expected(self) -> int:
        """The number of the grid's prompts."""
        in_grid = RunPrompt.run_id == self._run.id, RunPrompt.role != Role.TARGET
        return self._session.scalars(select(func.count()).select_from(RunPrompt).where(*in_grid)).one()

    def _prompts(self) -> Generator[tuple[Any, list[Any]]]:
        """The grid's prompts in order, each with its responses in head order."""
        prompts = (
            select(Prompt.id.label("prompt_id"), Prompt.source, Prompt.source_id)
            .join(RunPrompt, RunPrompt.prompt_id == Prompt.id)
            .where(RunPrompt.run_id == self._run.id, RunPrompt.role != Role.TARGET)
            .order_by(Prompt.id)
            .limit(_CHUNK)
        )
        last = -1
        while chunk := self._session.execute(prompts.where(Prompt.id > last)).all():
            first, last = chunk[0].prompt_id, chunk[-1].prompt_id
            found = groupby(self._session.execute(self._responses(first, last)), key=lambda row: row.prompt_id)
            of_prompt = {prompt_id: list(rows) for prompt_id, rows in found}
            yield from ((prompt, of_prompt.get(prompt.prompt_id, [])) for prompt in chunk)

    def _responses(self, first: int, last: int) -> Any:
        return (
            grid.scored_responses(self._run, self._measured.kind)
            .join(Prompt, Prompt.id == Response.prompt_id)
            .add_columns(
                RunPrompt.role,
                *source.PROMPT,
                Response.id.label("response_id"),
                Response.text.label("response"),
                Response.reasoning,
                Response.tool_calls,
                Response.finish_reason,
                Response.engine,
            )
            .where(Response.prompt_id.between(first, last), Response.sample < self._config.samples)
            .order_by(Response.prompt_id, RunTeacher.position, Response.sample)
        )

    def _rated(
        self, responses: Sequence[Any], filters: Filters, quality: Filters, dropped: Dropped
    ) -> tuple[list[Rated], list[Drop]]:
        """The responses that have a reward and a text and pass the filters, and why others did not pass.

        Rewards are the run's: scored responses without a text are compared, too.
        """
        raw = np.array([[np.nan if row.quality is None else row.quality for row in responses]], dtype=np.float64)
        likely = [grid.learnability_of(self._run, row, self._measured) for row in responses]
        worth = rewards.combine(raw, np.array([likely]), alpha=self._config.alpha, how=self._config.normalise)
        rated, reasons = [], []
        for row, learnability, reward in zip(responses, likely, worth[0].tolist(), strict=True):
            if np.isnan(reward) or row.response is None:
                continue
            if drop := filters.drop(row):
                reasons.append(drop)
                self.counts.contaminated[drop.found] += drop.filter == "contaminated"
                dropped(drop, row)
                continue
            flaw = quality.drop(row)
            reasons += [flaw] if flaw else []
            rated.append(Rated(row, learnability, reward, may_win=flaw is None))
        return rated, reasons

    def _leave_out(self, prompt: Any, rated: Sequence[Rated], reasons: Sequence[Drop], dropped: Dropped) -> None:
        """Count a prompt without a row: for the first filter that left out a response, or for its rewards."""
        unfiltered = Drop(NO_PAIR if rated else NO_REWARD, "")
        self.counts.dropped[reasons[0].filter if reasons else unfiltered.filter] += 1
        if not reasons:
            dropped(unfiltered, prompt)

    def _response(self, rated: Rated, *, inline: bool) -> RankedResponse:
        row, teacher = rated.row, self._teachers[rated.row.teacher_id]
        turn = response_turn(inlined(row.response, row.reasoning) if inline else row.response, row.tool_calls)
        if self.has_reasoning and not inline and self._options.reasoning != "drop":
            turn["reasoning_content"] = row.reasoning or ""
        return RankedResponse(
            turn=turn,
            response_id=row.response_id,
            teacher=teacher.name,
            teacher_fingerprint=teacher.fingerprint,
            sample=row.sample,
            finish_reason=row.finish_reason,
            reward=rated.reward,
            quality=row.quality,
            learnability=None if np.isnan(rated.learnability) else rated.learnability,
        )


def _written(row: AssignedRow, options: ExportOptions) -> tuple[Any, ...]:
    """What a response is in a dataset: two that are equal make no pair."""
    return row.response, row.tool_calls, None if options.reasoning == "drop" else row.reasoning
