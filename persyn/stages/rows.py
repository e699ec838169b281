"""Prompts as files hold them: a row is checked, and is then fit for any store and any teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from persyn.llm.protocols import Message
from persyn.stages import files
from persyn.stages.files import Broken, Record

_FIELDS = frozenset({"prompt", "messages", "answer", "id"})
#: Far below where a JSON writer or PostgreSQL gives up.
_MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt: the user's last turn, the turns before it, and what else its row said."""

    text: str
    #: The turns before the last, or None.
    history: list[Message] | None
    answer: str | None
    source_id: str | None
    meta: dict[str, Any]

    @property
    def content_hash(self) -> str:
        """SHA-256 of the conversation's canonical JSON: equal conversations are the same prompt."""
        turns = [*(self.history or ()), {"role": "user", "content": self.text}]
        return hashlib.sha256(msgspec.json.encode(turns, order="sorted")).hexdigest()


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that holds no prompt, and why. line: of a JSONL or CSV file; of others, the row."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class _Turn(Struct):
    role: Literal["system", "user", "assistant"]
    content: str


class Flaw(Exception):
    """What is wrong with a row."""


def read(path: Path) -> Iterator[Row | BadRow]:
    """The prompts of a JSONL, JSON, CSV or Parquet file, all but the last gzipped or not.

    A row has `prompt` (text) or `messages` ([{role, content}, ...], the last the user's), and may
    have `answer` and `id`; any other field goes to `meta`. Raises as `files.records` does.
    """
    return (_row_or_bad(path, number, record) for number, record in files.records(path))


def _row_or_bad(path: Path, number: int, record: Record | Broken) -> Row | BadRow:
    if isinstance(record, Broken):
        return BadRow(path.name, number, record.reason)
    try:
        return parse(record)
    except Flaw as flaw:
        return BadRow(path.name, number, str(flaw))


def parse(record: Record) -> Row:
    """The prompt of one record; raises `Flaw` when it holds none."""
    *history, last = _conversation(record)
    row = Row(
        text=last["content"],
        history=history or None,
        answer=text_or_number(record, "answer"),
        source_id=text_or_number(record, "id"),
        meta={name: value for name, value in record.items() if name not in _FIELDS},
    )
    require_storable(row)
    return row


def _conversation(record: Record) -> list[Message]:
    prompt, messages = record.get("prompt"), record.get("messages")
    if messages:
        if prompt:
            raise Flaw("both 'prompt' and 'messages'; one row is one conversation")
        return _in_turn(_turns(messages))
    if prompt is None:
        raise Flaw("neither 'prompt' nor 'messages'")
    if not isinstance(prompt, str):
        raise Flaw(f"'prompt' must be text, got {prompt!r:.50}")
    if not prompt.strip():
        raise Flaw("empty prompt")
    return [{"role": "user", "content": prompt}]


def _turns(messages: Any) -> list[_Turn]:
    """A column of messages, also as the JSON text that a CSV file must keep it as."""
    try:
        if isinstance(messages, str):
            return msgspec.json.decode(messages, type=list[_Turn])
        return msgspec.convert(messages, list[_Turn])
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise Flaw(f"'messages': {error}") from error


def _in_turn(turns: list[_Turn]) -> list[Message]:
    """Require what chat templates and training formats know: system at most first, then user and assistant in turn."""
    if not turns or turns[-1].role != "user":
        raise Flaw(f"'messages': the last turn must be the user's, not the {turns[-1].role if turns else 'system'}'s")
    if not turns[-1].content.strip():
        raise Flaw("empty prompt: the user's last turn says nothing")
    opening = turns[0].role == "system"
    for number, turn in enumerate(turns[opening:]):
        expected = "assistant" if number % 2 else "user"
        if turn.role != expected:
            raise Flaw(f"'messages': turn {number + opening + 1} is the {turn.role}'s, the {expected}'s was due")
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def text_or_number(record: Record, name: str) -> str | None:
    """A field as text; None when it is not there or empty, `Flaw` when it is something else."""
    value = record.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return msgspec.json.encode(value).decode()
    raise Flaw(f"{name!r} must be text or a number, got {value!r:.50}")


def require_storable(row: Any) -> None:
    """Raise `Flaw` for what PostgreSQL cannot store, on SQLite too: a run may move from one to the other."""
    encoded = msgspec.json.encode(row)
    # Almost every row passes here; only one that could be at fault is looked through.
    if b"\\u0000" in encoded or encoded.count(b"[") + encoded.count(b"{") > _MAX_DEPTH:
        _look_through(msgspec.to_builtins(row), _MAX_DEPTH)


def _look_through(value: Any, depth: int) -> None:
    if isinstance(value, str):
        if "\0" in value:
            raise Flaw("a NUL character, which no database text can hold")
        return
    if not isinstance(value, (dict, list)):
        return
    if not depth:
        raise Flaw(f"nested deeper than {_MAX_DEPTH} levels")
    for part in (*value, *value.values()) if isinstance(value, dict) else value:
        _look_through(part, depth - 1)
