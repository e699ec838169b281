"""Turn a conversation into a model's tokens, by its chat template or, for a base model, as plain turns.

Teachers, scorers and the router all use this module, so that a conversation has the same form for
each of them. Independent of models; needs only tokenizers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from persyn.errors import EngineError
from persyn.llm import lean, loading
from persyn.llm.protocols import Message, ModelSpec, Tools
from persyn.llm.template import CLOSING, OPENING, Answered, Conversation, Reasoning, Spans, Written
from persyn.llm.tool_template import ToolTemplate
from persyn.llm.tools import written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Tokens whose only purpose is to begin a text. Other tokens that are declared as BOS (Qwen's end-of-text,
#: SmolLM2's turn marker) never precede plain text in training and must not be listed here.
_BEGIN_TOKENS = frozenset({"<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "<|begin▁of▁sentence|>"})

#: Ends a base model's turn; without a template, nothing else makes it stop.
PLAIN_STOP = "\nUser:"


class EncodedResponse(NamedTuple):
    """A conversation with its response as token ids, up to the end token."""

    ids: list[int]
    #: Index in `ids` where the response begins, with its reasoning if there is one.
    start: int
    #: Index where the answer begins, after the reasoning and its closing marker; None without reasoning.
    answer: int | None = None


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer from its folder or the local hub cache; `EngineError` when it has none."""
    lean.import_transformers()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(spec.model, revision=spec.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise loading.explain(spec, error, "no tokenizer for") from error


class Chat:
    """A tokenizer and the form in which its model expects a conversation.

    add_bos:   whether plain text begins with the BOS token; None decides by the token's purpose.
               A chat template adds its own.
    variables: see `Template`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        add_bos: bool | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        #: None for a base model, whose conversations are written as plain turns.
        self.template = None if tokenizer.chat_template is None else ToolTemplate(tokenizer, variables)
        expects_bos = tokenizer.bos_token in _BEGIN_TOKENS if add_bos is None else add_bos
        added = tokenizer.added_tokens_decoder.items()
        self._special = {*tokenizer.all_special_ids, *(token_id for token_id, token in added if token.special)}
        #: Cached because the texts that a template puts around turns are always the same few.
        self._count_special = lru_cache(lambda text: sum(token in self._special for token in self.encode(text)))
        self._bos = str(tokenizer.bos_token) if expects_bos and tokenizer.bos_token else ""
        self._turn_end = self._find_turn_end()
        #: The token that closes an assistant turn: the one the template puts after it, or EOS.
        self.end_id = self._find_end_id()

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self.template is not None

    @property
    def ends_turns(self) -> bool:
        """Whether the template closes a turn with a token; otherwise EOS ends a response."""
        return self._turn_end is not None

    def prompt_text(self, messages: Sequence[Message], tools: Tools | None = None) -> str:
        """The conversation up to the beginning of the assistant's turn.

        Raises `TemplateError` when the template rejects it or would lose a part of it.
        """
        return self._prompt(messages, tools).text

    def plain_text(self, messages: Sequence[Message], tools: Tools | None = None) -> str:
        """`prompt_text` without a template; never fails."""
        turns = [f"Tools: {json.dumps(tools, ensure_ascii=False)}\n"] if tools else []
        for message in messages:
            name = {"user": "User: ", "assistant": "Assistant: ", "tool": "Tool: "}.get(message["role"], "")
            turns.append(f"{name}{written(message)}\n")
        return self._bos + "".join(turns) + "Assistant:"

    def prompt_ids(self, messages: Sequence[Message], tools: Tools | None = None) -> list[int]:
        """`prompt_text` as token ids; no special token is added beyond those in the text.

        A special token spelled out in a turn is encoded as plain characters; it cannot end or begin a turn.
        """
        prompt = self._prompt(messages, tools)
        return self._as_turns(self.encode(prompt.text), prompt.text, prompt.spans)

    def response_ids(self, conversation: Conversation) -> EncodedResponse:
        """The whole conversation as token ids; may raise `TemplateError`.

        Text that the template writes between the prompt and what the model writes belongs to the prompt. Everything is
        tokenised as one text. A token that spans the end of that text and the beginning of the response, such as
        "▁Paris", is the response's first token, and one that spans the reasoning's end and the answer's beginning is
        the answer's. No token spans the end of the generation prompt: where one would, the response is tokenised
        separately. A special token spelled out in the response or its reasoning is encoded as plain characters and ends
        nothing. Calls are written by the template, after the response's text.
        """
        (found,) = self.all_response_ids([conversation])
        if isinstance(found, TemplateError):
            raise found
        return found

    def all_response_ids(self, conversations: Sequence[Conversation]) -> list[EncodedResponse | TemplateError]:
        """`response_ids` of many conversations, much faster; a `TemplateError` is returned in place of its result."""
        found = [self._answered_or_refusal(conversation) for conversation in conversations]
        answered = [each for each in found if isinstance(each, Answered)]
        # A prompt that several teachers answered is tokenised once.
        texts = ((text, each.spans) for each in answered for text in (each.given, each.given + each.lead))
        known = list(dict.fromkeys(texts))
        ids = self._encode_all([text for text, _ in known])
        prompts = {key: self._as_turns(found, *key) for key, found in zip(known, ids, strict=True)}
        wholes = iter(self._encode_all([each.given + each.lead + self._written(each) for each in answered]))
        return [
            self._joined(
                each, prompts[each.given, each.spans], prompts[each.given + each.lead, each.spans], next(wholes)
            )
            if isinstance(each, Answered)
            else each
            for each in found
        ]

    def frame_ids(self, conversation: Conversation) -> list[int]:
        """The prompt without its turns: the ids of what the template writes around them, up to the response.

        May raise `TemplateError`.
        """
        answered = self._answered_or_refusal(conversation)
        if isinstance(answered, TemplateError):
            raise answered
        if self.template is None:
            return self.encode(f"{self._bos}Assistant:")
        text, ends = answered.given + answered.lead, [0, *(end for _, end in sorted(answered.spans))]
        begins = [*(begin for begin, _ in sorted(answered.spans)), len(text)]
        return self.encode("".join(text[end:begin] for end, begin in zip(ends, begins, strict=True)))

    def _prompt(self, messages: Sequence[Message], tools: Tools | None = None) -> Written:
        if self.template is not None:
            self._refuse_special(messages, tools)
            return self.template.prompt(messages, tools)
        text = self.plain_text(messages, tools)
        return Written(text, ((len(self._bos), len(text)),))

    def _refuse_special(self, messages: Sequence[Message], tools: Tools | None) -> None:
        """Raise `TemplateError` if a tool or a call spells out a special token: its place in the text is unknown."""
        calls = [turn["tool_calls"] for turn in messages if turn.get("tool_calls")]
        if not (self._special and (tools or calls)):
            return
        if token := self._special_texts().search(json.dumps([tools, calls], ensure_ascii=False)):
            raise TemplateError(f"a tool or a call contains the special token {token[0]!r}")

    def _answered_or_refusal(self, conversation: Conversation) -> Answered | TemplateError:
        messages, response, reasoning, tool_calls, tools = conversation
        try:
            turn = {"role": "assistant", "content": response, "tool_calls": tool_calls}
            if self.template is None:
                prompt = self._prompt(messages, tools)
                # A plain "Assistant:" is followed by a space, which the model itself generates.
                text = written(turn)
                if reasoning is None:
                    return Answered(prompt.text, "", f" {text}", "", prompt.spans)
                block = Reasoning(f" {OPENING}", reasoning, CLOSING)
                return Answered(prompt.text, "", text, "", prompt.spans, block)
            self._refuse_special([*messages, turn], tools)
            return self.template.answered(conversation)
        except TemplateError as error:
            return error

    def _written(self, answered: Answered) -> str:
        """The text the model generates: reasoning, response, and what the template puts before the end token."""
        return answered.written + self._ending(answered)

    def _ending(self, answered: Answered) -> str:
        return answered.after.partition(self._turn_end)[0] if self._turn_end else ""

    def _joined(self, answered: Answered, given: list[int], prompt: list[int], whole: list[int]) -> EncodedResponse:
        """The result of `response_ids`, from the ids of the prompt, of the prompt plus lead, and of the whole."""
        start = _shared(prompt, whole)
        is_whole = start == len(prompt) or (answered.lead and start >= _shared(given, whole) == len(given))
        if is_whole and not self._has_foreign_special(answered, whole[start:]):
            return self._with_answer(answered, [*whole, self.end_id], start, answered.given + answered.lead)
        # A whitespace lead is merged into the response's first token.
        before, lead = (prompt, "") if answered.lead.strip() else (given, answered.lead)
        text = lead + self._written(answered)
        ids = self.encode(text)
        if not self._has_foreign_special(answered, ids):
            written = self._with_answer(answered, [*ids, self.end_id], 0, lead)
            answer = None if written.answer is None else len(before) + written.answer
            return EncodedResponse([*before, *written.ids], len(before), answer)
        reasoning, encode = answered.reasoning, self._encode_as_characters
        of_reasoning = (
            [*self.encode(lead + reasoning.opening), *encode(reasoning.text), *self.encode(reasoning.closing)]
            if reasoning
            else []
        )
        encode = self.encode if answered.is_rendered else encode
        of_answer = encode(("" if reasoning else lead) + answered.response + self._ending(answered))
        answer = len(before) + len(of_reasoning) if reasoning else None
        return EncodedResponse([*before, *of_reasoning, *of_answer, self.end_id], len(before), answer)

    def _with_answer(self, answered: Answered, ids: list[int], start: int, before: str) -> EncodedResponse:
        """Find where the answer begins in ids; `before` is their text up to what the model writes."""
        if answered.reasoning is None:
            return EncodedResponse(ids, start)
        return EncodedResponse(ids, start, max(start, _shared(self.encode(before + answered.reasoning.written), ids)))

    def _has_foreign_special(self, answered: Answered, ids: Sequence[int]) -> bool:
        """Whether what the model writes, with these ids, spells out a special token outside the reasoning's markers."""
        if self._special.isdisjoint(ids):
            return False
        reasoning = answered.reasoning
        markers = (reasoning.opening, reasoning.closing) if reasoning else ()
        if sum(token in self._special for token in ids) == sum(map(self._count_special, markers)):
            return False
        texts = [reasoning.text] if reasoning else []
        if not answered.is_rendered:
            texts.append(answered.response + self._ending(answered))
        return any(self.encode(text) != self._encode_as_characters(text) for text in texts)

    def conversation_ids(
        self,
        messages: Sequence[Message],
        response: str,
        tool_calls: list[dict[str, Any]] | None = None,
        tools: Tools | None = None,
    ) -> list[int]:
        """The finished conversation as a reward model reads it, including the template's closing text.

        Here too, a special token spelled out in a turn is encoded as plain characters.
        """
        if self.template is None:
            return self.response_ids(Conversation(messages, response, None, tool_calls, tools)).ids
        turn: Message = {"role": "assistant", "content": response}
        turns = [*messages, turn | {"tool_calls": tool_calls} if tool_calls else turn]
        self._refuse_special(turns, tools)
        whole = self.template.finished(turns, tools)
        plain = self.encode(whole.text)
        ids = self._as_turns(plain, whole.text, whole.spans)
        if ids != plain and not whole.is_framed:
            raise TemplateError("the text it puts around a response depends on the response")
        return ids

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that already contains every special token it needs."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        """`encode` of many texts, in parallel where the tokenizer supports it."""
        ids: list[list[int]] = (
            self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"] if texts else []
        )
        return ids

    def _encode_as_characters(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def _as_turns(self, ids: list[int], text: str, spans: Spans) -> list[int]:
        """The given ids of a text, or corrected ones if a turn spells out a special token."""
        begins, ends = zip(*sorted(spans), strict=True)
        around = [text[begin:end] for begin, end in zip((0, *ends), (*begins, len(text)), strict=True)]
        if sum(token in self._special for token in ids) == sum(map(self._count_special, around)):
            return ids
        tokens = list(self._special_texts().finditer(text))
        outside = [t for t in tokens if not any(t.start() < end and begin < t.end() for begin, end in spans)]
        if len(outside) == len(tokens):
            return ids
        found: list[int] = []
        place = 0
        for token in outside:
            found += [*self._encode_as_characters(text[place : token.start()]), *self.encode(token[0])]
            place = token.end()
        return found + self._encode_as_characters(text[place:])

    def _special_texts(self) -> re.Pattern[str]:
        texts = [str(token) for token in self.tokenizer.convert_ids_to_tokens(sorted(self._special))]
        return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))

    def _find_turn_end(self) -> str | None:
        """The text of the first token that the template puts after a response; None if there is none."""
        if self.template is None:
            return None
        try:
            closing = self.template.answered(Conversation([{"role": "user", "content": "a"}], "b")).after
        except TemplateError:
            return None  # reported later, for each prompt
        added = self.tokenizer.added_tokens_decoder
        special = {*self.tokenizer.all_special_ids, *added}
        token = next((token for token in self.encode(closing) if token in special), None)
        return None if token is None else str(self.tokenizer.convert_ids_to_tokens(token))

    def _find_end_id(self) -> int:
        token = self.tokenizer.eos_token_id
        if self._turn_end is not None:
            token = self.tokenizer.convert_tokens_to_ids(self._turn_end)
        if token is None:
            raise EngineError(f"the tokenizer of {self.tokenizer.name_or_path!r} has no end-of-text token")
        return int(token)


def _shared(some: Sequence[int], others: Sequence[int]) -> int:
    """The length of the common prefix of two sequences."""
    if some == others[: len(some)]:
        return len(some)
    return next(n for n, (one, other) in enumerate(zip(some, [*others, None], strict=False)) if one != other)
