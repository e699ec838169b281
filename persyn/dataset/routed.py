"""The rows of a dataset that says which teacher each prompt was given to, and how the teachers were rated for it.

It needs no responses: in on-policy distillation the student writes them, and the prompt's teacher rates their tokens.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from sqlalchemy import Select, and_, func, literal, null, select

from persyn.dataset import source, tool_use
from persyn.dataset.filters import AssignedRow, Caps, Filters
from persyn.dataset.formats import (
    Format,
    ToolForm,
    arrow_turns,
    domain_of,
    json_features,
    text_features,
    text_format,
    turns_feature,
)
from persyn.dataset.manifest import ExportCounts
from persyn.dataset.parquet_file import Columns
from persyn.dataset.source import Dropped, Snapshot
from persyn.db import grid, lookup
from persyn.db.catalog import Prompt, Role, Run, RunPrompt
from persyn.db.results import Assignment, RouterScore
from persyn.llm.protocols import Message, Tools
from persyn.llm.tools import with_objects
from persyn.registry import Registry
from persyn.stages.batch import conversation

if TYPE_CHECKING:
    import pyarrow as pa

#: Prompts read at once.
_CHUNK = 1_000


@dataclass(frozen=True, slots=True)
class RoutedPrompt:
    """A prompt, its teacher, and the scores of the run's teachers for it."""

    id: str
    prompt_id: int
    prompt: list[Message]
    #: The teacher's name in the run, by which a trainer finds the model.
    teacher_id: str
    teacher_fingerprint: str
    #: How the teacher was chosen: router, calibration, or the strategy.
    reason: str
    #: What the scores are: the router's, or the rewards of the teachers' responses; empty if nothing rated them.
    scored_by: Literal["router", "reward", ""]
    #: Teacher -> score, in head order, without teachers that have none.
    scores: dict[str, float]
    answer: str | None
    source: str
    source_id: str | None
    domain: str
    is_holdout: bool
    tools: Tools | None

    @property
    def probabilities(self) -> dict[str, float]:
        """Teacher -> probability of the highest reward: the softmax of the router's scores, else empty.

        Differences of a router's scores are log-odds (Bradley-Terry), which extend to a choice among all teachers by
        the softmax (Luce). Rewards are no log-odds.
        """
        if self.scored_by != "router":
            return {}
        values = np.array(list(self.scores.values()))
        weights = np.exp(values - values.max())
        return dict(zip(self.scores, (weights / weights.sum()).tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class RoutedRow:
    """An assignment with its prompt, and the scores of the teachers for it by their ids."""

    prompt: AssignedRow
    scored_by: Literal["router", "reward", ""]
    scores: dict[int, float]

    @property
    def content_hash(self) -> str:
        """Of the prompt; it determines the split."""
        return str(self.prompt.content_hash)


_ORIGIN = ("id", "prompt_id", "domain", "source", "teacher_fingerprint", "reason", "scored_by", "is_holdout")


def _facts(row: RoutedPrompt) -> dict[str, Any]:
    return {
        "scores": [{"teacher_id": name, "score": score} for name, score in row.scores.items()],
        "probabilities": [{"teacher_id": name, "probability": share} for name, share in row.probabilities.items()],
        **{name: getattr(row, name) for name in _ORIGIN},
        "source_id": row.source_id or "",
    }


def _messages(row: RoutedPrompt) -> dict[str, Any]:
    tools = {} if row.tools is None else {"tools": row.tools}
    return {"prompt": with_objects(row.prompt), "teacher_id": row.teacher_id, **tools, **_facts(row)}


def _verl(row: RoutedPrompt) -> dict[str, Any]:
    return {
        "prompt": row.prompt,
        "teacher_id": row.teacher_id,
        "data_source": row.source,
        "ability": row.domain,
        "reward_model": {"style": "rule", "ground_truth": row.answer or ""},
        "extra_info": {"index": row.prompt_id},
        **_facts(row),
    }


def _nemo_gym(row: RoutedPrompt) -> dict[str, Any]:
    return {
        "responses_create_params": {"input": row.prompt},
        "agent_ref": {"type": "responses_api_agents", "name": row.teacher_id},
        "expected_answer": row.answer or "",
        **_facts(row),
    }


def _verl_schema(first: RoutedPrompt | None) -> pa.Schema:
    import pyarrow as pa

    text = pa.string()
    scores = {name: pa.list_(pa.struct({"teacher_id": text, of: pa.float64()})) for name, of in _SCORES.items()}
    return pa.schema(
        {
            "prompt": arrow_turns(has_reasoning=False, has_tools=False),
            "teacher_id": text,
            "data_source": text,
            "ability": text,
            "reward_model": pa.struct({"style": text, "ground_truth": text}),
            "extra_info": pa.struct({"index": pa.int64()}),
            **scores,
            **{name: {"prompt_id": pa.int64(), "is_holdout": pa.bool_()}.get(name, text) for name in _ORIGIN},
            "source_id": text,
        }
    )


_SCORES = {"scores": "score", "probabilities": "probability"}


def _features() -> list[dict[str, Any]]:
    scores = [
        {"name": name, "list": [*text_features("teacher_id"), {"name": of, "dtype": "float64"}]}
        for name, of in _SCORES.items()
    ]
    kinds = {"prompt_id": "int64", "is_holdout": "bool"}
    origin = [{"name": name, "dtype": kinds.get(name, "string")} for name in (*_ORIGIN, "source_id")]
    return [*scores, *origin]


#: The columns of verl's rows.
VERL_COLUMNS = Columns(_verl, _verl_schema)
#: The formats of routed prompts.
ROUTED = Registry(
    Format,
    Format(
        "messages",
        "teachers.jsonl",
        text_format(_messages),
        features=[turns_feature("prompt"), *text_features("teacher_id"), *_features()],
        tools=ToolForm(
            features=[*json_features("prompt"), *text_features("teacher_id"), *json_features("tools"), *_features()]
        ),
    ),
    Format("verl", "teachers.parquet", VERL_COLUMNS.file, is_text=False),
    Format("nemo-gym", "teachers_nemo_gym.jsonl", text_format(_nemo_gym)),
    groups=(),
)


class RoutedPrompts:
    """The source of the rows: one per prompt that has a teacher, whether or not it has answered.

    A prompt to which no response of its teacher was correct, in a run that keeps only correct ones, is left out.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._session, self._run, self._options = snapshot.session, snapshot.run, snapshot.options
        self._benchmarks, self._progress = snapshot.benchmarks, snapshot.progress
        self._teachers = {teacher.id: teacher for teacher in lookup.teachers(self._session, self._run.id)}
        self.is_verdict = self.has_reasoning = False
        self.tools = tool_use.of_assignments(self._session, self._run)
        self.counts = ExportCounts()

    def rows(self, dropped: Dropped) -> Generator[RoutedRow]:
        """Yield the dataset's rows in prompt order; count the others by reason."""
        caps = self._caps()
        filters = Filters(self._options, self._benchmarks)
        for number, row in enumerate(self._assigned()):
            if number % source.REPORT_ROWS == 0:
                self._progress(number)
            prompt = row.prompt
            if prompt.rejected:
                self.counts.rejected += 1
            elif drop := filters.drop(prompt) or (caps.drop(prompt) if caps else None):
                self.counts.drop(drop)
                dropped(drop, prompt)
            else:
                self.counts.used += 1
                yield row

    def example(self, row: RoutedRow, *, inline: bool) -> RoutedPrompt:
        """A row as formats write it."""
        prompt, teacher = row.prompt, self._teachers[row.prompt.teacher_id]
        names = {teacher_id: each.name for teacher_id, each in self._teachers.items()}
        return RoutedPrompt(
            id=prompt.source_id or prompt.content_hash,
            prompt_id=prompt.prompt_id,
            prompt=conversation(prompt),
            teacher_id=teacher.name,
            teacher_fingerprint=teacher.fingerprint,
            reason=prompt.reason,
            scored_by=row.scored_by,
            scores={name: row.scores[teacher_id] for teacher_id, name in names.items() if teacher_id in row.scores},
            answer=prompt.answer,
            source=prompt.source,
            source_id=prompt.source_id,
            domain=domain_of(prompt.meta),
            is_holdout=prompt.role == Role.HOLDOUT,
            tools=(prompt.tools or []) if self.tools.found else None,
        )

    def count(self, row: RoutedRow, split: str) -> None:
        """Count a row of the dataset."""
        self.counts.export([row.prompt], split)
        self.counts.holdout += row.prompt.role == Role.HOLDOUT

    def expected(self) -> int:
        """The number of assignments."""
        counted = select(func.count()).select_from(Assignment).where(Assignment.run_id == self._run.id)
        return self._session.scalars(counted).one()

    def _caps(self) -> Caps | None:
        """Read all rows once, through the same filters that the export applies afterwards."""
        if self._options.cap is None:
            return None
        filters = Filters(self._options, self._benchmarks)
        prompts = (row.prompt for row in self._assigned())
        left = (prompt for prompt in prompts if not prompt.rejected and filters.drop(prompt) is None)
        return Caps(left, cap=self._options.cap, seed=self._run.seed)

    def _assigned(self) -> Generator[RoutedRow]:
        """The prompts that have a teacher, in order, with what is known of all teachers for them."""
        assigned = _prompts(self._run)
        last = -1
        while chunk := self._session.execute(assigned.where(Assignment.prompt_id > last)).all():
            between = chunk[0].prompt_id, chunk[-1].prompt_id
            last = between[1]
            routed, rewarded = self._routed(between), self._rewarded(between)
            for prompt in chunk:
                if scores := rewarded.get(prompt.prompt_id):
                    yield RoutedRow(prompt, "reward", scores)
                else:
                    scores = routed.get(prompt.prompt_id, {})
                    yield RoutedRow(prompt, "router" if scores else "", scores)

    def _routed(self, between: tuple[int, int]) -> dict[int, dict[int, float]]:
        """Prompt -> teacher -> the router's score."""
        found: dict[int, dict[int, float]] = {}
        of_router = RouterScore.router_id == self._run.router_id, RouterScore.prompt_id.between(*between)
        for row in self._session.scalars(select(RouterScore).where(*of_router)):
            found.setdefault(row.prompt_id, {})[row.teacher_id] = row.score
        return found

    def _rewarded(self, between: tuple[int, int]) -> dict[int, dict[int, float]]:
        """Prompt of the grid -> teacher -> the reward of its responses; nothing for prompts without rewards."""
        cells = grid.read(self._session, self._run, prompt_ids=between)
        teacher_ids = cells.teacher_ids.tolist()
        return {
            prompt_id: {
                teacher_id: reward for teacher_id, reward in zip(teacher_ids, row, strict=True) if reward == reward
            }
            for prompt_id, row in zip(cells.prompt_ids.tolist(), cells.rewards().tolist(), strict=True)
        }


def _prompts(run: Run) -> Select[Any]:
    """Select a chunk of a run's assignments with their prompts, and with no response, as filters read them."""
    nothing = ("reasoning", "tool_calls", "finish_reason", "quality", "engine")
    return (
        select(
            Assignment.prompt_id,
            Assignment.teacher_id,
            Assignment.rejected,
            Assignment.reason,
            RunPrompt.role,
            *source.PROMPT,
            literal("").label("response"),
            literal(0).label("sample"),
            *(null().label(name) for name in nothing),
        )
        .select_from(Assignment)
        .join(Prompt, Prompt.id == Assignment.prompt_id)
        .join(RunPrompt, and_(RunPrompt.run_id == Assignment.run_id, RunPrompt.prompt_id == Assignment.prompt_id))
        .where(Assignment.run_id == run.id)
        .order_by(Assignment.prompt_id)
        .limit(_CHUNK)
    )
