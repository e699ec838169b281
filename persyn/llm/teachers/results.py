"""Turn what a teacher wrote into a result: local models and servers alike.

Needs no tokenizer, so that teachers behind a server start without the packages of one.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from persyn.llm.protocols import Failed, Generated, failed

#: vLLM's finish reason for a response that repeats itself. The response is incomplete.
REPETITION = "repetition"


def to_result(generated: Generated) -> Generated | Failed:
    """The result with its texts stripped; fails as `empty` or, after reasoning, as `unfinished_reasoning` without one.

    It fails as `repetition` if it repeats itself. Calls of tools may stand in place of a text. NUL characters, which
    PostgreSQL cannot store, are replaced.
    """
    if generated.finish_reason == REPETITION:
        return failed(generated, f"repetition: the response repeats itself{_after(generated.response_tokens)}")
    text = _storable(generated.text).strip()
    reasoning = None if generated.reasoning is None else _storable(generated.reasoning).strip()
    calls = _storable(generated.tool_calls) or None
    finish = f"finish reason {generated.finish_reason or 'unknown'}"
    if not text and not calls:
        if reasoning is None:
            return failed(generated, f"empty: no text, {finish}")
        n_tokens = generated.reasoning_tokens or generated.response_tokens
        length = f"{len(reasoning):,} characters" if n_tokens is None else f"{n_tokens:,} tokens"
        advice = "; raise max_tokens, or set max_reasoning_tokens" if generated.finish_reason == "length" else ""
        return failed(generated, f"unfinished_reasoning: {length} of reasoning and no answer, {finish}{advice}")
    ended_by = "tool_calls" if calls and generated.finish_reason == "stop" else generated.finish_reason
    return replace(generated, text=text, reasoning=reasoning or None, tool_calls=calls, finish_reason=ended_by)


def _storable(value: Any) -> Any:
    """A text, or the texts within a value, without NUL characters."""
    match value:
        case str():
            return value.replace("\0", "\N{REPLACEMENT CHARACTER}")
        case list():
            return [_storable(each) for each in value]
        case dict():
            return {_storable(name): _storable(each) for name, each in value.items()}
    return value


def _after(tokens: int | None) -> str:
    return "" if tokens is None else f" after {tokens:,} tokens"
