"""Decode JSON from files: NaN and infinities become null, duplicate keys are rejected."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from persyn import json_text
from persyn.ingest.encoding import not_utf8
from persyn.ingest.record import Flaw

#: Usually the end of a key; it may also occur in a row's texts. Looking behind the quote, not before every character.
_END_OF_KEY = re.compile(rb'"(?<!\\")\s*:')


def decode(data: bytes) -> Any:
    """Decode a JSON value; raise `Flaw` for invalid JSON and for duplicate keys."""
    try:
        value = _decoded(data)
        # Counting keys clears most rows, so that the slower check is rarely needed.
        if len(_END_OF_KEY.findall(data)) != _keys(value):
            json.loads(data, object_pairs_hook=json_text.unique)
    except RecursionError as error:
        raise Flaw("nested too deeply") from error
    except ValueError as error:
        raise Flaw(str(error)) from error
    return value


def _decoded(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        return _with_nulls(data, error)


def _with_nulls(data: bytes, error: msgspec.DecodeError) -> Any:
    """Decode with the standard library, which accepts the NaN and Infinity that Python's encoder writes."""
    nulls: list[str] = []
    try:
        value = json.loads(data.decode(), parse_constant=nulls.append, parse_float=json_text.finite)
        msgspec.json.encode(value)
    except UnicodeDecodeError:
        raise not_utf8(data) from error
    except UnicodeEncodeError as surrogate:
        raise Flaw("a lone surrogate: half of a character escaped as two") from surrogate
    except ValueError:
        nulls.clear()
    if not nulls:
        raise Flaw(f"not JSON: {error}") from error
    return value


def _keys(value: Any) -> int:
    if isinstance(value, dict):
        return len(value) + sum(map(_keys, value.values()))
    return sum(map(_keys, value)) if isinstance(value, list) else 0
