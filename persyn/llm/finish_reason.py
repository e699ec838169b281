"""Why a response ended: servers and other tools have many words for what the store calls "stop" and "length"."""

from __future__ import annotations

import re

#: Letters and digits alone, in lower case: `FinishReason.MAX_TOKENS`, `max-tokens` and `maxTokens` are one word.
_BESIDES = re.compile(r"[^a-z0-9]")
_NOTHING = {"", "null", "none"}
#: The model ended the response.
_STOP = re.compile(r"stop(sequence|string|str|token|word)?|eos(token)?|eod|end(of)?(turn|text|sequence)|completed?")
#: A limit on tokens did.
_LENGTH = re.compile(
    r"length|truncated|toolong|(max|model|context|token|length)\w*(length|tokens?|limit|window)\w*"
    r"|exceed(ed|s)?\w*(context|tokens?|length)\w*"
)


def in_our_words(said: str) -> str | None:
    """A finish reason in the store's words where they are known, as it was said otherwise; None where it says nothing.

    said: "MAX_TOKENS", "eos_token", "tool_calls", ...
    """
    word = _BESIDES.sub("", said.lower().rsplit(".", 1)[-1]).removeprefix("finishreason")
    if word in _NOTHING:
        return said if _BESIDES.sub("", said.lower()) not in _NOTHING else None
    if _STOP.fullmatch(word):
        return "stop"
    return "length" if _LENGTH.fullmatch(word) else said
