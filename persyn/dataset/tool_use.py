"""Find out whether a run's dataset has tools, and which formats cannot represent them, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sqlalchemy import Select, Text, cast, or_, select
from sqlalchemy.orm import Session

from persyn.dataset.formats import Format, inlined
from persyn.db import lookup
from persyn.db.catalog import Prompt, Run
from persyn.db.results import Assignment, Response
from persyn.errors import UsageError
from persyn.llm.protocols import Message
from persyn.registry import Registry
from persyn.stages.batch import TURNS, StoredPrompt, conversation, response_turn

#: Prompts that may have tools; texts may contain the word, too.
_MENTIONED = or_(Prompt.tools.is_not(None), Prompt.last_turn.is_not(None), cast(Prompt.history, Text).like('%"tool%'))


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools in a run's dataset.

    found:     whether any row has tools, calls, or a tool's turn.
    is_strict: whether every assistant's turn is either a text or calls, and every tool's turn answers all of them, as
               ShareGPT requires.
    """

    found: bool = False
    is_strict: bool = True

    def formats(self, wanted: Collection[str], known: Registry[Format]) -> dict[str, Format]:
        """The formats to write, without those of the built-in ones that cannot represent the tools.

        known: the formats of the kind of dataset.
        Raises `UsageError` for such a format if it was asked for by name, and if none is left.
        """
        unable = [name for name in wanted if not self._fits(known[name])]
        if unable and (tuple(wanted) != tuple(known.builtin) or len(unable) == len(wanted)):
            beside = "a text or reasoning beside calls, or several results in a row"
            what = "tools" if known[unable[0]].tools is None else beside
            raise UsageError(f"format {unable[0]!r} cannot represent {what}, which rows of this run have; leave it out")
        return {name: known[name] for name in wanted if name not in unable}

    def _fits(self, form: Format) -> bool:
        if not self.found:
            return True
        return form.tools is not None and (self.is_strict or not form.tools.is_strict)


def of_responses(
    session: Session, run: Run, of: Callable[..., Select[Any]] = lookup.of_dataset, *, has_reasoning: bool
) -> ToolUse:
    """The tools in prompts with responses.

    of:            which of the run's responses, `lookup.of_dataset` or `lookup.of_grid`.
    has_reasoning: whether the dataset has the reasoning, which strict formats can only have in the text of a response.
    """
    mentions = or_(_MENTIONED, Response.tool_calls.is_not(None))
    columns = *TURNS, Prompt.tools, Response.text.label("response"), Response.reasoning, Response.tool_calls
    rows = session.execute(
        of(run, *columns).join(Prompt, Prompt.id == Response.prompt_id).where(mentions),
        execution_options={"yield_per": 1_000},
    )
    found, is_strict = False, True
    with rows:
        for row in rows:
            text = inlined(row.response, row.reasoning) if has_reasoning else row.response
            turns = [*conversation(row), response_turn(text, row.tool_calls)]
            found = found or _has_tools(row, turns)
            is_strict = is_strict and _is_strict(turns)
    return ToolUse(found, is_strict)


def of_assignments(session: Session, run: Run) -> ToolUse:
    """The tools in prompts that have a teacher, whatever it answered."""
    prompts = select(*TURNS, Prompt.tools).join(Assignment, Assignment.prompt_id == Prompt.id)
    wanted = prompts.where(Assignment.run_id == run.id, _MENTIONED)
    with session.execute(wanted, execution_options={"yield_per": 1_000}) as rows:
        return ToolUse(found=any(_has_tools(row, conversation(row)) for row in rows))


def _has_tools(row: StoredPrompt, turns: Sequence[Message]) -> bool:
    return bool(row.tools) or any(turn["role"] == "tool" or "tool_calls" in turn for turn in turns)


def _is_strict(turns: Sequence[Message]) -> bool:
    says_both = any(turn["content"] and turn.get("tool_calls") for turn in turns)
    return not says_both and not any(one["role"] == other["role"] == "tool" for one, other in pairwise(turns))
