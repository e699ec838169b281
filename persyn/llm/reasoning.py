"""Split what a model wrote into its reasoning and its answer, by the markers around the reasoning.

Only the model's own text and the template's generation prompt decide, never the text of a turn. Independent of models;
needs only tokenizers.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Markers:
    """What a model writes around its reasoning."""

    opens: str
    closes: str
    #: What is also written around the answer, if the template says so.
    around_answer: tuple[str, str] | None = None
    #: Whether they are words that may open any text, so that they count only if the template names them.
    is_prose: bool = False


#: gpt-oss: from the end of the reasoning to the channel of the next message.
NEXT_MESSAGE = "<|end|><|start|>assistant"
#: gpt-oss: a message in a channel of its own.
HARMONY = Markers("<|channel|>analysis<|message|>", f"{NEXT_MESSAGE}<|channel|>final<|message|>")
#: Also recognised where neither the template nor the tokenizer names them: many models are trained on them later.
COMMON = Markers("<think>", "</think>")
MARKERS = (
    Markers("<think>", "</think>", ("<response>", "</response>")),  # Granite 3.3
    Markers("<think>", "</think>", ("<answer>", "</answer>")),  # Hunyuan
    COMMON,
    HARMONY,
    Markers("[THINK]", "[/THINK]"),
    Markers("<|channel>thought", "<channel|>"),
    Markers("<|START_THINKING|>", "<|END_THINKING|>"),
    Markers("<seed:think>", "</seed:think>"),
    Markers("<thought>", "</thought>"),
    Markers("<thinking>", "</thinking>"),
    Markers("<reasoning>", "</reasoning>"),
    Markers("◁think▷", "◁/think▷"),
    Markers("<|inner_prefix|>", "<|inner_suffix|>"),
    Markers("Here is my thought process:", "Here is my response:", is_prose=True),  # Granite 3.2
)
#: For a text whose template is unknown.
ANY = tuple(each for each in MARKERS if not each.is_prose and each.around_answer is None)

_CHANNEL_TOKENS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")


@dataclass(frozen=True, slots=True)
class Split:
    """A generated text: its reasoning and its answer, both without the whitespace around them.

    The text is the opening marker (unless the generation prompt has it), the reasoning, the closing marker and the
    answer, with whitespace between them. Markers within the answer are part of it. Several messages of gpt-oss in one
    channel are joined by a line break.
    """

    #: None if the model did not reason; empty if its block was cut off before the first word.
    reasoning: str | None
    #: Empty if the text ends inside the reasoning.
    answer: str
    #: The text's length up to the end of the closing marker.
    end: int


@dataclass(frozen=True, slots=True)
class Parts:
    """A response in parts; `reasoning` and `answer` as in `Split`."""

    reasoning: str | None
    answer: str
    #: The tokens of the reasoning and its markers; None if unknown.
    reasoning_tokens: int | None
    #: Whether a stop text ended the answer.
    is_cut: bool


class Reader(Protocol):
    """Splits the responses of one model."""

    #: The model's markers; None if it has none that are known.
    markers: Markers | None
    #: Whether the generation prompt matters.
    reads_prompt: bool

    def read(self, ids: Sequence[int], tail: str, stops: Sequence[str]) -> Parts:
        """Split a response without its end token.

        tail:  what the template writes after the last turn.
        stops: texts that end the response.
        """


def split(text: str, known: Sequence[Markers], opened: Markers | None = None) -> Split:
    """Split a text by the first of the known markers that it begins with.

    opened: the markers whose opening one is already in the generation prompt.
    """
    return _split(text, known, opened, has_channels=HARMONY in known)


def split_unseen(text: str) -> Split:
    """`split` where the generation prompt is unknown: it has opened a block that only one closing marker ends.

    That marker is alone on its line or before an empty line; elsewhere, the text only mentions it.
    """
    for markers in ANY:
        before, closes, after = text.partition(markers.closes)
        is_alone = before.rstrip(" \t").endswith("\n") and after.lstrip(" \t").startswith("\n")
        ends_paragraph = re.match(r"[ \t]*\n[ \t]*\n", after) is not None
        if closes and markers.opens not in before and closes not in after and (is_alone or ends_paragraph):
            return split(text, ANY, markers)
    return split(text, ANY)


def split_opened(text: str) -> Split:
    """`split` where the generation prompt is known to open the reasoning, but not with which marker."""
    opened = min(ANY, key=lambda each: place if (place := text.find(each.closes)) >= 0 else len(text))
    return split(text, ANY, opened)


def _split(text: str, known: Sequence[Markers], opened: Markers | None, *, has_channels: bool, mark: str = "") -> Split:
    """`split`; `mark` is on both sides of each token that is a marker."""
    begin = len(text) - len(text.lstrip())
    if has_channels and opened is None and _channel_pattern(mark).match(text, begin):
        return _split_channels(text, mark)
    markers = opened or next((each for each in known if text.startswith(each.opens, begin)), None)
    if markers is None:
        # Some models close a block that the generation prompt has closed already.
        stray = next((each.closes for each in known if text.startswith(each.closes, begin)), "")
        return Split(None, text[begin + len(stray) :].strip(), begin + len(stray) if stray else 0)
    # Some models open it again.
    start = begin + len(markers.opens) if text.startswith(markers.opens, begin) else 0
    place = text.find(markers.closes, start)
    if place < 0:
        return Split(text[start:].strip(), "", len(text))
    end = place + len(markers.closes)
    answer = text[end:].strip()
    if markers.around_answer and answer.startswith(markers.around_answer[0]):
        answer = answer.removeprefix(markers.around_answer[0]).removesuffix(markers.around_answer[1]).strip()
    return Split(text[start:place].strip() or None, answer, end)


def _split_channels(text: str, mark: str) -> Split:
    """Reasoning is the channel `analysis`; calls of tools stay in the answer, as they were written."""
    reasoning: list[str] = []
    answer: list[str] = []
    calls: list[str] = []
    end = 0
    is_open = False
    for found in _channel_pattern(mark).finditer(text):
        is_call = "to=" in found["before"] + found["to"]
        is_reasoning = found["channel"] == "analysis" and not is_call
        is_open = not found["end"] and (is_reasoning or found["body"] is None)
        if is_call:
            calls.append(found[0])
        elif found["body"] is not None:
            (reasoning if is_reasoning else answer).append(found["body"].strip())
        if not is_reasoning and not end and found["body"] is not None:
            end = found.start("body")
    said = "\n".join(reasoning).strip()
    reasons = bool(reasoning) or is_open
    answered = "\n".join([*answer, *calls]).strip()
    return Split(said if said or is_open else None, answered, (end or len(text)) if reasons else 0)


@lru_cache(maxsize=2)
def _channel_pattern(mark: str) -> re.Pattern[str]:
    """One message of gpt-oss, or as much of it as was generated."""
    start, channel, constrain, message, *ends = (mark + re.escape(token) + mark for token in _CHANNEL_TOKENS)
    words = rf"[^{mark or '<'}]"
    return re.compile(
        rf"(?:{start}assistant)?(?P<before>(?: to={words}{{0,200}})?)"
        rf"{channel}(?P<channel>analysis|commentary|final|\w*\Z)(?P<to>{words}{{0,200}})"
        rf"(?:{constrain}{words}{{0,200}})?(?:{message}(?P<body>.*?))?(?P<end>{'|'.join(ends)}|\Z)",
        re.DOTALL,
    )


class MarkerReader:
    """Splits the responses of one model by its markers; where they are tokens, only these tokens count.

    A marker that the model spells out in other tokens does not end its reasoning.

    known: the markers to look for; none keep the text whole.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, *, known: Sequence[Markers] = MARKERS
    ) -> None:
        added = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
        self._tokenizer = tokenizer
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        named = [each for each in known if _is_named(each, template, added)]
        written = [each for each in named if each.opens in template]
        #: Those that the template writes, or else those of the tokenizer, which other models may share.
        self.markers = next(iter([*written, *named]), None)
        self.reads_prompt = bool(written)
        sought = [*named, *(each for each in known if each == COMMON and each not in named)]
        texts = [text for each in sought for text in (each.opens, each.closes, *(each.around_answer or ()))]
        self._has_channels = HARMONY in sought
        texts += _CHANNEL_TOKENS if self._has_channels else ()
        self._tokens = {added[token]: token for token in added if token and any(token in text for text in texts)}
        #: Each with its form in the decoded text.
        self._sought = {each: self._as_tokens(each) for each in sought}

    def opened(self, tail: str) -> Markers | None:
        """The markers whose block the end of a prompt leaves open."""
        places = ((tail.rfind(each.opens), each) for each in self._sought)
        return next((each for place, each in places if place > tail.rfind(each.closes)), None)

    def read(self, ids: Sequence[int], tail: str, stops: Sequence[str]) -> Parts:
        """Split a response; see `Reader`."""
        opened = self.opened(tail)
        text, is_cut = cut("".join(self._pieces(ids)), stops)
        found = _split(
            text,
            list(self._sought.values()),
            self._sought[opened] if opened else None,
            has_channels=self._has_channels,
            mark="\0",
        )
        reasoning = None if found.reasoning is None else self._plain(found.reasoning)
        return Parts(reasoning, self._plain(found.answer), self._count(ids, text[: found.end]), is_cut)

    def _pieces(self, ids: Sequence[int]) -> Iterator[str]:
        """The decoded text, with NUL characters around markers; other special tokens are left out."""
        begin = 0
        for place in [*(i for i, token in enumerate(ids) if token in self._tokens), len(ids)]:
            if run := list(ids[begin:place]):
                text = self._tokenizer.decode(run, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                yield str(text).replace("\0", "\N{REPLACEMENT CHARACTER}")
            if place < len(ids):
                yield f"\0{self._tokens[ids[place]]}\0"
            begin = place + 1

    def _plain(self, text: str) -> str:
        """The text with the markers that remain in it, except special tokens outside calls of tools."""
        for token_id, token in self._tokens.items():
            is_left_out = token_id in self._special and token not in _CHANNEL_TOKENS
            text = text.replace(f"\0{token}\0", "" if is_left_out else token)
        return text.strip()

    def _count(self, ids: Sequence[int], text: str) -> int:
        """The number of tokens of the beginning of the decoded text."""
        if not text.endswith("\0"):
            return bisect_left(range(len(ids)), len(text), key=lambda n: len("".join(self._pieces(ids[:n]))))
        places = [place for place, token in enumerate(ids) if token in self._tokens]
        return places[text.count("\0") // 2 - 1] + 1

    def _as_tokens(self, markers: Markers) -> Markers:
        """The markers as they appear in the decoded text."""
        pattern = "|".join(re.escape(token) for token in sorted(self._tokens.values(), key=len, reverse=True))

        def marked(text: str) -> str:
            return re.sub(pattern, lambda found: f"\0{found[0]}\0", text) if pattern else text

        around = markers.around_answer
        around = (marked(around[0]), marked(around[1])) if around else None
        return replace(markers, opens=marked(markers.opens), closes=marked(markers.closes), around_answer=around)


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop text, and whether there was one."""
    found = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


def named_in(template: str) -> Markers:
    """The first markers that a template names, those with others around the answer left out; `COMMON` without any."""
    return next((each for each in MARKERS if not each.around_answer and _is_named(each, template, {})), COMMON)


def _is_named(markers: Markers, template: str, added: dict[str, int]) -> bool:
    if markers is HARMONY:
        return "<|channel|>" in template or {"<|channel|>", "<|message|>"} <= added.keys()
    if markers.around_answer and markers.around_answer[0] not in template:
        return False
    if markers.is_prose:
        return markers.opens in template and markers.closes in template
    return any(text in template or text in added for text in (markers.opens, markers.closes))
