"""Parse and validate prompts from rows of files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from persyn import json_schema
from persyn.config import fingerprint_of
from persyn.errors import UsageError
from persyn.ingest import files, layouts, strict_json
from persyn.ingest import turns as conversations
from persyn.ingest.layouts import NO_NAMES, Fields, Names
from persyn.ingest.record import Flaw, Numbered, Record, UnreadableRecord
from persyn.llm import tools
from persyn.llm.protocols import Message, Tools, join_turns, last_turn_of

#: Well below the limits of JSON encoders and PostgreSQL.
_MAX_DEPTH = 64
#: Column names listed in an error.
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt: its last turn, the turns before it, and the row's other fields."""

    #: Of the last turn.
    text: str
    #: The turns before the last, or None.
    history: list[Message] | None
    answer: str | None
    source_id: str | None
    meta: dict[str, Any]
    #: The last turn without its text, if it is not the user's.
    last_turn: Message | None = None
    tools: Tools | None = None
    #: JSON schema of the response.
    response_schema: dict[str, Any] | None = None

    @property
    def messages(self) -> list[Message]:
        """All turns of the conversation."""
        return join_turns(self.history, self.text, self.last_turn)

    @property
    def content_hash(self) -> str:
        """SHA-256 of the canonical JSON of what a model is given: equal conversations are the same prompt."""
        besides = {"tools": self.tools, "response_schema": self.response_schema}
        given = {name: value for name, value in besides.items() if value is not None}
        return fingerprint_of([*self.messages, given] if given else self.messages)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row without a valid prompt, and why.

    line: the line of a JSONL or CSV file, otherwise the row number.
    """

    file: str
    line: int
    reason: str
    #: Rows that it stands for: more than one where an unclosed quote has swallowed lines.
    rows: int = 1
    #: See `Flaw`.
    advice: str = ""
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.said}"

    @property
    def said(self) -> str:
        """The reason, with what to do about it."""
        return f"{self.reason}; {self.advice}" if self.advice else self.reason


def read(path: Path, names: Names = NO_NAMES) -> Iterator[PromptRow | BadRow]:
    """Yield the prompts of a JSONL, JSON, CSV or Parquet file; all but Parquet may be gzipped.

    names: {our field: the file's field}, for fields without a common name.
    A row has `prompt` (text) or `messages` ([{role, content}, ...], the last one from the user or a tool), or follows
    the layout of ShareGPT or Alpaca; it may have `system`, `tools`, `response_schema`, `answer` and `id`. Other fields
    are stored in `meta`. Raises like `files.records`, and `UsageError` at the end if no row has a field listed in
    `names`.
    """
    numbered = files.records(path)  # evaluated eagerly, to check a file name before rows of another file are stored
    return (
        _row_or_bad(path, number, record, names) for number, record in require_named(path, numbered, names.values())
    )


def require_named(path: Path, numbered: Iterable[Numbered], named: Iterable[str]) -> Iterator[Numbered]:
    """Pass records through; raise `UsageError` at the end if none has one of the named fields.

    A single row may lack a field, because CSV files omit nulls.
    """
    lacking = set(named)
    found: dict[str, None] = {}
    is_empty = True
    for number, record in numbered:
        if not isinstance(record, UnreadableRecord):
            is_empty = False
            lacking.difference_update(record)
            if lacking:
                found.update(dict.fromkeys(list(record)[:_SHOWN]))
        yield number, record
    if lacking and not is_empty:
        has = ", ".join(list(found)[:_SHOWN])
        raise UsageError(
            f"no row of {path.name} has a field {', '.join(sorted(lacking))}; nothing was imported. Rows have {has}"
        )


def _row_or_bad(path: Path, number: int, record: Record | UnreadableRecord, names: Names) -> PromptRow | BadRow:
    if isinstance(record, UnreadableRecord):
        return BadRow(path.name, number, record.reason, record.rows, record.advice)
    try:
        return parse(record, names)
    except Flaw as flaw:
        return BadRow(path.name, number, str(flaw), advice=flaw.advice, names=flaw.names)


def parse(record: Record, names: Names = NO_NAMES) -> PromptRow:
    """The prompt of one record; raise `Flaw` if it has none."""
    row, reply = of_fields(layouts.take(record, names))
    if reply is not None:
        said = {"content": reply["content"], "tool_calls": calls} if (calls := reply.get("tool_calls")) else None
        row = replace(row, meta={"reply": said or reply["content"], **row.meta})
    require_storable(row)
    return row


def of_fields(fields: Fields, *, may_reply: bool = False) -> tuple[PromptRow, Message | None]:
    """The prompt of a record, and the reply's turn if there is one; raise `Flaw` if there is no prompt.

    may_reply: accept a final assistant turn under any field name.
    """
    turns = _turns(fields)
    reply = None
    if turns and turns[-1]["role"] == "assistant" and (may_reply or _is_sharegpt(fields)):
        reply = turns.pop()
    *history, last = _conversation(turns, fields)
    schema, others = _response_schema(fields)
    row = PromptRow(
        text=last["content"],
        history=history or None,
        answer=text_or_number(fields.ours, "answer"),
        source_id=text_or_number(fields.ours, "id"),
        meta=others,
        last_turn=last_turn_of(last),
        tools=_tools(fields),
        response_schema=schema,
    )
    return row, reply


def _tools(fields: Fields) -> Tools | None:
    try:
        return tools.read_tools(fields.ours["tools"])
    except ValueError as error:
        name = fields.called["tools"]
        advice = f"rename {name!r} if it does not list functions that a model may call"
        raise Flaw(f"{name!r}: {error}", advice=advice) from None


def _response_schema(fields: Fields) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The JSON schema of a row's response, and its fields that are stored in `meta`."""
    ours, called, others = fields.ours, fields.called, fields.rest
    field, schema = "response_schema", _object(ours["response_schema"])
    asked = _object(ours["response_format"])
    if isinstance(asked, dict) and asked.get("type") in _FORMATS:
        if schema is not None:
            raise Flaw(f"both {called['response_schema']!r} and {called['response_format']!r}; one row has one schema")
        field, schema = "response_format", _FORMATS[asked["type"]](asked)
    elif ours["response_format"] is not None:  # another meaning of the name
        others = {**others, called["response_format"]: ours["response_format"]}
    if schema is None:
        return None, others
    why = "it is not an object" if not isinstance(schema, dict) else json_schema.flaw_of(schema)
    if why:
        raise Flaw(f"{called[field]!r} is not a JSON schema: {why}")
    try:
        return tools.require_sendable(tools.without_nulls(schema), repr(called[field])), others
    except ValueError as error:
        raise Flaw(str(error)) from None


def _object(value: Any) -> Any:
    """A value, decoded if it is the JSON text of an object; None if it is empty."""
    try:
        return tools.decoded(value) if isinstance(value, str) and value.lstrip().startswith("{") else value or None
    except ValueError:
        return value


#: OpenAI's response formats: {type: the schema of a response in this format}.
_FORMATS: Mapping[str, Callable[[Record], Any]] = {
    "text": lambda asked: None,
    "json_object": lambda asked: {"type": "object"},
    "json_schema": lambda asked: (asked.get("json_schema") or {}).get("schema", "missing"),
}


def _is_sharegpt(fields: Fields) -> bool:
    """Whether a row's turns are in ShareGPT's form, which ends with the reply."""
    turns = fields.ours["messages"] or fields.ours["prompt"]
    last = turns[-1] if isinstance(turns, list) and turns else None
    is_form = isinstance(last, dict) and last.get("from") is not None
    return is_form or fields.called.get("messages", "").lower() in layouts.WITH_REPLY


def _turns(fields: Fields) -> list[Message]:
    """The turns of a row, without a system turn from a separate field."""
    prompt, messages, name = fields.ours["prompt"], fields.ours["messages"], _name_of_turns(fields)
    if messages:
        if prompt:
            raise Flaw(f"both {fields.called['prompt']!r} and {name!r}; one row is one conversation")
        return conversations.read(messages, name)
    if isinstance(prompt, list) and prompt:
        return conversations.read(prompt, name)
    if isinstance(prompt, str) and _spells_turns(prompt):
        raise Flaw(f"{name!r} contains turns as JSON text, not as a list", names=[f"messages={name}"])
    return [*_earlier(fields), {"role": "user", "content": _prompt(fields)}]


def _name_of_turns(fields: Fields) -> str:
    """The row's name for the field that its turns are read from."""
    ours = "messages" if fields.ours["messages"] or "prompt" not in fields.called else "prompt"
    return fields.called.get(ours, ours)


def _spells_turns(prompt: str) -> bool:
    """Whether a text is a JSON list of turns, as in CSV files."""
    if not prompt.lstrip().startswith("["):
        return False
    try:
        turns = msgspec.json.decode(prompt)
    except (msgspec.DecodeError, RecursionError):
        return False
    return bool(turns) and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns)


def _prompt(fields: Fields) -> str:
    """The text of the prompt, followed by an instruction's input if there is one."""
    prompt, more = fields.ours["prompt"], fields.ours["input"]
    if prompt is None:
        if nothing := [name for ours, name in fields.called.items() if ours in ("prompt", "messages")]:
            raise Flaw(f"neither 'prompt' nor 'messages': {nothing[0]!r} is empty")
        raise Flaw(f"neither 'prompt' nor 'messages'; the row has {fields.listed()}", names=fields.likely())
    for field, value in (("prompt", prompt), ("input", more)):
        if value is not None and not isinstance(value, str):
            raise Flaw(f"{fields.called[field]!r} must be text, got {value!r:.50}")
    if not prompt.strip():
        raise Flaw("empty prompt")
    return f"{prompt}\n{more}" if more and more.strip() else str(prompt)


def _earlier(fields: Fields) -> list[Message]:
    """Convert Alpaca's history, a list of (prompt, response) pairs, to turns."""
    turns: list[Message] = []
    history = fields.ours["history"] or []
    for pair in strict_json.decode(history.encode()) if isinstance(history, str) else history:
        match pair:
            case [str(said), str(answered)]:
                turns += [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]
            case _:
                raise Flaw(f"'history' must be pairs of texts, got {pair!r:.50}")
    return turns


def _conversation(turns: list[Message], fields: Fields) -> list[Message]:
    """All turns up to the prompt, with the system turn first."""
    name = _name_of_turns(fields)
    if not turns or turns[-1]["role"] not in ("user", "tool"):
        last = turns[-1]["role"] if turns else "system"
        advice = "; import responses with 'persyn responses import'" if last == "assistant" else ""
        raise Flaw(f"{name!r}: the last turn must be the user's or a tool's, not the {last}'s{advice}")
    if turns[-1]["role"] == "user" and not turns[-1]["content"].strip():
        raise Flaw("empty prompt: the user's last turn has no text")
    turns = _with_system(turns, fields)
    conversations.require_order(turns, name)
    return turns


def _with_system(turns: list[Message], fields: Fields) -> list[Message]:
    system = fields.ours["system"]
    if system is None or system == "":
        return turns
    if not isinstance(system, str):
        raise Flaw(f"{fields.called['system']!r} must be text, got {system!r:.50}")
    if turns[0]["role"] != "system":
        return [{"role": "system", "content": system}, *turns]
    if turns[0]["content"] != system:
        raise Flaw(f"both a system turn and {fields.called['system']!r} with a different text")
    return turns


def text_or_number(record: Record, name: str) -> str | None:
    """A field as text; None if it is absent or empty; raise `Flaw` for another type."""
    value = record.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return msgspec.json.encode(value).decode()
    raise Flaw(f"{name!r} must be text or a number, got {value!r:.50}")


def require_storable(row: Any) -> None:
    """Raise `Flaw` for what PostgreSQL cannot store; applied to SQLite too, because a run may move between them."""
    encoded = msgspec.json.encode(row)
    # Nearly every row passes this cheap test; only the others are checked in full.
    if b"\\u0000" in encoded or encoded.count(b"[") + encoded.count(b"{") > _MAX_DEPTH:
        _look_through(msgspec.to_builtins(row), _MAX_DEPTH)


def _look_through(value: Any, depth: int) -> None:
    if isinstance(value, str):
        if "\0" in value:
            raise Flaw("a NUL character, which the database cannot store")
        return
    if not isinstance(value, (dict, list)):
        return
    if not depth:
        raise Flaw(f"nested deeper than {_MAX_DEPTH} levels")
    for part in (*value, *value.values()) if isinstance(value, dict) else value:
        _look_through(part, depth - 1)
