"""Map the fields of a row: our names, common alternatives, and the names given with --map.

Only layouts in which every field has a known name are recognised automatically. A row with, say, a `question` is not:
it may have a `context` that belongs to the question.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, TypeAlias

from persyn.ingest.record import Flaw, Record

Names: TypeAlias = Mapping[str, str]
"""{our field: the file's field}, for fields without a common name."""
NO_NAMES: Names = MappingProxyType({})

Usual: TypeAlias = Mapping[str, tuple[str, ...]]
"""{our field: its names in files}; the first one present in a row is used."""

Spellings: TypeAlias = Mapping[str, tuple[str, ...]]

PROMPT: Usual = {
    "prompt": ("prompt",),
    "messages": ("messages", "conversations", "conversation"),
    "input": (),
    "system": ("system", "system_prompt", "system_message", "system prompt", "systemprompt"),
    "answer": ("answer", "reference_answer"),
    "tools": ("tools",),
    "response_schema": ("response_schema",),
    "response_format": ("response_format",),
    "id": ("id", "prompt_id"),
}
#: ShareGPT's names, whose turns end with the reply.
WITH_REPLY = frozenset({"conversations", "conversation"})
#: Fields that a row may have only once, under any name.
_ONE_OF = frozenset({"messages", "system", "answer", "tools", "response_schema"})
_ALPACA = ("instruction", "input", "output", "history")
#: Frequent names of the prompt in layouts that need --map.
_LIKELY = ("question", "problem", "query", "instruction", "input", "text", "user", "task")
#: Names that identify a line as a header.
KNOWN = frozenset((*(name for names in PROMPT.values() for name in names), *_ALPACA, *_LIKELY))
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Fields:
    """A row under our field names (None for absent fields), and its remaining fields under their own.

    called: {our field: its name in the row}, for fields that are present.
    names:  all field names of the row, in order.
    """

    ours: Record
    called: Names
    rest: Record
    names: Sequence[str]

    def listed(self) -> str:
        """The row's field names, formatted for a message."""
        names = self.names
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return (", ".join(f"{name!r:.40}" for name in names[:_SHOWN]) or "no fields") + more

    def likely(self) -> list[str]:
        """The values of --map that might identify the prompt."""
        keys = group_spellings(self.rest)
        likely = [f"prompt={keys[name][0]}" for name in _LIKELY if name in keys]
        likely += [f"messages={name}" for name, value in self.rest.items() if _are_turns(value)]
        return likely or ["prompt=NAME"]


def take(record: Record, names: Names = NO_NAMES, usual: Usual = PROMPT) -> Fields:
    """Map a row's fields, explicitly named ones first; raise `Flaw` for an ambiguous field."""
    rest, called = dict(record), {ours: theirs for ours, theirs in names.items() if theirs in record}
    keys = group_spellings(record)
    for ours, there in _usual_names(tuple(record), tuple(usual.items())):
        if ours not in names and (found := _one(ours, there, rest, called)):
            called[ours] = found
    if _is_alpaca(names, called, keys):
        called |= _alpaca(keys, {*called.values()})
    elif isinstance(record.get(called.get("prompt", "")), str) and _has_pairs(record, keys):
        called["history"] = keys["history"][0]
    fields = {ours: rest.pop(theirs, None) for ours, theirs in called.items()}
    return Fields({ours: fields.get(ours) for ours in (*usual, "history")}, called, rest, tuple(record))


def _are_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def group_spellings(record: Iterable[str]) -> Spellings:
    """Group a row's field names: {lower-case name: its spellings in the row}."""
    return _group_spellings(tuple(record))


@lru_cache(1024)
def _group_spellings(keys: tuple[str, ...]) -> Spellings:
    found: dict[str, tuple[str, ...]] = {}
    for key in keys:
        name = key.strip().lower()
        found[name] = (*found.get(name, ()), key)
    return found


@lru_cache(1024)
def _usual_names(
    keys: tuple[str, ...], usual: tuple[tuple[str, tuple[str, ...]], ...]
) -> Sequence[tuple[str, Sequence[tuple[str, str]]]]:
    """For each of our fields that a row may have under a usual name: the names, each with its spelling in the row."""
    spelled = _group_spellings(keys)
    found = ((ours, [(name, key) for name in known for key in spelled.get(name, ())]) for ours, known in usual)
    return [(ours, pairs) for ours, pairs in found if pairs]


def _one(ours: str, there: Sequence[tuple[str, str]], record: Record, called: Names) -> str | None:
    """The row's name for one of our fields that was not mapped explicitly.

    there: the field's usual names, each with its spelling in the row.
    """
    taken = {*called.values()}
    free = [(name, key) for name, key in there if key not in taken]
    if len(free) < 2:
        return free[0][1] if free else None
    said = [key for _, key in free if record[key] not in (None, "", [])] or [free[0][1]]
    is_one_of = ours in _ONE_OF or len({name for name, _ in free}) < len(free)
    if is_one_of and any(record[key] != record[said[0]] for key in said[1:]):
        raise Flaw(f"both {said[0]!r} and {said[1]!r} could be its {ours}", names=[f"{ours}=NAME"])
    return said[0]


def _is_alpaca(names: Names, called: Names, keys: Spellings) -> bool:
    if "prompt" in names:
        return names["prompt"].lower() == "instruction"
    is_other = "prompt" in called or "messages" in called
    return not is_other and "instruction" in keys and ("input" in keys or "output" in keys)


def _has_pairs(record: Record, keys: Spellings) -> bool:
    """Whether a row has earlier turns in Alpaca's form: a list of pairs of texts."""
    value = record[keys["history"][0]] if "history" in keys else None
    pairs = value if isinstance(value, list) else []
    return bool(pairs) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(said, str) for said in pair) for pair in pairs
    )


def _alpaca(keys: Spellings, taken: set[str]) -> dict[str, str]:
    ours = {"prompt": "instruction", "input": "input", "history": "history"}
    return {field: keys[name][0] for field, name in ours.items() if name in keys and keys[name][0] not in taken}
