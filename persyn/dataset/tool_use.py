"""Find out whether a run's dataset has tools, and which formats cannot represent them, before anything is written."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sqlalchemy import Text, cast, or_, select
from sqlalchemy.orm import Session

from persyn.dataset.formats import FORMATS, inlined
from persyn.db import lookup
from persyn.db.catalog import Prompt, Run
from persyn.db.results import Assignment, Response
from persyn.errors import UsageError
from persyn.llm.protocols import Message
from persyn.stages.batch import TURNS, conversation, response_turn


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools in a run's dataset.

    found:     whether any row has tools, calls, or a tool's turn.
    is_strict: whether every assistant's turn is either a text or calls, and every tool's turn answers all of them, as
               ShareGPT requires.
    """

    found: bool = False
    is_strict: bool = True

    def formats(self, wanted: Collection[str]) -> list[str]:
        """The formats to write, without those of the built-in ones that cannot represent the tools.

        Raises `UsageError` for such a format if it was asked for by name.
        """
        unable = [name for name in wanted if not self._fits(name)]
        if unable and tuple(wanted) != tuple(FORMATS.builtin):
            beside = "a text or reasoning beside calls, or several results in a row"
            what = "tools" if FORMATS[unable[0]].tools is None else beside
            raise UsageError(f"format {unable[0]!r} cannot represent {what}, which rows of this run have; leave it out")
        return [name for name in wanted if name not in unable]

    def _fits(self, name: str) -> bool:
        if not self.found:
            return True
        able = FORMATS[name].tools
        return able is not None and (self.is_strict or not able.is_strict)


def of_run(session: Session, run: Run, *, has_reasoning: bool) -> ToolUse:
    """The tools in the rows of a run that have a response.

    has_reasoning: whether the dataset has the reasoning, which strict formats can only have in the text of a response.
    """
    mentions = or_(
        Prompt.tools.is_not(None),
        Prompt.last_turn.is_not(None),
        Response.tool_calls.is_not(None),
        cast(Prompt.history, Text).like('%"tool%'),
    )
    rows = session.execute(
        select(*TURNS, Prompt.tools, Response.text.label("response"), Response.reasoning, Response.tool_calls)
        .join_from(Assignment, Prompt, Prompt.id == Assignment.prompt_id)
        .join(Response, lookup.in_dataset(run))
        .where(Assignment.run_id == run.id, Response.text.is_not(None), mentions),
        execution_options={"yield_per": 1_000},
    )
    found, is_strict = False, True
    with rows:
        for row in rows:
            text = inlined(row.response, row.reasoning) if has_reasoning else row.response
            turns = [*conversation(row), response_turn(text, row.tool_calls)]
            found = found or bool(row.tools) or any(turn["role"] == "tool" or "tool_calls" in turn for turn in turns)
            is_strict = is_strict and _is_strict(turns)
    return ToolUse(found, is_strict)


def _is_strict(turns: Sequence[Message]) -> bool:
    says_both = any(turn["content"] and turn.get("tool_calls") for turn in turns)
    return not says_both and not any(one["role"] == other["role"] == "tool" for one, other in pairwise(turns))
