"""How a conversation becomes a model's tokens: its chat template, or a plain form for a base model.

Teachers, scorers and the router all go through here, so that a conversation looks the same to
each of them. Knows tokenizers, no models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from persyn.errors import EngineError
from persyn.llm.protocols import Message, ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Tokens that exist only to begin a text. Others named as BOS (Qwen's end-of-text, SmolLM2's
#: turn marker) are not put before plain text in training, and must not be here.
_BEGIN_TOKENS = frozenset({"<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "<|begin▁of▁sentence|>"})

#: Ends a base model's turn: without a template nothing else tells it to stop.
PLAIN_STOP = "\nUser:"

#: Stands for a response, to see what a template puts around it.
_PLACE = "\N{OBJECT REPLACEMENT CHARACTER}"


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The model's tokenizer, from its folder or the local hub cache; `EngineError` when it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(spec.model, revision=spec.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise EngineError(f"no tokenizer for {spec.model!r}: {error}") from error


class Chat:
    """A tokenizer and the form in which its model expects a conversation.

    add_bos: whether plain text begins with the BOS token; None decides by what the token is for.
             A chat template brings its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, add_bos: bool | None = None) -> None:
        self.tokenizer = tokenizer
        self.has_template = tokenizer.chat_template is not None
        expects_bos = tokenizer.bos_token in _BEGIN_TOKENS if add_bos is None else add_bos
        #: What stands between the prompt and a response; a plain "Assistant:" is followed by a space.
        self._lead = "" if self.has_template else " "
        added = tokenizer.added_tokens_decoder.items()
        self._special = {*tokenizer.all_special_ids, *(token_id for token_id, token in added if token.special)}
        self._bos = str(tokenizer.bos_token) if expects_bos and tokenizer.bos_token else ""
        self.end_id = self._find_end_id()

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The conversation up to where the assistant's turn begins; `TemplateError` when the template refuses it."""
        if not self.has_template:
            return self.plain_text(messages)
        try:
            return self._apply(messages)
        except TemplateError:
            # Some templates know no system turn; what it says then opens the first user turn.
            return self._apply(_fold_system(messages))

    def plain_text(self, messages: Sequence[Message]) -> str:
        """`prompt_text` without a template, which nothing refuses."""
        turns = []
        for message in messages:
            name = {"user": "User: ", "assistant": "Assistant: "}.get(message["role"], "")
            turns.append(f"{name}{message['content']}\n")
        return self._bos + "".join(turns) + "Assistant:"

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """`prompt_text` as token ids; no special token is added that the text does not hold."""
        return self.encode(self.prompt_text(messages))

    def response_ids(self, messages: Sequence[Message], response: str) -> tuple[list[int], int]:
        """The whole conversation as token ids, and where the response begins in them; `TemplateError` when refused.

        returns: (ids, n): ids[:n] is the prompt, ids[n:] the response and its end token. The text is
                 tokenised at one go; where a token would straddle the boundary, the response is
                 tokenised by itself, so that ids[:n] is always what the model is given to answer.
                 A special token that is spelt out in the response is so many characters, and ends nothing.
        """
        (found,) = self.all_response_ids([(messages, response)])
        if isinstance(found, TemplateError):
            raise found
        return found

    def all_response_ids(
        self, conversations: Sequence[tuple[Sequence[Message], str]]
    ) -> list[tuple[list[int], int] | TemplateError]:
        """`response_ids` of many, at a fraction of the time; the error itself for one that the template refuses."""
        prompts = [self._prompt_or_refusal(messages) for messages, _ in conversations]
        texts = [text if isinstance(text, str) else "" for text in prompts]
        # What several teachers answered is read once.
        known = list(dict.fromkeys(texts))
        prompt_ids = dict(zip(known, self._encode_all(known), strict=True))
        written = [self._lead + response for _, response in conversations]
        wholes = self._encode_all([text + more for text, more in zip(texts, written, strict=True)])
        return [
            self._joined(prompt_ids[prompt], more, ids) if isinstance(prompt, str) else prompt
            for prompt, more, ids in zip(prompts, written, wholes, strict=True)
        ]

    def _prompt_or_refusal(self, messages: Sequence[Message]) -> str | TemplateError:
        try:
            return self.prompt_text(messages)
        except TemplateError as error:
            return error

    def _joined(self, prompt: list[int], written: str, whole: list[int]) -> tuple[list[int], int]:
        """What `response_ids` returns, of a prompt's ids, what follows it, and the ids of both as one text."""
        ids = whole[len(prompt) :] if whole[: len(prompt)] == prompt else self.encode(written)
        if self._spells_special(written, ids):
            ids = self._encode_as_characters(written)
        return [*prompt, *ids, self.end_id], len(prompt)

    def conversation_ids(self, messages: Sequence[Message], response: str) -> list[int]:
        """The finished conversation as a reward model reads it: the template's own closing included.

        A special token that is spelt out in the response is so many characters here too.
        """
        if not self.has_template:
            return self.response_ids(messages, response)[0]
        text = self._finished_text(messages, response)
        if not self._spells_special(response, self.encode(response)):
            return self.encode(text)
        before, _, after = self._finished_text(messages, _PLACE).rpartition(_PLACE)
        shown = text[len(before) : len(text) - len(after)]
        if before + shown + after != text:
            raise TemplateError("what it puts around a response depends on the response")
        return self.encode(before) + self._encode_as_characters(shown) + self.encode(after)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that already holds every special token it needs."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        """`encode` of many, on several cores where the tokenizer can."""
        ids: list[list[int]] = (
            self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"] if texts else []
        )
        return ids

    def _encode_as_characters(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def _spells_special(self, text: str, ids: Sequence[int]) -> bool:
        """Whether a special token is spelt out in a text with these ids; one that stands for the unknown is not."""
        return not self._special.isdisjoint(ids) and self.encode(text) != self._encode_as_characters(text)

    def _finished_text(self, messages: Sequence[Message], response: str) -> str:
        turns = [*messages, {"role": "assistant", "content": response}]
        try:
            return self._apply(turns, add_generation_prompt=False)
        except TemplateError:
            return self._apply(_fold_system(turns), add_generation_prompt=False)

    def _apply(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        try:
            text: Any = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TypeError, ValueError, LookupError) as error:
            # A template is a program of the model's maker and refuses in whatever way it likes.
            raise TemplateError(str(error)) from error
        return str(text)

    def _find_end_id(self) -> int:
        """The token that closes an assistant's turn: what the template puts after it, or EOS."""
        eos = self.tokenizer.eos_token_id
        if self.has_template:
            probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            try:
                closing = self._apply(probe, add_generation_prompt=False).rpartition("b")[2]
            except TemplateError:
                closing = ""  # whoever comes with a prompt is told
            special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
            found = next((token for token in self.encode(closing) if token in special), None)
            if found is not None:
                return found
        if eos is None:
            raise EngineError(f"the tokenizer of {self.tokenizer.name_or_path!r} has no end-of-text token")
        return int(eos)


def _fold_system(messages: Sequence[Message]) -> list[Message]:
    """The same conversation without a system turn: its text opens the first user turn."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    turns = [dict(m) for m in messages if m["role"] != "system"]
    for turn in turns:
        if system and turn["role"] == "user":
            turn["content"] = f"{system}\n\n{turn['content']}"
            break
    return turns
