"""Reading a run file: what a mistake in it is told as, and which paths are meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct
from msgspec.inspect import ListType, LiteralType, StructType, Type, UnionType, type_info

from persyn.config import IMPORTED, RunConfig, TeacherTable
from persyn.errors import UsageError, shorten
from persyn.llm import options


def read(path: Path) -> RunConfig:
    """Read and check a run file, in TOML or JSON; paths in it become absolute, relative to its folder.

    Raises `UsageError` with the place of the first mistake.
    """
    try:
        config = _decoder(path)(path.read_bytes(), type=RunConfig)
    except OSError as error:
        raise UsageError(f"cannot read the run file {path}: {error.strerror}; 'persyn init' writes one") from error
    except msgspec.ValidationError as error:
        raise UsageError(f"{path}: {_explain(str(error), _decoder(path)(path.read_bytes()))}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {_malformed(path, error)}") from error
    _require_options(path, _said(config))
    return _absolute(config, path.absolute().parent)


def read_teachers(path: Path) -> list[TeacherTable]:
    """The [[teachers]] of a TOML or JSON file, which may be a run file and need not.

    In such a list a teacher's engine is "imported" and its model its name, unless said otherwise.
    Raises `UsageError` with the place of the first mistake.
    """
    try:
        found = _decoder(path)(path.read_bytes(), type=_TeachersFile).teachers
        tables = [{"engine": IMPORTED, "model": table.get("name"), **table} for table in found]
        teachers = msgspec.convert(tables, list[TeacherTable])
    except OSError as error:
        raise UsageError(f"cannot read the teachers' file {path}: {error.strerror}") from error
    except msgspec.ValidationError as error:
        found = _decoder(path)(path.read_bytes())
        raise UsageError(f"{path}: {_explain(str(error).replace('$[', '$.teachers['), found)}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {_malformed(path, error)}") from error
    _require_options(path, map(_said_of_teacher, teachers))
    return [_absolute_teacher(teacher, path.absolute().parent) for teacher in teachers]


def _decoder(path: Path) -> Any:
    return msgspec.json.decode if path.suffix.lower() == ".json" else msgspec.toml.decode


class _TeachersFile(Struct, frozen=True):
    """Whatever else it holds."""

    teachers: list[dict[str, Any]]


class _Said(NamedTuple):
    """What is said of an engine: of whose, in which table, and the options."""

    whose: str
    table: str
    engine: str
    options: dict[str, Any]


def _said(config: RunConfig) -> Iterator[_Said]:
    student, quality, router = config.student, config.quality, config.router
    yield _Said("the student", "student.options", student.engine, student.options)
    yield _Said("the quality", "quality.options", quality.kind, quality.options)
    if quality.kind == "judge":  # above it was found that its own options are there and right
        inner = msgspec.convert(quality.options, options.Judge)
        yield _Said("the judge's model", "quality.options.options", inner.engine, inner.options)
    fits = "router_fit" if router.engine == "router" else router.engine
    yield _Said("the router", "router.options", fits, router.options)
    yield from map(_said_of_teacher, config.teachers)


def _said_of_teacher(teacher: TeacherTable) -> _Said:
    return _Said(f"teacher {teacher.name}", "teachers.options", teacher.engine, teacher.options)


def _require_options(path: Path, said: Iterable[_Said]) -> None:
    """Raise `UsageError` for an option that its engine does not take."""
    for one in said:
        kind = options.OF_ENGINE.get(one.engine)
        if kind is None:  # what was imported is not asked
            continue
        try:
            msgspec.convert(one.options, kind)
        except msgspec.ValidationError as error:
            flaw = _explain(str(error), one.options, kind, one.table)
            raise UsageError(f"{path}: {one.whose} ({one.engine}): {flaw}") from error


def _absolute(config: RunConfig, folder: Path) -> RunConfig:
    """Paths that are there become absolute."""
    files = [str((folder / Path(file).expanduser()).resolve()) for file in config.prompts.files]
    quality, is_path = config.quality.model, config.quality.is_loaded
    replace = msgspec.structs.replace
    return replace(
        config,
        prompts=replace(config.prompts, file=files),
        student=replace(config.student, model=_local(config.student.model, folder)),
        quality=replace(config.quality, model=_local(quality, folder) if is_path else quality),
        router=replace(config.router, backbone=_local(config.router.backbone, folder)),
        teachers=[_absolute_teacher(teacher, folder) for teacher in config.teachers],
    )


def _absolute_teacher(teacher: TeacherTable, folder: Path) -> TeacherTable:
    lies_elsewhere = teacher.engine in ("openai", IMPORTED)
    return teacher if lies_elsewhere else msgspec.structs.replace(teacher, model=_local(teacher.model, folder))


def _local(model: str, folder: Path) -> str:
    """A path that is there, absolute; what is no local path is a hub id and stays."""
    looks_local = model.startswith((".", "/", "~"))
    path = (folder / Path(model).expanduser()).resolve()
    return str(path) if model and (looks_local or path.is_dir()) else model


def _malformed(path: Path, error: Exception) -> str:
    is_json = path.suffix.lower() == ".json"
    return f"not {'JSON' if is_json else 'TOML'}: {error}"


def _explain(message: str, given: Any, kind: type[Struct] = RunConfig, table: str = "") -> str:
    """msgspec's message with what was given, or with the nearest known key when one was mistyped.

    given: what the file, or a table of it, holds, unchecked.
    kind:  what it should be.
    """
    unknown = re.search(r"unknown field `([^`]+)`(?: - at `\$\.?([^`]*)`)?", message)
    missing = re.fullmatch(r"Object missing required field `([^`]+)`(?: - at `\$\.?([^`]*)`)?", message)
    if missing and (place := _place(table, missing[2])):
        return f"{missing[1]!r} is missing in [{place}]"
    if missing:
        return f"[{missing[1]}] is missing; 'persyn init' writes a file that has all it needs"
    if not unknown:
        return _wrong_value(message, given, kind, table)
    key, place = unknown[1], re.sub(r"\[\d*\.*\]", "", _place(table, unknown[2]))
    known = _keys(kind, unknown[2] or "")
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(known) or 'none'}"
    return f"unknown key {key!r} in {f'[{place}]' if place else 'the file'}; {hint}"


def _place(table: str, within: str | None) -> str:
    """A dotted place in a table, from the top of the file."""
    return ".".join(part for part in (table, within) if part)


def _wrong_value(message: str, given: Any, kind: type[Struct], table: str) -> str:
    """What a value should be, what it is, and which there are, if they can be counted."""
    within = (re.search(r" - at `\$\.?([^`]*)`$", message) or ("", ""))[1]
    place, value = _place(table, within), _value(given, within)
    if words := _words(_at(kind, within)):
        return f"`{place}` is {value!r}; it takes {', '.join(map(repr, words))}"
    got = f", got {shorten(repr(value))}" if isinstance(value, str | int | float) else ""
    if " matching regex " in message:
        return f"`{place}` is no name: letters, digits and . _ : + @ -, beginning with a letter or a digit{got}"
    said = message.replace("Object", "the table").replace("`$.", f"`{_place(table, '')}{'.' if table else ''}")
    return said.replace("`$`", "the top of the file") + got


def _steps(place: str) -> list[str]:
    return re.findall(r"[^.\[\]]+", place)


def _value(file: Any, place: str) -> Any:
    """What stands at a dotted place; None where there is no such place."""
    for step in _steps(place):
        if isinstance(file, dict):
            file = file.get(step)
        elif isinstance(file, list) and step.isdecimal() and int(step) < len(file):
            file = file[int(step)]
        else:
            return None
    return file


def _at(kind: type[Struct], place: str) -> Type | None:
    """What a dotted place takes; None where that is not said."""
    found: Type | None = type_info(kind)
    for step in _steps(place):
        if isinstance(found, StructType):
            found = next((field.type for field in found.fields if field.encode_name == step), None)
        else:
            found = found.item_type if isinstance(found, ListType) else None
    return found


def _words(kind: Type | None) -> Sequence[object]:
    """Those that may stand there, if they are all known."""
    if isinstance(kind, UnionType):  # one of them, or nothing
        return [word for each in kind.types for word in _words(each)]
    return kind.values if isinstance(kind, LiteralType) else ()


def _keys(kind: type[Struct], place: str) -> tuple[str, ...]:
    """The keys of the table at a dotted place."""
    found = _at(kind, place)
    return tuple(field.encode_name for field in found.fields) if isinstance(found, StructType) else ()
