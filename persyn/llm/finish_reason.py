"""Normalise finish reasons: map the names used by servers and other tools to "stop" and "length"."""

from __future__ import annotations

import re

#: Compared by lower-case letters and digits only: `FinishReason.MAX_TOKENS`, `max-tokens`, `maxTokens` are equal.
_BESIDES = re.compile(r"[^a-z0-9]")
_NOTHING = {"", "null", "none"}
#: The model ended the response.
_STOP = re.compile(r"stop(sequence|string|str|token|word)?|eos(token)?|eod|end(of)?(turn|text|sequence)|completed?")
#: A token limit ended the response.
_LENGTH = re.compile(
    r"length|truncated|toolong|(max|model|context|token|length)\w*(length|tokens?|limit|window)\w*"
    r"|exceed(ed|s)?\w*(context|tokens?|length)\w*"
)


def normalised(said: str) -> str | None:
    """Map a finish reason to "stop" or "length" if known, else return it unchanged; None if it is empty.

    said: "MAX_TOKENS", "eos_token", "tool_calls", ...
    """
    word = _BESIDES.sub("", said.lower().rsplit(".", 1)[-1]).removeprefix("finishreason")
    if word in _NOTHING:
        return said if _BESIDES.sub("", said.lower()) not in _NOTHING else None
    if _STOP.fullmatch(word):
        return "stop"
    return "length" if _LENGTH.fullmatch(word) else said
