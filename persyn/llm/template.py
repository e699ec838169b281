"""Apply a model's chat template, and verify that it loses no part of a conversation.

A template is a program by the model's authors. It may drop a system turn, expect content in another form, or omit
part of a text, all without an error; therefore every turn is located in the rendered text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from operator import eq
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from jinja2 import TemplateError

from persyn.llm.protocols import Message, Tools
from persyn.llm.reasoning import ANY, COMMON, HARMONY, NEXT_MESSAGE, Markers, named_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Spans: TypeAlias = tuple[tuple[int, int], ...]
"""The start and end of each turn's text in a rendered conversation."""


class LostText(TemplateError):
    """The template rendered a conversation without all of its text."""


class Conversation(NamedTuple):
    """A conversation's turns, and its response with the reasoning before it and its calls."""

    messages: Sequence[Message]
    response: str
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tools: Tools | None = None


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
    #: What the template writes between the prompt and a response, such as a space, the opening of the reasoning, or an
    #: empty reasoning block.
    lead: str
    response: str
    #: What the template writes after the response.
    after: str
    #: Of the turns in `given`.
    spans: Spans
    #: None if there is none.
    reasoning: Reasoning | None = None
    #: Whether `response` is the template's own text, as for calls of tools, and may contain special tokens.
    is_rendered: bool = False

    @property
    def written(self) -> str:
        """What the model generates: the reasoning with its closing marker, and the response."""
        return (self.reasoning.written if self.reasoning else "") + self.response

    def reasoned(self, reasoning: str, own: Markers) -> Answered:
        """The same with reasoning between the markers that the prompt opens, or else the template's own.

        It takes the place of an empty block that the template writes before the response.
        """
        opened = next((each for each in ANY if self.given.rstrip().endswith(each.opens)), None)
        for opens, closes in [("", opened.closes)] if opened else [(each.opens, each.closes) for each in ANY]:
            if empty := re.search(rf"{re.escape(opens)}(\s*){re.escape(closes)}", self.lead):
                begin, end = empty.span(1)
                middle = (begin + end) // 2
                block = Reasoning(self.lead[empty.start() : middle], reasoning, self.lead[middle:])
                return replace(self, lead=self.lead[: empty.start()], reasoning=block)
        if opened:
            return replace(self, reasoning=Reasoning("", reasoning, f"\n{opened.closes}\n\n"))
        if own == HARMONY and self.given.endswith("<|start|>assistant"):
            # The lead is the header of the answer's channel.
            return replace(self, lead="", reasoning=Reasoning(own.opens, reasoning, NEXT_MESSAGE + self.lead))
        own = COMMON if own == HARMONY else own
        return replace(self, reasoning=Reasoning(f"{own.opens}\n", reasoning, f"\n{own.closes}\n\n"))


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A response's reasoning as the model writes it, before the response."""

    #: The opening marker, where the model has to write it; empty where the prompt or the template opens the reasoning.
    opening: str
    text: str
    #: The closing marker and the space up to the response.
    closing: str

    @property
    def written(self) -> str:
        """The whole text, up to the response."""
        return self.opening + self.text + self.closing


@dataclass(frozen=True, slots=True)
class Frame:
    """What a template writes around the turns of every conversation with the same roles."""

    #: The turns in the order in which they are rendered: some templates put a system turn before the last user turn.
    order: tuple[int, ...]
    #: The text before, between and after them.
    texts: tuple[str, ...]
    #: Whether the system turn's text must be merged into the first user turn.
    folds: bool


#: The role of a response's reasoning among its turns; `Template.apply` moves it into the assistant's turn.
_REASONING = "reasoning"
#: The forms in which templates take the reasoning of an assistant's turn; the first that works is used.
_FORMS: tuple[Callable[[Message, str], Message], ...] = (
    lambda turn, reasoning: {**turn, "reasoning_content": reasoning},
    lambda turn, reasoning: {**turn, "reasoning": reasoning},
    lambda turn, reasoning: {**turn, "thinking": reasoning},
    lambda turn, reasoning: {
        **turn,
        "content": [{"type": "thinking", "thinking": reasoning}, {"type": "text", "text": turn["content"]}],
    },
)
#: Around the reasoning of a base model.
OPENING, CLOSING = f"{COMMON.opens}\n", f"\n{COMMON.closes}\n\n"


class Template:
    """A tokenizer's chat template; raises `TemplateError` for what it rejects, `LostText` for what it would lose.

    variables: the values of the template's own variables, such as {"enable_thinking": False}.
    """

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

    def answered(self, conversation: Conversation) -> Answered:
        """Render a conversation without tools, with its response: all of it, even where the template would omit a part.

        If a template changes a response, only the text before and after it is taken from it. The reasoning is written
        as the template writes it, if it can; otherwise between the markers that the prompt opens, those that the
        template names, or <think> and </think>.
        """
        messages, response, reasoning, *_ = conversation
        prompt = self.prompt(messages)
        turn: Message = {"role": "assistant", "content": response}
        if reasoning is None or self.takes_reasoning:
            with suppress(LostText):
                turns = [*messages, *self._reasoning_turn(reasoning), turn]
                return self._parted(prompt, self.finished(turns), has_reasoning=reasoning is not None)
        frame = self.frame((*(each["role"] for each in messages), "assistant"), opens=False)
        bare, after = prompt.text[: prompt.spans[-1][1]] + frame.texts[-2], frame.texts[-1]
        if reasoning is not None:
            lead = bare.removeprefix(prompt.text) if bare.startswith(prompt.text) else ""
            return Answered(prompt.text, lead, response, after, prompt.spans).reasoned(reasoning, self._markers)
        return Answered(self._given(prompt.text, bare, response), "", response, after, prompt.spans)

    @staticmethod
    def _reasoning_turn(reasoning: str | None) -> list[Message]:
        """What stands for the reasoning in a conversation, before the response's turn."""
        return [] if reasoning is None else [{"role": _REASONING, "content": reasoning}]

    @staticmethod
    def _parted(prompt: Written, whole: Written, *, has_reasoning: bool) -> Answered:
        """The parts of a finished conversation; its last turns are the reasoning, if there is one, and the response."""
        *_, (_, asked), first = whole.spans[:-1] if has_reasoning else whole.spans
        begin, end = whole.spans[-1]
        before = prompt.text[: prompt.spans[-1][1]] + whole.text[asked : first[0]]
        given = prompt.text if before.startswith(prompt.text) else before
        block = Reasoning("", whole.text[slice(*first)], whole.text[first[1] : begin]) if has_reasoning else None
        lead, response, after = before[len(given) :], whole.text[begin:end], whole.text[end:]
        return Answered(given, lead, response, after, prompt.spans, block)

    @cached_property
    def takes_reasoning(self) -> bool:
        """Whether the template writes the reasoning of a response."""
        return self._form is not None

    @cached_property
    def _markers(self) -> Markers:
        """The template's own markers of reasoning."""
        return named_in(str(self._tokenizer.chat_template or ""))

    @cached_property
    def _form(self) -> Callable[[Message, str], Message] | None:
        asked = {"role": "user", "content": marker(0)}
        for form in _FORMS:
            turn = form({"role": "assistant", "content": marker(2)}, marker(1))
            try:
                text = self._rendered([asked, turn], opens=False)
                frame_of(text, ("user", _REASONING, "assistant"), folds=False)
            except TemplateError:
                continue
            # A template that knows no parts writes Python's form of the list.
            if isinstance(turn["content"], str) or str(turn["content"]) not in text:
                return form
        return None

    def frame(self, roles: tuple[str, ...], *, opens: bool) -> Frame:
        """The text around turns with these roles.

        opens: whether the assistant's turn is opened after the last of them.
        """
        found = self._frames.get((opens, roles))
        return self._learn(roles, opens=opens) if found is None else found

    def apply(self, messages: Sequence[Message], *, opens: bool, **variables: Any) -> str:
        """The template's unmodified output, with `variables` set in it."""
        turns: list[Message] = []
        reasoning: str | None = None
        for turn in messages:
            if turn["role"] == _REASONING:
                reasoning = turn["content"]
                continue
            turns.append(turn if reasoning is None or self._form is None else self._form(turn, reasoning))
            reasoning = None
        return self._rendered(turns, opens=opens, **variables)

    def _rendered(self, messages: Sequence[Message], *, opens: bool, **variables: Any) -> str:
        turns = [_in_parts(turn) for turn in messages] if self._as_parts else list(messages)
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
            return marker(0) in self.apply([{"role": "user", "content": marker(0)}], opens=True)
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
        text = self.apply(fold_system(messages) if frame.folds else messages, opens=opens)
        spans = match(frame, text, contents)
        if spans is not None:
            return Written(text, spans)
        # A template may insert the date, or choose the surrounding text by a turn's content.
        frame = self._learn(roles, opens=opens)
        spans = match(frame, text, contents)
        if spans is not None:
            return Written(text, spans)
        return Written(text, search(frame, text, contents, roles), is_framed=False)

    def _learn(self, roles: tuple[str, ...], *, opens: bool) -> Frame:
        """Render unique markers as turns; a system turn that is rejected or lost is merged into the first user turn."""
        turns = [{"role": role, "content": marker(number)} for number, role in enumerate(roles)]
        try:
            frame = frame_of(self.apply(turns, opens=opens), roles, folds=False)
        except TemplateError:
            if "system" not in roles:
                raise
            frame = frame_of(self.apply(fold_system(turns), opens=opens), roles, folds=True)
        self._frames[opens, roles] = frame
        return frame


def _in_parts(turn: Message) -> Message:
    """A turn whose content is a list of parts."""
    content = turn["content"]
    return {**turn, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else turn


def marker(number: int) -> str:
    """A marker that stands for the text of a turn."""
    return f"\N{OBJECT REPLACEMENT CHARACTER}{number}\N{OBJECT REPLACEMENT CHARACTER}"


def frame_of(text: str, roles: tuple[str, ...], *, folds: bool) -> Frame:
    """The frame of a text with markers as turns; `LostText` unless each marker occurs exactly once, in order."""
    marks = [marker(number) for number in range(len(roles))]
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


def match(frame: Frame, text: str, contents: Sequence[str]) -> Spans | None:
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


def search(frame: Frame, text: str, contents: Sequence[str], roles: Sequence[str]) -> Spans:
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


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """Remove a system turn by prepending its text to the first user turn."""
    system = "".join(f"{m['content']}\n\n" for m in messages if m["role"] == "system")
    turns = [dict(m) for m in messages if m["role"] != "system"]
    for turn in turns:
        if turn["role"] == "user":
            turn["content"] = system + turn["content"]
            break
    return turns
