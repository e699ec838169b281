"""Encode requests for a chat completions server and decode the responses.

Handles JSON and server-sent events, but opens no connection. Server output is untrusted: if any part of it is
invalid, only the one request fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from persyn.errors import shorten
from persyn.llm import finish_reason, tools
from persyn.llm.options import ChatOptions
from persyn.llm.protocols import Failed, Generate, Generated, Message, Result, Sampling
from persyn.llm.reasoning import split_opened, split_unseen
from persyn.llm.teachers import complaints, results
from persyn.llm.teachers.complaints import RefusedError, RetryableError

#: Finish reasons of an aborted response, whose text is incomplete.
_BROKEN_OFF = re.compile(
    r"error|abort|cancel|insufficient|time.?out|deadline|overload|interrupt|unavailable|fail|disconnect|exception|crash"
    r"|killed|preempt|shut.?down|memory|\boom\b|internal",
    re.IGNORECASE,
)
#: Types of content parts that are not part of the response.
_NO_RESPONSE = re.compile(r"think|reason|refus|tool|function|image|audio|file|video", re.IGNORECASE)
#: The fields of a part that may contain its text.
_OF_PART = ("text", "value", "content", "parts")
#: The fields of a message that may contain reasoning, and of a part of it.
_OF_REASONING = ("reasoning_content", "reasoning", "thinking", "reasoning_details")
_OF_THOUGHT = ("thinking", "reasoning", "summary", *_OF_PART)
_REASONING = re.compile(r"think|reason", re.IGNORECASE)
_LONGEST_REASON = 60
#: No context is this large; a higher token count from a server is wrong.
_MOST_TOKENS = 2**24
_SURROGATE = re.compile("[\ud800-\udfff]")

#: Sampling parameters that not all servers have; those with a penalty of OpenAI's API are rejected by some models.
_RARE = ("top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "repetition_detection")
_DEFAULT = Sampling()

_encode = msgspec.json.Encoder().encode


def body(model: str, request: Generate, chosen: ChatOptions) -> bytes:
    """The JSON body of a request for one response."""
    sampling = request.sampling
    fields: dict[str, Any] = {
        "model": model,
        "messages": with_ids(request.messages),
        "seed": request.seed,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        chosen.max_tokens_field: sampling.max_tokens,
    }
    # Many servers reject a field that they do not know: only those that a run sets are sent.
    fields |= {name: value for name, value in _set(request, chosen).items() if value is not None}
    asked = {name: value for name, value in fields.items() if name not in chosen.omit}
    return _encode(asked | chosen.extra)


def _set(request: Generate, chosen: ChatOptions) -> dict[str, Any]:
    """The fields that are only sent with a value; the last ones are not part of OpenAI's API."""
    sampling, schema = request.sampling, request.schema
    form = {"name": "response", "strict": True, "schema": schema}
    return {
        "stop": sampling.stop or None,
        "response_format": {"type": "json_schema", "json_schema": form} if schema else None,
        "tools": request.tools or None,
        "reasoning_effort": sampling.reasoning_effort,
        "thinking_token_budget": sampling.max_reasoning_tokens,
        "chat_template_kwargs": chosen.chat_template_kwargs or None,
        **{name: value for name in _RARE if (value := getattr(sampling, name)) != getattr(_DEFAULT, name)},
    }


def decode(content: bytes, charset: str | None) -> str:
    """Decode an answer to text; never fails.

    charset: the charset declared by the server.
    """
    try:
        text = content.decode(charset or "utf-8", errors="replace")
    except (LookupError, UnicodeError):
        text = content.decode("utf-8", errors="replace")
    return text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")


def parse(text: str) -> Any:
    """Parse an answer: JSON, a stream assembled from its pieces, or otherwise the text itself."""
    try:
        return _assemble(text) if _is_stream(text) else json.loads(text)
    except (ValueError, RecursionError):
        return text


def read(request_id: int, answer: str, headers: Mapping[str, str], seconds: float, inline: str = "auto") -> Result:
    """The result in a server's answer; `RetryableError` or `RefusedError` if it contains none.

    inline: `inline_reasoning` of the options.
    """
    completion = parse(answer)
    choice = _choice(completion)
    if choice is None:
        raise complaints.in_answer(completion, headers)
    message = _table(choice.get("message"))
    for error in (choice.get("error"), message.get("error")):
        if complaints.says(error):
            raise complaints.in_answer({"error": error}, headers)
    counts = _table(completion.get("usage"))
    counted = _count(counts.get("prompt_tokens")), _count(counts.get("completion_tokens"))
    text, refusal = _text(message.get("content")), message.get("refusal")
    if isinstance(refusal, str) and refusal:
        raise RefusedError(f"refused: {shorten(refusal)}", tokens=counted)
    reason = _finish_reason(choice.get("finish_reason"), counted)
    try:
        calls = tools.read_calls(message.get("tool_calls") or message.get("function_call"))
    except ValueError as error:
        why = f"bad_tool_call: {shorten(str(error))}, finish reason {reason or 'unknown'}"
        return Failed(request_id, why, *counted, int(counted == (None, None)))
    if reason is None and not (text or calls):
        raise RetryableError("the answer has neither a text nor a finish reason")
    thought = _reasoning(message)
    if thought is None and inline != "off":
        parts = split_opened(text) if inline == "opened" else split_unseen(text)
        text, thought = parts.answer, parts.reasoning
    n_tokens, n_reasoning = _response_tokens(counts, reasons=thought is not None)
    return results.to_result(
        Generated(
            id=request_id,
            text=text,
            finish_reason=reason,
            prompt_tokens=counted[0],
            response_tokens=n_tokens,
            seconds=seconds,
            tool_calls=calls,
            reasoning=thought,
            reasoning_tokens=n_reasoning,
        )
    )


def with_ids(messages: Sequence[Message]) -> list[Message]:
    """The turns with an id for each call and in each result, which servers require.

    Results without an id answer the calls before them in order.
    """
    turns: list[Message] = []
    waiting: list[str] = []
    for turn in messages:
        if calls := turn.get("tool_calls"):
            calls = [{"id": f"call_{len(turns)}_{number}", **call} for number, call in enumerate(calls)]
            waiting = [call["id"] for call in calls]
            turn = {**turn, "tool_calls": calls}
        elif turn["role"] == "tool":
            answered = turn.get("tool_call_id") or next(iter(waiting), None)
            waiting = [call_id for call_id in waiting if call_id != answered]
            turn = turn if answered is None else {**turn, "tool_call_id": answered}
        turns.append(turn)
    return turns


def _choice(completion: Any) -> dict[str, Any] | None:
    """The first choice, which has a message; None if the answer is not a chat completion."""
    if not isinstance(completion, dict) or complaints.says(completion.get("error")):
        return None
    choices = completion.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        return None
    return choice if isinstance(choice.get("message"), dict) or complaints.says(choice.get("error")) else None


def _text(content: Any) -> str:
    """The text of a message: a string, or the text of its parts without reasoning."""
    return _clean("".join(_texts(content)))


def _clean(text: str) -> str:
    return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for part in content:
            yield from _texts(part)
    elif isinstance(content, dict) and not _NO_RESPONSE.search(str(content.get("type", ""))):
        yield from _texts(next((content[name] for name in _OF_PART if content.get(name)), None))
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield json.dumps(content)


def _reasoning(message: Mapping[str, Any]) -> str | None:
    """The reasoning that a server reports apart from the text; None if there is none."""
    apart = ("".join(_thoughts(message.get(name), True)) for name in _OF_REASONING)
    found = next(filter(None, apart), "") or "".join(_thoughts(message.get("content"), False))
    return _clean(found) or None


def _thoughts(content: Any, is_reasoning: bool) -> Iterator[str]:
    """The texts of reasoning; `is_reasoning` says whether a text without a type is some."""
    if isinstance(content, str):
        if is_reasoning:
            yield content
    elif isinstance(content, list):
        for part in content:
            yield from _thoughts(part, is_reasoning)
    elif isinstance(content, dict):
        is_reasoning = is_reasoning or _REASONING.search(str(content.get("type", ""))) is not None
        yield from _thoughts(next((content[name] for name in _OF_THOUGHT if content.get(name)), None), is_reasoning)


def _response_tokens(counts: Mapping[str, Any], *, reasons: bool) -> tuple[int | None, int | None]:
    """The tokens of the whole response and of its reasoning; None where a server does not say, or not plausibly."""
    n_tokens, details = _count(counts.get("completion_tokens")), _table(counts.get("completion_tokens_details"))
    said = details.get("reasoning_tokens")
    if said == 0 and said is not False and not reasons:
        return n_tokens, 0
    n_reasoning = _count(said)
    if n_tokens is None or n_reasoning is None:
        return n_tokens, n_reasoning
    # Some servers do not include the reasoning in `completion_tokens`, but in the total.
    if counts.get("total_tokens") == (_count(counts.get("prompt_tokens")) or 0) + n_tokens + n_reasoning:
        n_tokens += n_reasoning
    return n_tokens, n_reasoning if n_reasoning <= n_tokens else None


def _finish_reason(said: Any, counted: tuple[int | None, int | None]) -> str | None:
    """The finish reason, normalised to the store's values where known, else as the server gave it.

    counted: the tokens of prompt and response.
    None if there is none. Raises `RetryableError` if the response was aborted, `RefusedError` if it was refused.
    """
    reason = _reason(said)
    if not reason:
        return None
    found = finish_reason.normalised(reason)
    if found in (None, "stop", "length"):
        return found
    if reason.lower() == "content_filter":
        raise RefusedError("refused: content filter", tokens=counted)
    if complaints.REFUSED.search(reason):
        raise RefusedError(f"refused: finish reason {reason}", tokens=counted)
    if _BROKEN_OFF.search(reason):
        raise RetryableError(f"the response was interrupted, finish reason {reason}")
    return reason


def _reason(said: Any) -> str:
    if isinstance(said, dict):  # SGLang: {"type": "abort", ...}
        said = said.get("type")
    if said is None or isinstance(said, bool) or said == []:
        return ""
    plain = said if isinstance(said, str) else json.dumps(said)
    return shorten(_SURROGATE.sub("", plain), most=_LONGEST_REASON)


def _count(said: Any) -> int | None:
    """A number of tokens; None if it is not plausible."""
    if isinstance(said, bool) or not isinstance(said, int | float) or said != said:
        return None
    return int(said) if 1 <= said <= _MOST_TOKENS and said == int(said) else None


def _is_stream(text: str) -> bool:
    return text.lstrip().startswith(("data:", "event:", "id:", "retry:", ":"))


def _assemble(text: str) -> dict[str, Any]:
    """Assemble a streamed completion from its pieces; `ValueError` if the stream ended early."""
    merged: dict[str, Any] = {}
    message: dict[str, Any] = {"content": ""}
    choice: dict[str, Any] = {"message": message}
    is_over = False
    for name, data in _events(text):
        if data == "[DONE]":
            is_over = True
            break
        piece = _piece(name, data)
        if "error" in piece:
            return piece
        merged["usage"] = piece.get("usage") or merged.get("usage")
        choices = piece.get("choices")
        for each in map(_table, choices if isinstance(choices, list) else []):
            if each.get("index", 0) == 0:
                _add(choice, message, each)
    if not is_over and choice.get("finish_reason") is None:
        raise ValueError("the stream ended early")
    return {**merged, "choices": [choice]}


def _piece(name: str, data: str) -> dict[str, Any]:
    """A piece of a completion, or {"error": what the server says}; `ValueError` if it is not JSON."""
    if name == "error":
        return {"error": _loaded(data) or "an error event without a message"}
    piece = _table(json.loads(data))
    error = piece.pop("error", None)
    if complaints.says(error):
        return {"error": error}
    return {"error": piece} if "choices" not in piece and complaints.is_complaint(piece) else piece


def _loaded(data: str) -> Any:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return data
    return found.get("error", found) if isinstance(found, dict) else found


def _events(text: str) -> Iterator[tuple[str, str]]:
    """The name and data of each event; llama.cpp sends errors in a field of that name."""
    name = ""
    # Not `splitlines`, which also splits at characters that JSON may contain unescaped.
    for line in re.split(r"\r\n|\n|\r", text):
        field, _, value = line.partition(":")
        if field == "event" or not line:
            name = value.strip()
        elif field in ("data", "error"):
            yield ("error" if field == "error" else name), value.strip()


def _add(choice: dict[str, Any], message: dict[str, Any], piece: Mapping[str, Any]) -> None:
    delta = _table(piece.get("delta") or piece.get("message"))
    message["content"] += _text(delta.get("content"))
    if (thought := _reasoning(delta)) is not None:
        message["reasoning"] = message.get("reasoning", "") + thought
    if isinstance(delta.get("refusal"), str):
        message["refusal"] = message.get("refusal", "") + delta["refusal"]
    if delta.get("tool_calls"):
        _add_calls(message.setdefault("tool_calls", []), delta["tool_calls"])
    if delta.get("function_call"):
        _add_function(message.setdefault("function_call", {}), _table(delta["function_call"]))
    if complaints.says(piece.get("error")):
        choice["error"] = piece["error"]
    # Many servers send an empty finish reason with every piece but the last.
    if said := finish_reason.normalised(_reason(piece.get("finish_reason"))):
        choice["finish_reason"] = said


def _add_calls(calls: list[dict[str, Any]], deltas: Any) -> None:
    """Add the pieces of calls, each of which names its call by index, or by an id that begins the next one."""
    for delta in map(_table, deltas if isinstance(deltas, list) else []):
        index = delta.get("index")
        if not isinstance(index, int):
            is_next = not calls or (delta.get("id") and delta["id"] != calls[-1].get("id"))
            index = len(calls) if is_next else len(calls) - 1
        found = next((call for call in calls if call["index"] == index), None)
        if found is None:
            found = {"index": index, "function": {}}
            calls.append(found)
        found.update({key: delta[key] for key in ("id", "type") if delta.get(key)})
        _add_function(found["function"], _table(delta.get("function")))


def _add_function(function: dict[str, Any], delta: Mapping[str, Any]) -> None:
    if isinstance(delta.get("name"), str) and delta["name"]:
        function["name"] = delta["name"]
    if isinstance(given := delta.get("arguments"), str):
        function["arguments"] = function.get("arguments", "") + given
    elif given is not None:
        function["arguments"] = given


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
