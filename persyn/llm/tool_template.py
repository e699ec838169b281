"""Apply a chat template to conversations with tools, and verify that no tool and no call is lost.

Templates disagree about a call's arguments, which some take as an object and others as JSON text, and about its id,
which some restrict to nine characters; both are found out by rendering.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from itertools import takewhile
from operator import eq
from typing import Any

from jinja2 import TemplateError

from persyn.llm import tools as tool_forms
from persyn.llm.protocols import Message, Tools
from persyn.llm.template import (
    Answered,
    Conversation,
    Frame,
    LostText,
    Template,
    Written,
    fold_system,
    frame_of,
    marker,
    match,
    search,
)

#: Of a short id, as Mistral's templates require.
_ID_LENGTH = 9
_TEXT = "\N{OBJECT REPLACEMENT CHARACTER}value\N{OBJECT REPLACEMENT CHARACTER}"
SAMPLE_CALL = {
    "id": "a1b2c3d4e",
    "type": "function",
    "function": {"name": "look_up", "arguments": f'{{"word": "{_TEXT}"}}'},
}
SAMPLE_TOOLS: Tools = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks up a word.",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string", "description": "The word."}},
                "required": ["word"],
            },
        },
    }
]
SAMPLE_TURNS: list[Message] = [
    {"role": "user", "content": "Look it up."},
    {"role": "assistant", "content": "", "tool_calls": [SAMPLE_CALL]},
    {"role": "tool", "content": "A fruit.", "tool_call_id": "a1b2c3d4e", "name": "look_up"},
]
SAMPLE_CALLED = Conversation(SAMPLE_TURNS[:1], "", tool_calls=[SAMPLE_CALL], tools=SAMPLE_TOOLS)


class ToolTemplate(Template):
    """A chat template that also renders tools, calls and the turns of tools."""

    def prompt(self, messages: Sequence[Message], tools: Tools | None = None) -> Written:
        """Render the conversation up to the beginning of the assistant's turn."""
        if not _involves_tools(messages, tools):
            return super().prompt(messages)
        return self._render(messages, tools, opens=True)

    def finished(self, messages: Sequence[Message], tools: Tools | None = None) -> Written:
        """Render the conversation with every turn closed."""
        if not _involves_tools(messages, tools):
            return super().finished(messages)
        return self._render(messages, tools, opens=False)

    def answered(self, conversation: Conversation) -> Answered:
        """Render a conversation and its response, which may consist of calls; see `Template.answered`."""
        messages, response, reasoning, tool_calls, tools = conversation
        if not (tool_calls or _involves_tools(messages, tools)):
            return super().answered(conversation)
        prompt = self.prompt(messages, tools)
        turn: Message = {"role": "assistant", "content": response, "tool_calls": tool_calls}
        text = marker(0) if tool_calls else response
        if reasoning is not None and self.takes_reasoning:
            # Some templates take no reasoning, or no text beside it, in a response with calls.
            with suppress(TemplateError):
                before = [*messages, *self._reasoning_turn(reasoning)]
                whole = self.finished([*before, {"role": "assistant", "content": text}], tools)
                said = self._parted(prompt, whole, has_reasoning=True)
                return self._calling(said, [*before, turn], tools) if tool_calls else said
        said = self._answered(prompt, messages, text, tools)
        answered = self._calling(said, [*messages, turn], tools) if tool_calls else said
        if reasoning is None:
            return answered
        if prompt.text.startswith(answered.given):
            # The prompt opens the reasoning, and a finished conversation does not.
            answered = replace(answered, given=prompt.text)
        return answered.reasoned(reasoning, self._markers)

    def _answered(self, prompt: Written, messages: Sequence[Message], response: str, tools: Tools | None) -> Answered:
        """Render the conversation with a text as the response."""
        frame = self._frame_of([*messages, {"role": "assistant", "content": response}], tools, opens=False)
        before = prompt.text[: prompt.spans[-1][1]] + frame.texts[-2]
        given = prompt.text if before.startswith(prompt.text) else self._given(prompt.text, before, response)
        given = given if before.startswith(given) else before
        return Answered(given, before[len(given) :], response, frame.texts[-1], prompt.spans)

    def _calling(self, said: Answered, turns: Sequence[Message], tools: Tools | None) -> Answered:
        """Render turns whose last one has calls; the response is what the template writes after the prompt.

        said: the same conversation, with the same reasoning, answered by a text.
        """
        whole = self.finished(turns, tools).text
        reasoning = said.reasoning
        lead = said.lead if reasoning or whole.startswith(said.given + said.lead) else ""
        before = said.given + lead + (reasoning.text if reasoning else "")
        if not whole.startswith(before):
            raise TemplateError("it writes the prompt of a response with calls in another way than that of a text")
        if not whole.endswith(said.after):
            raise TemplateError("it closes a response with calls in another way than a text")
        written = whole[len(before) : len(whole) - len(said.after)]
        if reasoning:
            # What closes the reasoning may go on with a header of the text.
            end = sum(takewhile(bool, map(eq, reasoning.closing, written)))
            reasoning, written = replace(reasoning, closing=written[:end]), written[end:]
        return Answered(said.given, lead, written, said.after, said.spans, reasoning, is_rendered=True)

    def _render(self, messages: Sequence[Message], tools: Tools | None, *, opens: bool) -> Written:
        frame = self._frame_of(messages, tools, opens=opens)
        turns = fold_system(messages) if frame.folds else messages
        text = self._apply(turns, tools, opens=opens)
        said = [turn for turn in messages if turn["content"]]
        contents = [turn["content"] for turn in said]
        # Some templates write the result of a tool as a JSON string.
        escaped = [_escaped(turn["content"]) if turn["role"] == "tool" else turn["content"] for turn in said]
        spans = match(frame, text, contents) or match(frame, text, escaped)
        if spans is not None:
            return Written(text, spans)
        return Written(text, search(frame, text, contents, [turn["role"] for turn in said]), is_framed=False)

    def _frame_of(self, messages: Sequence[Message], tools: Tools | None, *, opens: bool) -> Frame:
        """What the template writes around the texts of a conversation, calls and tools included.

        An empty text, beside calls, has no place in it: a template may leave out what surrounds it.
        """
        numbers = iter(range(len(messages)))
        turns = [{**turn, "content": marker(next(numbers))} if turn["content"] else turn for turn in messages]
        roles = tuple(turn["role"] for turn in messages if turn["content"])
        try:
            frame = frame_of(self._apply(turns, tools, opens=opens), roles, folds=False)
        except TemplateError:
            if "system" not in roles:
                raise
            frame = frame_of(self._apply(fold_system(turns), tools, opens=opens), roles, folds=True)
        self._require_whole("".join(frame.texts), messages, tools)
        return frame

    def _require_whole(self, text: str, messages: Sequence[Message], tools: Tools | None) -> None:
        """Raise `LostText` if a tool or a part of a call is not in the text around the turns."""
        wanted: Counter[str] = Counter()
        names = tool_forms.names(tools)
        if names and not self._shows_tools:
            raise LostText(f"it ignores tools: {', '.join(names)}")
        calls = [call["function"] for turn in messages for call in turn.get("tool_calls") or ()]
        for what, functions in (("tool", [tool["function"] for tool in tools or ()]), ("call", calls)):
            for function in functions:
                for part in _parts(function):
                    wanted[part] += 1
                    if _count(text, part) < wanted[part]:
                        raise LostText(f"it does not write {part!r:.80} of the {what} {function['name']!r}")

    def _apply(self, messages: Sequence[Message], tools: Tools | None, *, opens: bool) -> str:
        turns = tool_forms.with_objects(messages) if self._takes_objects else messages
        try:
            return self.apply(turns, opens=opens, tools=tools)
        except TemplateError:
            if (shortened := _with_short_ids(turns)) == turns:
                raise
            return self.apply(shortened, opens=opens, tools=tools)

    @cached_property
    def _shows_tools(self) -> bool:
        """Whether the template writes the tools that it is given."""
        named = [{"type": "function", "function": {**SAMPLE_TOOLS[0]["function"], "name": "w0rd_finder"}}]
        try:
            return "w0rd_finder" in self.apply(SAMPLE_TURNS[:1], opens=True, tools=named)
        except TemplateError:
            return False

    @cached_property
    def _takes_objects(self) -> bool:
        """Whether the template expects a call's arguments as an object, not as JSON text."""
        as_object, as_text = self._sample(tool_forms.with_objects(SAMPLE_TURNS)), self._sample(SAMPLE_TURNS)
        arguments = json.loads(SAMPLE_CALL["function"]["arguments"])  # type: ignore[index]
        written = [json.dumps(arguments, ensure_ascii=False, separators=(",", between)) for between in (": ", ":")]
        if any(each in as_object for each in written):
            return True
        if any(each in as_text for each in written):
            return False
        return _TEXT in as_object and repr(arguments) not in as_object

    def _sample(self, turns: Sequence[Message]) -> str:
        """A sample conversation as the template writes it; empty if it rejects it."""
        try:
            return self.apply(turns, opens=True, tools=SAMPLE_TOOLS)
        except TemplateError:
            return ""


def _involves_tools(messages: Sequence[Message], tools: Tools | None) -> bool:
    return bool(tools) or any(turn.get("tool_calls") or turn.get("role") == "tool" for turn in messages)


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _parts(function: Mapping[str, Any]) -> Iterator[str]:
    """The texts that a template must write of a tool, or of a call."""
    yield function["name"]
    if "arguments" in function:
        yield from _leaves(json.loads(function["arguments"]))
    else:
        yield from function.get("parameters", {}).get("properties", {})


def _leaves(value: Any) -> Iterator[str]:
    """The keys, texts and numbers within a value."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield str(key)
            yield from _leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    elif value is not None and not isinstance(value, bool):
        yield str(value)


def _count(text: str, part: str) -> int:
    """How often a template has written a part of a tool or a call, as it is or as JSON."""
    return sum(text.count(form) for form in {part.strip(), _escaped(part), json.dumps(part)[1:-1]})


def _with_short_ids(messages: Sequence[Message]) -> list[Message]:
    """The turns with ids of calls of nine letters and digits, for templates that require this."""

    def short(call_id: str) -> str:
        return hashlib.sha256(call_id.encode()).hexdigest()[:_ID_LENGTH]

    turns: list[Message] = []
    made: list[str] = []
    for turn in messages:
        if calls := turn.get("tool_calls"):
            made = [short(call.get("id") or f"{len(turns)}.{place}") for place, call in enumerate(calls)]
            turn = {**turn, "tool_calls": [{**call, "id": one} for call, one in zip(calls, made, strict=True)]}
        elif turn["role"] == "tool" and (made or "tool_call_id" in turn):
            # A result without an id answers the first call that has none yet.
            called = short(turn["tool_call_id"]) if "tool_call_id" in turn else made[0]
            made = [one for one in made if one != called]
            turn = {**turn, "tool_call_id": called}
        turns.append(turn)
    return turns
