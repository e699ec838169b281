"""Reasoning on vLLM: split responses by its parsers, limit the reasoning, and bind only the answer to a schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from persyn.errors import PermanentError, shorten
from persyn.llm.chat import Chat
from persyn.llm.options import VllmOptions
from persyn.llm.reasoning import MarkerReader, Markers, Parts, Reader, cut
from persyn.llm.teachers import generation

if TYPE_CHECKING:
    from vllm.sampling_params import StructuredOutputsParams

#: The whitespace around a block of reasoning.
_GAP = {"type": "regex", "pattern": r"\s{0,3}"}
#: The value of `reasoning_parser` that keeps the text as it is.
OFF = "off"
#: The one parser that is only complete together with vLLM's parser of the whole format.
_HARMONY = "openai_gptoss"


def reader(chosen: VllmOptions, chat: Chat) -> Reader:
    """What splits the model's responses; `PermanentError` if vLLM has no such parser, or it does not suit the model."""
    if chosen.reasoning_parser is None:
        return generation.reader(chat)
    if chosen.reasoning_parser == OFF:
        return MarkerReader(chat.tokenizer, "", known=())
    from vllm.reasoning import ReasoningParserManager

    known = ReasoningParserManager.list_registered()
    if chosen.reasoning_parser not in known:
        raise PermanentError(
            f"vLLM has no reasoning parser {chosen.reasoning_parser!r}; set options.reasoning_parser to one of "
            f"{', '.join(known)}, or to {OFF!r}, or leave it out"
        )
    try:
        made = ParserReader(chosen.reasoning_parser, chat, chosen.chat_template_kwargs)
        made.read([], "", [])
    except Exception as error:
        # A parser raises all kinds of errors if the tokenizer lacks its tokens.
        raise PermanentError(
            f"vLLM's reasoning parser {chosen.reasoning_parser!r} does not suit this model: "
            f"{type(error).__name__}: {shorten(str(error))}; leave options.reasoning_parser out, or choose another"
        ) from error
    return made


def arguments(splits: Reader) -> dict[str, Any]:
    """The arguments by which vLLM learns where reasoning begins and ends."""
    if isinstance(splits, ParserReader):
        return {"reasoning_parser": splits.name}
    if splits.markers is None:
        return {}
    from vllm.config import ReasoningConfig

    markers = splits.markers
    return {"reasoning_config": ReasoningConfig(reasoning_start_str=markers.opens, reasoning_end_str=markers.closes)}


def constraint(schema: dict[str, Any], splits: Reader, tail: str) -> StructuredOutputsParams:
    """A JSON schema that binds the answer, and not the reasoning before it; `ValueError` for an invalid schema.

    For a named parser, vLLM itself waits until the reasoning is over. It looks for that in the whole prompt, and never
    binds the answer of a model that does not reason; so the markers are part of the grammar instead.
    """
    from vllm.sampling_params import StructuredOutputsParams
    from xgrammar import Grammar

    opened = splits.opened(tail) if isinstance(splits, MarkerReader) else None
    markers = opened or splits.markers
    is_closed = opened is None and markers is not None and markers.closes in tail
    if not isinstance(splits, MarkerReader) or not splits.reads_prompt or markers is None or is_closed:
        return StructuredOutputsParams(json=schema)
    block: dict[str, Any] = {
        "type": "tag",
        "begin": "" if opened else markers.opens,
        "content": {"type": "any_text"},
        "end": markers.closes,
    }
    before = block if opened else {"type": "optional", "content": {"type": "sequence", "elements": [_GAP, block]}}
    try:
        # Without whitespace, which a small model may generate endlessly where it is allowed.
        rules = Grammar.from_json_schema(json.dumps(schema), any_whitespace=False, separators=(",", ":"))
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    answer = {"type": "grammar", "grammar": str(rules)}
    form = {"type": "sequence", "elements": [before, _GAP, answer]}
    return StructuredOutputsParams(structural_tag=json.dumps({"type": "structural_tag", "format": form}))


class ParserReader:
    """Splits responses as `vllm serve --reasoning-parser NAME` does."""

    reads_prompt = True

    def __init__(self, name: str, chat: Chat, variables: dict[str, Any]) -> None:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.parser import ParserManager
        from vllm.tokenizers.hf import get_cached_tokenizer

        self.name = name
        #: A proxy that keeps the vocabulary: parsers ask for it, and each response has a parser of its own.
        self._tokenizer: Any = get_cached_tokenizer(chat.tokenizer)
        self._parser: Any = ParserManager.get_parser(
            reasoning_parser_name=name, is_harmony=name == _HARMONY, tokenizer=self._tokenizer
        )
        self._variables = {"chat_template_kwargs": variables}
        part = self._made().reasoning_parser
        self._request = part.adjust_request(ChatCompletionRequest(model="", messages=[]))
        start, end = part.reasoning_start_str, part.reasoning_end_str
        self.markers = Markers(start, end) if start and end else None

    def read(self, ids: Sequence[int], tail: str, stops: Sequence[str]) -> Parts:
        """Split a response; see `Reader`. `ValueError` if vLLM's parser fails on it."""
        tokens = list(ids)
        text, is_cut = cut(self._tokenizer.decode(tokens, skip_special_tokens=self._request.skip_special_tokens), stops)
        markers = self.markers
        # vLLM's server, too, only asks the prompt whether the reasoning is over; many parsers assume that it is not.
        if markers is not None and tail.rfind(markers.closes) > tail.rfind(markers.opens):
            return Parts(None, text.strip(), 0, is_cut)
        parser = self._made()
        try:
            reasoning, answer, _ = parser.parse(text, self._request, model_output_token_ids=tokens)
            n_tokens = _count(parser.reasoning_parser, tokens) if reasoning and answer else None
        except Exception as error:
            raise ValueError(f"vLLM's parser {self.name!r} failed: {type(error).__name__}: {error}") from error
        if not answer:
            n_tokens = len(tokens) if reasoning else 0
        return Parts(reasoning, (answer or "").strip(), 0 if reasoning is None else n_tokens, is_cut)

    def _made(self) -> Any:
        return self._parser(self._tokenizer, **self._variables)


def _count(parser: Any, ids: list[int]) -> int | None:
    """The tokens before the answer; None if this parser cannot tell."""
    try:
        answer = parser.extract_content_ids(ids)
    except NotImplementedError:
        answer = None
    n_tokens = parser.count_reasoning_tokens(ids) if answer is None else len(ids) - len(answer)
    # Where there are both, some parsers, made for streams alone, take all tokens for one of them.
    return n_tokens if 0 < n_tokens < len(ids) else None
