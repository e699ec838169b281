"""Parse and validate a run file; locate errors; resolve paths."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct
from msgspec.inspect import ListType, LiteralType, StructType, Type, UnionType, type_info

from persyn.config import IMPORTED, RunConfig, TeacherTable
from persyn.errors import UsageError, shorten
from persyn.llm import engines, options
from persyn.llm.engines import ENGINES
from persyn.method.strategies import STRATEGIES

#: Stands for the file in errors about a configuration that was not read from one.
_UNNAMED = Path("the configuration")


def read(path: Path) -> RunConfig:
    """Read and validate a run file in TOML or JSON; relative paths are resolved against its folder.

    Raises `UsageError` with the location of the first error.
    """
    try:
        given = _decode(path)
    except OSError as error:
        raise UsageError(f"cannot read the run file {path}: {error.strerror}; 'persyn init' writes one") from error
    return _checked(given, path)


def parse(given: Mapping[str, Any]) -> RunConfig:
    """Check a configuration with the tables and keys of a run file; paths are relative to the current directory.

    Raises `UsageError` with the place of the first mistake.
    """
    try:
        plain = msgspec.to_builtins(given, enc_hook=os.fspath)  # a path becomes text
        _require_storable(plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{_UNNAMED}: expected text, numbers, lists and dicts: {error}") from error
    except UsageError as error:
        raise UsageError(f"{_UNNAMED}: {error}") from error
    return _checked(plain, _UNNAMED)


def _checked(given: Any, path: Path) -> RunConfig:
    try:
        config = msgspec.convert(given, RunConfig)
    except msgspec.ValidationError as error:
        raise UsageError(f"{path}: {_explain(str(error), given)}") from error
    _require_kinds(path, _kinds(config))
    _require_quality(path, config)
    _require_strategy(path, config)
    _require_options(path, _said(config))
    return _absolute(config, path)


def n_calibration(config: RunConfig) -> int | None:
    """How many prompts every teacher answers, the hold-out included; None means all of them."""
    match STRATEGIES.require(config.strategy.kind, "strategy").grid:
        case "all":
            return None
        case "calibration":
            return config.run.calibration
    return 0


def holdout(config: RunConfig) -> float:
    """The share of calibration prompts held out to measure the router and to compare strategies."""
    return 0.0 if n_calibration(config) == 0 else config.run.holdout


def read_teachers(path: Path) -> list[TeacherTable]:
    """Read the [[teachers]] of a TOML or JSON file, which may be a run file.

    A teacher's engine defaults to "imported" and its model to its name. Raises `UsageError` with the location of the
    first error.
    """
    try:
        given = _decode(path)
    except OSError as error:
        raise UsageError(f"cannot read the teachers' file {path}: {error.strerror}") from error
    try:
        found = msgspec.convert(given, _TeachersFile).teachers
        tables = [{"engine": IMPORTED, "model": table.get("name"), **table} for table in found]
        teachers = msgspec.convert(tables, list[TeacherTable])
    except msgspec.ValidationError as error:
        raise UsageError(f"{path}: {_explain(str(error).replace('$[', '$.teachers['), given)}") from error
    _require_kinds(path, _kinds_of_teachers(teachers))
    _require_options(path, map(_said_of_teacher, teachers))
    return [_absolute_teacher(teacher, path, number) for number, teacher in enumerate(teachers)]


def _decode(path: Path) -> Any:
    """Decode a file without checking its keys; raise `UsageError` for invalid syntax, `OSError` for a missing file."""
    is_json = path.suffix.lower() == ".json"
    data = path.read_bytes()
    try:
        given = msgspec.json.decode(data) if is_json else msgspec.toml.decode(data)
        _require_storable(given)
    except (ValueError, RecursionError) as error:
        said = str(error).removesuffix(" - at `$[...]`")  # a location that helps nobody
        if not is_json and re.search(rb"^\s*\[\s*teachers\s*\]", data, re.MULTILINE):
            said += "; teachers are a list of tables: write [[teachers]], with two brackets"
        raise UsageError(f"{path}: not {'JSON' if is_json else 'TOML'}: {said}") from error
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return given


def _require_storable(value: Any, place: str = "") -> None:
    """Raise `UsageError` for what the store cannot hold: inf and nan, integers beyond 64 bits, NUL characters."""
    match value:
        case dict():
            for key, part in value.items():
                _require_storable(part, _place(place, key))
        case list():
            for number, part in enumerate(value):
                _require_storable(part, f"{place}[{number}]")
        case float() if not math.isfinite(value):
            raise UsageError(f"`{place}` is {value}; it must be a finite number")
        case int() if not -(2**63) <= value < 2**63:
            raise UsageError(f"`{place}` is an integer of more than 64 bits: {shorten(str(value), most=30)}")
        case str() if "\0" in value:
            raise UsageError(f"`{place}` has a NUL character, which the database cannot store: {shorten(repr(value))}")


class _TeachersFile(Struct, frozen=True):
    """The teachers of a file; other keys are ignored."""

    teachers: list[dict[str, Any]]


class _Said(NamedTuple):
    """An engine in the run file: whose it is, the table of its options, its name and its options."""

    whose: str
    table: str
    engine: str
    options: dict[str, Any]


def _kinds(config: RunConfig) -> Iterator[tuple[str, str, Sequence[str]]]:
    yield "student.engine", config.student.engine, engines.with_role("student")
    yield "quality.kind", config.quality.kind, engines.with_role("quality")
    yield "strategy.kind", config.strategy.kind, list(STRATEGIES)
    yield from _kinds_of_teachers(config.teachers)


def _kinds_of_teachers(teachers: Sequence[TeacherTable]) -> Iterator[tuple[str, str, Sequence[str]]]:
    names = engines.with_role("teacher")
    for number, teacher in enumerate(teachers):
        yield f"teachers[{number}].engine", teacher.engine, names


def _require_kinds(path: Path, kinds: Iterable[tuple[str, str, Sequence[str]]]) -> None:
    """Raise `UsageError` for a name that is not one of a registry's; `kinds` has (key, name, known names)."""
    for key, name, known in kinds:
        if name not in known:
            flaw = (STRATEGIES if key == "strategy.kind" else ENGINES).flaw(name)
            hint = f"; {flaw}" if flaw else ""
            raise UsageError(f"{path}: `{key}` is {name!r}; allowed: {', '.join(map(repr, known))}{hint}")


def _require_quality(path: Path, config: RunConfig) -> None:
    """Raise `UsageError` for a scorer without the model that it needs, and for a judge without its engine."""
    quality, kind = config.quality, ENGINES[config.quality.kind]
    needed = {"function": "model, a module:function", "field": "model, the field that scores were imported from"}
    if not quality.model and (kind.is_nested or kind.model):
        raise UsageError(f"{path}: [quality] a {kind.name} needs {needed.get(kind.model, 'a model')}")
    if kind.is_nested and quality.options.get("engine") not in (known := engines.with_role("judge")):
        raise UsageError(f"{path}: [quality] a {kind.name} needs options.engine, one of {', '.join(known)}")


def _require_strategy(path: Path, config: RunConfig) -> None:
    """Raise `UsageError` for a strategy without the fields that it needs."""
    strategy, kind = config.strategy, STRATEGIES[config.strategy.kind]
    if bool(strategy.model) != (kind.decided_by == "function"):
        raise UsageError(f"{path}: [strategy] python needs model, a module:function; no other strategy has a model")
    for field in kind.needs:
        if without := [teacher.name for teacher in config.teachers if getattr(teacher, field) is None]:
            raise UsageError(f"{path}: strategy {kind.name} needs {field} of {', '.join(without)}")
    families = {teacher.family for teacher in config.teachers}
    if kind.needs_family and (config.student.family is None or config.student.family not in families):
        raise UsageError(
            f"{path}: strategy {kind.name} needs a [student] family that a teacher has, got {config.student.family}"
        )


def _said(config: RunConfig) -> Iterator[_Said]:
    student, quality, router = config.student, config.quality, config.router
    yield _Said("the student", "student.options", student.engine, student.options)
    yield _Said("the quality", "quality.options", quality.kind, quality.options)
    if ENGINES[quality.kind].is_nested:  # the judge's own options were validated above
        inner = msgspec.convert(quality.options, options.JudgeOptions)
        yield _Said("the judge's model", "quality.options.options", inner.engine, inner.options)
    fits = "router_fit" if router.engine == "router" else router.engine
    yield _Said("the router", "router.options", fits, router.options)
    yield from map(_said_of_teacher, config.teachers)


def _said_of_teacher(teacher: TeacherTable) -> _Said:
    return _Said(f"teacher {teacher.name}", "teachers.options", teacher.engine, teacher.options)


def _require_options(path: Path, said: Iterable[_Said]) -> None:
    """Raise `UsageError` for an option that its engine does not accept."""
    for one in said:
        kind = ENGINES[one.engine].options
        if kind is None:  # imported teachers have no options
            continue
        try:
            msgspec.convert(one.options, kind)
        except msgspec.ValidationError as error:
            flaw = _explain(str(error), one.options, kind, one.table)
            raise UsageError(f"{path}: {one.whose} ({one.engine}): {flaw}") from error


def _absolute(config: RunConfig, file: Path) -> RunConfig:
    """Make the paths of existing files absolute."""
    prompts = [str(_resolved(each, file, "prompts.file")) for each in config.prompts.files]
    quality, is_path = config.quality.model, engines.loads_weights(config.quality.kind, config.quality.options)
    replace = msgspec.structs.replace
    return replace(
        config,
        prompts=replace(config.prompts, file=prompts),
        student=replace(config.student, model=_local(config.student.model, file, "student.model")),
        quality=replace(config.quality, model=_local(quality, file, "quality.model") if is_path else quality),
        router=replace(config.router, backbone=_local(config.router.backbone, file, "router.backbone")),
        teachers=[_absolute_teacher(teacher, file, number) for number, teacher in enumerate(config.teachers)],
    )


def _absolute_teacher(teacher: TeacherTable, file: Path, number: int) -> TeacherTable:
    if ENGINES[teacher.engine].model in ("server", "field"):  # the model is not a local path
        return teacher
    return msgspec.structs.replace(teacher, model=_local(teacher.model, file, f"teachers[{number}].model"))


def _local(model: str, file: Path, key: str) -> str:
    """Return an existing path as absolute; anything else is a hub id and is returned unchanged."""
    looks_local = model.startswith((".", "/", "~"))
    path = _resolved(model, file, key)
    return str(path) if model and (looks_local or path.is_dir()) else model


def _resolved(name: str, file: Path, key: str) -> Path:
    """The absolute path that a key names, existing or not; raise `UsageError` for an invalid path."""
    try:
        path = (file.absolute().parent / Path(name).expanduser()).resolve()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError) as error:  # too long, or the home of a user who does not exist
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{file}: `{key}` is {shorten(repr(name))}, which cannot be looked up: {why}") from error
    return path


def _explain(message: str, given: Any, kind: type[Struct] = RunConfig, table: str = "") -> str:
    """Extend msgspec's message with the given value, or with the nearest valid key for a misspelt one.

    given: the unvalidated content of the file, or of a table in it.
    kind:  the expected type.
    """
    unknown = re.search(r"unknown field `([^`]+)`(?: - at `\$\.?([^`]*)`)?", message)
    missing = re.fullmatch(r"Object missing required field `([^`]+)`(?: - at `\$\.?([^`]*)`)?", message)
    if missing and (place := _place(table, missing[2])):
        return f"{missing[1]!r} is missing in [{place}]"
    if missing:
        return f"[{missing[1]}] is missing; 'persyn init' writes a complete file"
    if not unknown:
        return _wrong_value(message, given, kind, table)
    key, place = unknown[1], re.sub(r"\[\d*\.*\]", "", _place(table, unknown[2]))
    known = _keys(kind, unknown[2] or "")
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known) or 'none'}"
    return f"unknown key {key!r} in {f'[{place}]' if place else 'the file'}; {hint}"


def _place(table: str, within: str | None) -> str:
    """Join a table and a location within it to a dotted path from the top of the file."""
    return ".".join(part for part in (table, within) if part)


def _wrong_value(message: str, given: Any, kind: type[Struct], table: str) -> str:
    """Say what type a value should have, what was given, and which values are allowed if they can be listed."""
    within = (re.search(r" - at `\$\.?([^`]*)`$", message) or ("", ""))[1]
    place, value = _place(table, within), _value(given, within)
    if words := _words(_at(kind, within)):
        return f"`{place}` is {value!r}; allowed: {', '.join(map(repr, words))}"
    got = f", got {shorten(repr(value))}" if isinstance(value, str | int | float) else ""
    if " matching regex " in message:
        signs = "letters, digits and . _ : + @ -"
        return f"`{place}` is not a valid name: use {signs}, beginning with a letter or a digit{got}"
    said = message.replace("Object", "the table").replace("`$.", f"`{_place(table, '')}{'.' if table else ''}")
    return said.replace("`$`", "the top of the file") + got


def _steps(place: str) -> list[str]:
    return re.findall(r"[^.\[\]]+", place)


def _value(file: Any, place: str) -> Any:
    """The value at a dotted path; None where the path does not exist."""
    for step in _steps(place):
        if isinstance(file, dict):
            file = file.get(step)
        elif isinstance(file, list) and step.isdecimal() and int(step) < len(file):
            file = file[int(step)]
        else:
            return None
    return file


def _at(kind: type[Struct], place: str) -> Type | None:
    """The type expected at a dotted path; None where it is unknown."""
    found: Type | None = type_info(kind)
    for step in _steps(place):
        if isinstance(found, StructType):
            found = next((field.type for field in found.fields if field.encode_name == step), None)
        else:
            found = found.item_type if isinstance(found, ListType) else None
    return found


def _words(kind: Type | None) -> Sequence[object]:
    """The values allowed by a type, if they can be listed."""
    if isinstance(kind, UnionType):  # a union, possibly with None
        return [word for each in kind.types for word in _words(each)]
    return kind.values if isinstance(kind, LiteralType) else ()


def _keys(kind: type[Struct], place: str) -> tuple[str, ...]:
    """The keys of the table at a dotted path."""
    found = _at(kind, place)
    return tuple(field.encode_name for field in found.fields) if isinstance(found, StructType) else ()
