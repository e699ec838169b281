"""Apply a model's chat template, and verify that it loses no part of a conversation.

A template is a program by the model's authors. It may drop a system turn, expect content in another form, or omit
part of a text, all without an error; therefore every turn is located in the rendered text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import eq
from typing import TYPE_CHECKING, Any, TypeAlias

from jinja2 import TemplateError

from persyn.llm.protocols import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Spans: TypeAlias = tuple[tuple[int, int], ...]
"""The start and end of each turn's text in a rendered conversation."""


class LostText(TemplateError):
    """The template rendered a conversation without all of its text."""


@dataclass(frozen=True, slots=True)
class Written:
    """A rendered conversation."""

    text: str
    spans: Spans
    #: Whether the text around the turns is the same for every conversation with these roles.
    is_framed: bool = True


@dataclass(frozen=True, slots=True)
class Answered:
    """A rendered conversation with its response; the text parts, in this order, form the whole."""

    #: The generation prompt.
    given: str
    #: What the template writes between the prompt and a response, such as a space or an empty reasoning block.
    lead: str
    response: str
    #: What the template writes after the response.
    after: str
    #: Of the turns in `given`.
    spans: Spans


@dataclass(frozen=True, slots=True)
class Frame:
    """What a template writes around the turns of every conversation with the same roles."""

    #: The turns in the order in which they are rendered: some templates put a system turn before the last user turn.
    order: tuple[int, ...]
    #: The text before, between and after them.
    texts: tuple[str, ...]
    #: Whether the system turn's text must be merged into the first user turn.
    folds: bool


class Template:
    """A tokenizer's chat template; raises `TemplateError` for what it rejects, `LostText` for what it would lose."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self.variables = dict(variables or {})
        self._frames: dict[tuple[bool, tuple[str, ...]], Frame] = {}
        #: Some templates, mostly of multimodal models, accept content only as a list of parts.
        self._as_parts = False
        self._as_parts = not self._shows_text() and self._shows_text(as_parts=True)

    def prompt(self, messages: Sequence[Message]) -> Written:
        """Render the conversation up to the beginning of the assistant's turn."""
        return self._write(messages, opens=True)

    def finished(self, messages: Sequence[Message]) -> Written:
        """Render the conversation with every turn closed."""
        return self._write(messages, opens=False)

    def answered(self, messages: Sequence[Message], response: str) -> Answered:
        """Render the conversation with a response, which is kept in full even if the template would omit part of it.

        If a template changes a response, e.g. drops its reasoning, only the text before and after it is taken from it.
        """
        prompt = self.prompt(messages)
        stem = prompt.text[: prompt.spans[-1][1]]
        turns = [*messages, {"role": "assistant", "content": response}]
        try:
            whole = self.finished(turns)
        except LostText:
            frame = self.frame(tuple(turn["role"] for turn in turns), opens=False)
            given = self._given(prompt.text, stem + frame.texts[-2], response)
            return Answered(given, "", response, frame.texts[-1], prompt.spans)
        begin, end = whole.spans[-1]
        before = stem + whole.text[whole.spans[-2][1] : begin]
        given = prompt.text if before.startswith(prompt.text) else before
        return Answered(given, before[len(given) :], whole.text[begin:end], whole.text[end:], prompt.spans)

    def frame(self, roles: tuple[str, ...], *, opens: bool) -> Frame:
        """The text around turns with these roles.

        opens: whether the assistant's turn is opened after the last of them.
        """
        found = self._frames.get((opens, roles))
        return self._learn(roles, opens=opens) if found is None else found

    def apply(self, messages: Sequence[Message], *, opens: bool, **variables: Any) -> str:
        """The template's unmodified output, with `variables` set in it."""
        turns: list[Any] = list(messages)
        if self._as_parts:
            turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
        try:
            text: Any = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=opens, **{**self.variables, **variables}
            )
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            # Templates can raise anything to reject a conversation.
            raise TemplateError(str(error)) from error
        return str(text)

    @staticmethod
    def _given(prompt: str, bare: str, response: str) -> str:
        """Remove the reasoning opening from the prompt if the response already begins with it."""
        opening = prompt.removeprefix(bare).strip() if prompt.startswith(bare) else ""
        return bare if opening and response.lstrip().startswith(opening) else prompt

    def _shows_text(self, *, as_parts: bool = False) -> bool:
        """Whether a user turn's text appears in the prompt when content has this form."""
        self._as_parts = as_parts
        try:
            return _mark(0) in self.apply([{"role": "user", "content": _mark(0)}], opens=True)
        except TemplateError:
            return False

    def _write(self, messages: Sequence[Message], *, opens: bool) -> Written:
        try:
            roles = tuple(turn["role"] for turn in messages)
            contents = [turn["content"] for turn in messages]
        except KeyError as error:
            raise TemplateError(f"a turn has no {error}") from error
        if not roles:
            raise TemplateError("the conversation has no turn")
        frame = self.frame(roles, opens=opens)
        text = self.apply(_fold_system(messages) if frame.folds else messages, opens=opens)
        spans = _match(frame, text, contents)
        if spans is not None:
            return Written(text, spans)
        # A template may insert the date, or choose the surrounding text by a turn's content.
        frame = self._learn(roles, opens=opens)
        spans = _match(frame, text, contents)
        if spans is not None:
            return Written(text, spans)
        return Written(text, _search(frame, text, contents, roles), is_framed=False)

    def _learn(self, roles: tuple[str, ...], *, opens: bool) -> Frame:
        """Render unique markers as turns; a system turn that is rejected or lost is merged into the first user turn."""
        turns = [{"role": role, "content": _mark(number)} for number, role in enumerate(roles)]
        try:
            frame = _frame(self.apply(turns, opens=opens), roles, folds=False)
        except TemplateError:
            if "system" not in roles:
                raise
            frame = _frame(self.apply(_fold_system(turns), opens=opens), roles, folds=True)
        self._frames[opens, roles] = frame
        return frame


def _mark(number: int) -> str:
    """A marker that stands for the text of a turn."""
    return f"\N{OBJECT REPLACEMENT CHARACTER}{number}\N{OBJECT REPLACEMENT CHARACTER}"


def _frame(text: str, roles: tuple[str, ...], *, folds: bool) -> Frame:
    """The frame of a text with markers as turns; `LostText` unless each marker occurs exactly once, in order."""
    marks = [_mark(number) for number in range(len(roles))]
    for mark, role in zip(marks, roles, strict=True):
        if (count := text.count(mark)) != 1:
            raise LostText(f"it {f'repeats {count} times' if count else 'drops'} the text of the {role} turn")
    places = [text.index(mark) for mark in marks]
    others = [place for place, role in zip(places, roles, strict=True) if role != "system"]
    if others != sorted(others) or places[-1] != max(places):
        raise LostText("it writes the turns in another order")
    order = tuple(sorted(range(len(roles)), key=places.__getitem__))
    texts = []
    end = 0
    for turn in order:
        texts.append(text[end : places[turn]])
        end = places[turn] + len(marks[turn])
    return Frame(order, (*texts, text[end:]), folds)


def _match(frame: Frame, text: str, contents: Sequence[str]) -> Spans | None:
    """Locate the contents in a text that consists of the frame and the contents, ignoring surrounding whitespace."""
    spans = [(0, 0)] * len(contents)
    start = len(frame.texts[0])
    if not text.startswith(frame.texts[0]):
        return None
    for turn, following in zip(frame.order, frame.texts[1:], strict=True):
        end = _end(text, start, contents[turn], following)
        if end is None:
            return None
        spans[turn] = (start, end)
        start = end + len(following)
    return tuple(spans) if start == len(text) else None


def _end(text: str, start: int, content: str, following: str) -> int | None:
    """The end of a content that begins at `start` and is directly followed by `following`."""
    end = start + len(content)
    if text.startswith(content, start) and text.startswith(following, end):
        return end
    core = content.strip()
    before, after = content[: content.find(core)], content[len(content.rstrip()) :]
    begin = text.find(core, start, end)
    if not core or begin < 0 or not before.endswith(text[start:begin]):
        return None
    end = begin + len(core)
    kept = sum(takewhile(bool, map(eq, after, text[end : end + len(after)])))
    return next((end + n for n in range(kept, -1, -1) if text.startswith(following, end + n)), None)


def _search(frame: Frame, text: str, contents: Sequence[str], roles: Sequence[str]) -> Spans:
    """Locate the contents in a text that does not match the frame; `LostText` if the result is ambiguous."""
    spans = [(0, 0)] * len(contents)
    place = 0
    for turn in frame.order:
        core = contents[turn].strip()
        is_last = turn == frame.order[-1]
        begin = text.rfind(core, place) if is_last else text.find(core, place)
        if not core or begin < 0 or any(core in fixed for fixed in frame.texts):
            raise LostText(f"it does not write the text of turn {turn + 1} ({roles[turn]}) in full")
        place = begin + len(core)
        spans[turn] = (begin, place)
    return tuple(spans)


def _fold_system(messages: Sequence[Message]) -> list[Message]:
    """Remove a system turn by prepending its text to the first user turn."""
    system = "".join(f"{m['content']}\n\n" for m in messages if m["role"] == "system")
    turns = [dict(m) for m in messages if m["role"] != "system"]
    for turn in turns:
        if turn["role"] == "user":
            turn["content"] = system + turn["content"]
            break
    return turns
