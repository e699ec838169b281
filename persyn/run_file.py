"""Reading a run file: what a mistake in it is told as, and which paths are meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.inspect import ListType, LiteralType, StructType, Type, type_info

from persyn import config as tables
from persyn.config import IMPORTED, RunConfig, TeacherTable
from persyn.errors import UsageError, shorten


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
    return [_absolute_teacher(teacher, path.absolute().parent) for teacher in teachers]


def _decoder(path: Path) -> Any:
    return msgspec.json.decode if path.suffix.lower() == ".json" else msgspec.toml.decode


class _TeachersFile(Struct, frozen=True):
    """Whatever else it holds."""

    teachers: list[dict[str, Any]]


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


def _explain(message: str, file: Any) -> str:
    """msgspec's message with what was given, or with the nearest known key when one was mistyped.

    file: what the file holds, unchecked.
    """
    unknown = re.search(r"unknown field `([^`]+)`(?: - at `\$\.?([^`]*)`)?", message)
    missing = re.fullmatch(r"Object missing required field `([^`]+)`(?: - at `\$\.?([^`]*)`)?", message)
    if missing and missing[2]:
        return f"{missing[1]!r} is missing in [{missing[2]}]"
    if missing:
        return f"[{missing[1]}] is missing; 'persyn init' writes a file that has all it needs"
    if not unknown:
        return _wrong_value(message, file)
    key, place = unknown[1], re.sub(r"\[\d*\.*\]", "", unknown[2] or "")
    known = _keys(place)
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(known)}"
    return f"unknown key {key!r} in {f'[{place}]' if place else 'the file'}; {hint}"


def _wrong_value(message: str, file: Any) -> str:
    """What a value should be, what it is, and which there are, if they can be counted."""
    place = (re.search(r" - at `\$\.?([^`]*)`$", message) or ("", ""))[1]
    given = _value(file, place)
    if choices := _choices(place):
        return f"`{place}` is {given!r}; it takes {', '.join(map(repr, choices))}"
    got = f", got {shorten(repr(given))}" if isinstance(given, str | int | float) else ""
    if " matching regex " in message:
        return f"`{place}` is no name: letters, digits and . _ : + @ -, beginning with a letter or a digit{got}"
    return message.replace("Object", "the table").replace("`$.", "`").replace("`$`", "the top of the file") + got


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


def _choices(place: str) -> Sequence[object]:
    """The words that a dotted place takes, if it takes words of a list."""
    kind: Type = type_info(RunConfig)
    for step in _steps(place):
        if isinstance(kind, StructType):
            kind = next(field.type for field in kind.fields if field.encode_name == step)
        elif isinstance(kind, ListType):
            kind = kind.item_type
    return kind.values if isinstance(kind, LiteralType) else ()


def _keys(place: str) -> tuple[str, ...]:
    """The keys of the table at a dotted place."""
    known: dict[str, type[Struct]] = {
        "": RunConfig,
        "run": tables.RunTable,
        "prompts": tables.PromptsTable,
        "student": tables.StudentTable,
        "quality": tables.QualityTable,
        "router": tables.RouterTable,
        "strategy": tables.StrategyTable,
        "teachers": TeacherTable,
        "teachers.sampling": tables.Sampling,
        "teachers.few_shot": tables.Shot,
    }
    return known[place].__struct_fields__ if place in known else ()
