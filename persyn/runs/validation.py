"""Explain in a reader's words what msgspec rejects in a run file, in TOML, JSON or a dict."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from msgspec import Struct
from msgspec.inspect import (
    AnyType,
    BoolType,
    DateTimeType,
    DictType,
    FloatType,
    IntType,
    ListType,
    LiteralType,
    Metadata,
    NoneType,
    StrType,
    StructType,
    Type,
    UnionType,
    type_info,
)

from persyn.config import QualityPart, QualityTable, RunConfig
from persyn.errors import shorten
from persyn.llm import engines
from persyn.llm.engines import ENGINES, EngineRole

#: The tables of engines' options, and the roles of their engines.
_OPTIONS: dict[str, EngineRole] = {
    "teachers.options": "teacher",
    "student.options": "student",
    "quality.options": "quality",
}
_WORDS: dict[type[Type], str] = {
    StrType: "text",
    IntType: "an integer",
    FloatType: "a number",
    BoolType: "true or false",
    DateTimeType: "a date and time with its time zone, such as 2026-12-24T18:00:00Z",
    StructType: "a table",
    DictType: "a table",
}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def explain(message: str, given: Any, kind: type[Struct] = RunConfig, table: str = "") -> str:
    """Say where the mistake of a msgspec message is, what was expected there and what was given.

    given: the unvalidated content of the file, or of a table in it.
    kind:  the expected type.
    table: the location of that table in the file.
    """
    at = re.search(r" - at `\$\.?([^`]*)`$", message)
    text, within = (message[: at.start()], at[1]) if at else (message, "")
    place, value = join(table, within), _value(given, within)
    expected = _fitting(_at(kind, within), value)
    if missing := re.fullmatch(r"Object missing required field `(.+)`", text):
        return _missing(missing[1], given, place)
    if unknown := re.fullmatch(r"Object contains unknown field `(.+)`", text):
        return _unknown(unknown[1], given, place, expected)
    whole = f"{_whose(given, place)}{heading(place)}" if place else "the top level"
    if isinstance(expected, StructType) and isinstance(value, dict):  # the table's own message
        return f"{whole}: {text}" if within else text
    name = whole if isinstance(expected, StructType) else key(given, place)
    if words := [word for each in _choices(expected) if isinstance(each, LiteralType) for word in each.values]:
        return f"{name} is {_shown(value)}; allowed: {', '.join(map(repr, words))}"
    said = f"the text {_shown(value)}" if isinstance(value, str) else _shown(value)
    return f"{name} must be {_expected(expected)}, got {said}"


def scorers(config: RunConfig) -> Iterator[tuple[str, QualityTable]]:
    """The tables of the scorers of quality with their keys."""
    for number, scorer in enumerate(config.scorers):
        yield f"quality[{number}]" if isinstance(scorer, QualityPart) else "quality", scorer


def key(given: Any, place: str) -> str:
    """The key at a location, as a message names it: "`run.alpha`", "teacher bob: `teachers.model`"."""
    return f"{_whose(given, place)}`{_without_numbers(place)}`{_item(place)}"


def join(table: str, within: str) -> str:
    """Join a table and a location within it to a dotted path from the top of the file."""
    return ".".join(part for part in (table, within) if part)


def _missing(name: str, given: Any, place: str) -> str:
    if place:
        return f"{_whose(given, place)}{name!r} is missing in {heading(place)}"
    is_list = isinstance(_at(RunConfig, name), ListType)
    return f"{heading(name + '[]' * is_list)} is missing; 'persyn init' writes a complete file"


def _unknown(name: str, given: Any, place: str, table: Type | None) -> str:
    """Say which table has an unknown key, and where the key belongs or which one was meant."""
    known = [field.encode_name for field in table.fields] if isinstance(table, StructType) else []
    if (home := _home(name, place)) is not None:
        hint = f"it belongs {_in(home)}"
    elif near := difflib.get_close_matches(name, known, n=1):
        hint = f"did you mean {near[0]!r}?"
    else:
        hint = f"known keys: {', '.join(known) or 'none'}"
    return f"{_whose(given, place)}unknown key {name!r} {_in(place)}; {hint}"


def _home(name: str, place: str) -> str | None:
    """The other table that a key belongs to: the only one near the table at a location, or else the only one."""
    here = _without_numbers(place)
    homes = [table for each, table in _keys() if each == name and _without_numbers(table) != here]
    near = [table for table in homes if here and _steps(table)[:1] == _steps(here)[:1]]
    found = {*(near or homes)}
    return found.pop() if len(found) == 1 else None


def _keys() -> Iterator[tuple[str, str]]:
    """Yield every key of a run file with the location of its table; `[]` marks a list of tables."""
    yield from _keys_of(type_info(RunConfig), "")
    named = [(table, name) for table, role in _OPTIONS.items() for name in engines.with_role(role)]
    for table, name in [*named, ("router.options", "router_fit")]:
        if (kind := ENGINES[name].options) is not None:
            yield from _keys_of(type_info(kind), table)


def _keys_of(kind: Type, place: str) -> Iterator[tuple[str, str]]:
    for field in kind.fields if isinstance(kind, StructType) else ():
        yield field.encode_name, place
        within = join(place, field.encode_name)
        for each in _choices(field.type):
            if isinstance(each, ListType):
                yield from _keys_of(each.item_type, f"{within}[]")
            else:
                yield from _keys_of(each, within)


def _without_numbers(place: str) -> str:
    return re.sub(r"\[[\d.]*\]", "", place)


def _whose(given: Any, place: str) -> str:
    """The teacher at a location, as the beginning of a message: by name, or counted from 1; empty for other places."""
    found = re.match(r"teachers\[(\d+)\]", place)
    if not found:
        return ""
    name = _value(given, f"{found[0]}.name")
    is_named = isinstance(name, str) and name and place != f"{found[0]}.name"
    return f"teacher {shorten(name, most=100) if is_named else int(found[1]) + 1}: "


def _item(place: str) -> str:
    """Which item of a list a location is in, counted from 1, as the end of its name; empty for a teacher."""
    found = re.findall(r"(?<!^teachers)\[(\d+)\]", place)
    return f" (item {int(found[-1]) + 1})" if found else ""


def heading(place: str) -> str:
    """The table at a location, as a TOML file writes it: "[run]", "[[teachers]]", "[teachers.sampling]"."""
    name = f"[{_without_numbers(place)}]"
    return f"[{name}]{_item(place)}" if place.endswith("]") else name


def _in(place: str) -> str:
    return f"in {heading(place)}" if place else "at the top level"


def _steps(place: str) -> list[str]:
    return re.findall(r"[^.\[\]]+", place)


def _value(given: Any, place: str) -> Any:
    """The value at a location; None where it does not exist."""
    for step in _steps(place):
        if isinstance(given, dict):
            given = given.get(step)
        elif isinstance(given, list | tuple) and step.isdecimal() and int(step) < len(given):
            given = given[int(step)]
        else:
            return None
    return given


def _at(kind: type[Struct], place: str) -> Type | None:
    """The type expected at a location; None where it is unknown."""
    found: Type | None = type_info(kind)
    for step in _steps(place):
        choices, found = _choices(found), None
        for each in choices:
            if isinstance(each, ListType) and step.isdecimal():
                found = each.item_type
            elif isinstance(each, StructType):
                found = next((field.type for field in each.fields if field.encode_name == step), found)
    return found


def _choices(kind: Type | None) -> Sequence[Type]:
    """The types of a union, without None; otherwise the type itself."""
    kinds = kind.types if isinstance(kind, UnionType) else () if kind is None else (kind,)
    return [each for each in kinds if not isinstance(each, NoneType)]


def _fitting(kind: Type | None, value: Any) -> Type | None:
    """Of several types, the one that a table or a list was meant to be."""
    meant = StructType if isinstance(value, dict) else ListType if isinstance(value, list | tuple) else None
    choices = _choices(kind)
    found = [each for each in choices if meant is not None and isinstance(each, meant)]
    return found[0] if len(found) == 1 and len(choices) > 1 else kind


def _expected(kind: Type | None) -> str:
    """A type in words."""
    return " or ".join(map(_expected_one, _choices(kind)))


def _expected_one(kind: Type) -> str:
    if isinstance(kind, Metadata):
        return _expected(kind.type)
    if isinstance(kind, ListType):
        items = {StructType: " of tables (with double brackets in TOML)", StrType: " of texts"}
        return f"a list{items.get(type(kind.item_type), '')}"
    if isinstance(kind, DictType) and not isinstance(kind.value_type, AnyType):
        return f"a table whose values are each {_expected(kind.value_type)}"
    if isinstance(kind, StrType) and kind.pattern:
        signs = ". _ : + @ / -" if "/" in kind.pattern else ". _ : + @ -"
        return f"1 to {kind.max_length} letters, digits and {signs}, beginning with a letter or a digit"
    words = _WORDS.get(type(kind)) or f"of type {type(kind).__name__.removesuffix('Type').lower()}"
    bounds = ((sign, getattr(kind, name, None)) for name, sign in _BOUNDS.items())
    return f"{words} {' and '.join(f'{sign} {bound}' for sign, bound in bounds if bound is not None)}".rstrip()


def _shown(value: Any) -> str:
    """A given value in words that fit TOML, JSON and Python."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case dict():
            return "a table"
        case list() | tuple():
            return "a list"
        case str():
            return shorten(repr(value))
    return shorten(str(value))
