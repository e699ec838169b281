"""Where a row has what: under our names, under the usual other ones, and where --map says.

Only a layout whose every field is known by its name is read by itself. A row with, say, a `question` is not: it may
have a `context` that belongs to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, TypeAlias

from persyn.ingest.record import Flaw, Record

Names: TypeAlias = Mapping[str, str]
"""{our field: the file's field}, where it is none of the usual names."""
NO_NAMES: Names = MappingProxyType({})

Usual: TypeAlias = Mapping[str, tuple[str, ...]]
"""{our field: what files call it}, the first of them that a row has."""

Spellings: TypeAlias = Mapping[str, tuple[str, ...]]

PROMPT: Usual = {
    "prompt": ("prompt",),
    "messages": ("messages", "conversations", "conversation"),
    "input": (),
    "system": ("system", "system_prompt", "system_message", "system prompt", "systemprompt"),
    "answer": ("answer", "reference_answer"),
    "id": ("id", "prompt_id"),
}
#: ShareGPT's: with the reply at their end.
WITH_REPLY = frozenset({"conversations", "conversation"})
#: Of these a row has one, whatever it is called.
_ONE_OF = frozenset({"messages", "system", "answer"})
_ALPACA = ("instruction", "input", "output", "history")
#: What a prompt is often called, in layouts that are not read without being told.
_LIKELY = ("question", "problem", "query", "instruction", "input", "text", "user", "task")
#: What tells a header from any other line.
KNOWN = frozenset((*(name for names in PROMPT.values() for name in names), *_ALPACA, *_LIKELY))
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Fields:
    """A row by our names, None for what it has not, and what is left of it by its own.

    called: {our field: how the row spells it}, of those that it has.
    names:  of all its fields, in the row's order.
    """

    ours: Record
    called: Names
    rest: Record
    names: Sequence[str]

    def listed(self) -> str:
        """The row's fields, for a person."""
        names = self.names
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return (", ".join(f"{name!r:.40}" for name in names[:_SHOWN]) or "no fields") + more

    def likely(self) -> str:
        """How to say which of them is the prompt."""
        keys = spelled(self.rest)
        likely = [f"prompt={keys[name][0]}" for name in _LIKELY if name in keys]
        likely += [f"messages={name}" for name, value in self.rest.items() if _are_turns(value)]
        return " or ".join(f"--map {each}" for each in likely) or "--map prompt=NAME"


def take(record: Record, names: Names = NO_NAMES, usual: Usual = PROMPT) -> Fields:
    """Tell a row's fields apart, those first that are named. Raises `Flaw` where two could be meant."""
    rest, called = dict(record), {ours: theirs for ours, theirs in names.items() if theirs in record}
    keys = spelled(record)
    for ours, known in usual.items():
        if ours not in names and (found := _one(ours, known, rest, keys, called)):
            called[ours] = found
    if _is_alpaca(names, called, keys):
        called |= _alpaca(keys, {*called.values()})
    elif isinstance(record.get(called.get("prompt", "")), str) and _has_pairs(record, keys):
        called["history"] = keys["history"][0]
    fields = {ours: rest.pop(theirs, None) for ours, theirs in called.items()}
    return Fields({ours: fields.get(ours) for ours in (*usual, "history")}, called, rest, tuple(record))


def _are_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def spelled(record: Iterable[str]) -> Spellings:
    """{a name in lower case: as the row spells it}, which need not be in one way alone."""
    return _spelled(tuple(record))


@lru_cache(1024)
def _spelled(keys: tuple[str, ...]) -> Spellings:
    found: dict[str, tuple[str, ...]] = {}
    for key in keys:
        name = key.strip().lower()
        found[name] = (*found.get(name, ()), key)
    return found


def _one(ours: str, known: Iterable[str], record: Record, keys: Spellings, called: Names) -> str | None:
    """What a row calls a field of ours that is not named."""
    taken = {*called.values()}
    free = [(name, key) for name in known for key in keys.get(name, ()) if key not in taken]
    if not free:
        return None
    said = [key for _, key in free if record[key] not in (None, "", [])] or [free[0][1]]
    is_one_of = ours in _ONE_OF or len({name for name, _ in free}) < len(free)
    if is_one_of and any(record[key] != record[said[0]] for key in said[1:]):
        raise Flaw(f"both {said[0]!r} and {said[1]!r}; say by --map {ours}=NAME which is meant")
    return said[0]


def _is_alpaca(names: Names, called: Names, keys: Spellings) -> bool:
    if "prompt" in names:
        return names["prompt"].lower() == "instruction"
    is_other = "prompt" in called or "messages" in called
    return not is_other and "instruction" in keys and ("input" in keys or "output" in keys)


def _has_pairs(record: Record, keys: Spellings) -> bool:
    """Whether a row has earlier turns as Alpaca keeps them: nothing else is a list of pairs of texts."""
    value = record[keys["history"][0]] if "history" in keys else None
    pairs = value if isinstance(value, list) else []
    return bool(pairs) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(said, str) for said in pair) for pair in pairs
    )


def _alpaca(keys: Spellings, taken: set[str]) -> dict[str, str]:
    ours = {"prompt": "instruction", "input": "input", "history": "history"}
    return {field: keys[name][0] for field, name in ours.items() if name in keys and keys[name][0] not in taken}
