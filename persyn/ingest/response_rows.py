"""Parse rows of imported responses: a prompt, a teacher's name and the teacher's response."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from persyn.config import TeacherName
from persyn.db.results import NO_TEXT
from persyn.errors import UsageError
from persyn.ingest import files, layouts, rows
from persyn.ingest.layouts import Names, Usual
from persyn.ingest.record import Flaw, Record, UnreadableRecord
from persyn.ingest.rows import BadRow, PromptRow
from persyn.llm import finish_reason, tools

#: Recognised names of each field; the first one present in a row is used.
_USUAL: Usual = {
    **layouts.PROMPT,
    "teacher": ("teacher", "model"),
    "response": ("response", "output"),
    "tool_calls": ("tool_calls",),
    "finish_reason": ("finish_reason",),
    "prompt_tokens": ("prompt_tokens",),
    "response_tokens": ("response_tokens",),
}
FIELDS = tuple(_USUAL)
#: Limit of the store's integer columns.
_MOST_TOKENS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Layout:
    """How a file's fields map to ours.

    names:  {our field: the file's field}, for fields without a common name.
    prompt: fields that describe the prompt, not the response; they are stored in its meta.
    score:  fields with a number or boolean that is a score of the response.
    scores_only: whether rows have no response, but a score of it.
    """

    names: Names = field(default_factory=dict)
    prompt: tuple[str, ...] = ()
    score: tuple[str, ...] = ()
    scores_only: bool = False


@dataclass(frozen=True, slots=True)
class ResponseRow:
    """One cell of a grid; `text` is None if the teacher wrote nothing, and empty if it only called tools.

    `failure` is why there is no text.
    """

    prompt: PromptRow
    teacher: str
    text: str | None
    finish_reason: str | None
    prompt_tokens: int | None
    response_tokens: int | None
    scores: dict[str, float]
    meta: dict[str, Any]
    tool_calls: list[dict[str, Any]] | None = None
    failure: str | None = None


_EMPTY = "empty: the teacher wrote nothing"
#: The failure of a response of which only scores were imported.
SCORES_ONLY = f"{NO_TEXT}: only scores of this response were imported"


def read(path: Path, layout: Layout) -> Iterator[ResponseRow | BadRow]:
    """Yield the responses of a JSONL, JSON, CSV or Parquet file; all but Parquet may be gzipped.

    Raises like `files.records`, and `UsageError` at the end if no row has a response or a field that the layout names.
    A single row may lack a field, because CSV files omit nulls.
    """
    named = {*layout.names.values(), *layout.prompt}
    is_empty, has_response = True, "response" in layout.names or layout.scores_only
    for number, record in rows.require_named(path, files.records(path), named):
        found = _row_or_bad(path, number, record, layout)
        if not isinstance(record, UnreadableRecord):
            is_empty = False
            has_response = has_response or _has_response(record, found)
        yield found
    if not is_empty and not has_response:
        raise UsageError(
            f"no row of {path.name} has the teacher's response in a field 'response' or 'output'; name the field with "
            "--map response=FIELD, or import scores without responses with --scores-only; nothing was imported"
        )


def _has_response(record: Record, found: ResponseRow | BadRow) -> bool:
    """Whether a row has a response field, even an empty one."""
    is_there = not layouts.group_spellings(record).keys().isdisjoint(_USUAL["response"])
    return is_there or (isinstance(found, ResponseRow) and found.text is not None)


def _row_or_bad(path: Path, number: int, record: Record | UnreadableRecord, layout: Layout) -> ResponseRow | BadRow:
    if isinstance(record, UnreadableRecord):
        return BadRow(path.name, number, record.reason, record.rows, record.advice)
    try:
        return _row(record, layout)
    except Flaw as flaw:
        return BadRow(path.name, number, str(flaw), advice=flaw.advice, names=flaw.names)


def _row(record: Record, layout: Layout) -> ResponseRow:
    left = dict(record)
    of_prompt = {name: left.pop(name) for name in layout.prompt if name in left}
    given = {name: left.pop(name, None) for name in layout.score}
    fields = layouts.take(left, layout.names, _USUAL)
    ours = fields.ours
    prompt, reply = rows.of_fields(fields, may_reply=ours["response"] is None)
    reply = reply or {"content": None}
    calls = _calls(ours["tool_calls"]) or reply.get("tool_calls")
    text = _text(reply["content"] if ours["response"] is None else ours["response"])
    scores = {name: score for name in layout.score if (score := _score(given[name], name)) is not None}
    if layout.scores_only:
        _require_scores_only(text, calls, scores)
    row = ResponseRow(
        prompt=replace(prompt, meta=of_prompt),
        teacher=_teacher(ours["teacher"]),
        text="" if text is None and calls else text,
        tool_calls=calls,
        finish_reason=finish_reason.normalised(rows.text_or_number(ours, "finish_reason") or ""),
        prompt_tokens=_count(ours, "prompt_tokens"),
        response_tokens=_count(ours, "response_tokens"),
        scores=scores,
        meta=fields.rest,
        failure=None if text is not None or calls else SCORES_ONLY if layout.scores_only else _EMPTY,
    )
    rows.require_storable(row)
    return row


def _require_scores_only(text: str | None, calls: Any, scores: dict[str, float]) -> None:
    if text is not None or calls:
        raise Flaw("the row has a response, but the file is imported as scores only; leave out --scores-only")
    if not scores:
        raise Flaw("the row has neither a response nor a score")


def _teacher(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Flaw(
            "no 'teacher', the name of the teacher that wrote the response"
            if value is None
            else f"'teacher' must be a name, got {value!r:.50}"
        )
    try:
        return msgspec.convert(value, TeacherName)
    except msgspec.ValidationError as error:
        raise Flaw(f"'teacher' {value!r:.50} must be at most 100 letters, digits and . _ : + @ / -") from error


def _text(value: Any) -> str | None:
    """The response text; None if it is empty."""
    if value is not None and not isinstance(value, str):
        raise Flaw(f"'response' must be text, got {value!r:.50}")
    return value if value and value.strip() else None


def _calls(value: Any) -> list[dict[str, Any]] | None:
    try:
        return tools.read_calls(value)
    except ValueError as error:
        raise Flaw(f"'tool_calls': {error}") from None


def _count(ours: Record, name: str) -> int | None:
    value = _number(ours[name])
    if value is None:
        return None
    if value != value or not 0 <= value <= _MOST_TOKENS or value != int(value):
        raise Flaw(f"{name!r} must be a number of tokens, got {ours[name]!r:.50}")
    return int(value)


def _score(given: Any, name: str) -> float | None:
    value = _number(given)
    if value is not None and not math.isfinite(value):
        raise Flaw(f"{name!r} must be a number, or true or false, got {given!r:.50}")
    return value


def _number(value: Any) -> float | None:
    """Parse a number or boolean, also from CSV text; NaN for anything else."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.strip().lower(), value)
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
