"""Read a run file, or a file of teachers; locate errors."""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from persyn.config import IMPORTED, Limits, RunConfig, TeacherTable
from persyn.errors import UsageError, shorten
from persyn.llm import engines, options
from persyn.llm.engines import ENGINES
from persyn.method.learnability import LEARNABILITIES
from persyn.method.strategies import STRATEGIES
from persyn.registry import Registry
from persyn.router import inputs
from persyn.router.kinds.registry import ROUTERS
from persyn.runs import paths, rules, validation

#: The registries of keys whose value is not the name of an engine.
_REGISTRIES: Mapping[str, Registry[Any]] = {
    "strategy.kind": STRATEGIES,
    "router.kind": ROUTERS,
    "run.learnability": LEARNABILITIES,
}

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
        plain = msgspec.to_builtins(given, str_keys=True, enc_hook=_plain)
        _require_storable(plain)
    except (TypeError, ValueError, RecursionError):
        raise UsageError(f"{_UNNAMED}: expected text, numbers, lists, and dicts whose keys are text") from None
    except UsageError as error:
        raise UsageError(f"{_UNNAMED}: {error}") from None
    return _checked(plain, _UNNAMED)


def _plain(value: Any) -> str | int | float:
    """A path as text, and a number of another library as Python's; raise `UsageError` for what no file can contain."""
    match value:
        case os.PathLike():
            return os.fsdecode(value)
        case numbers.Integral():
            return int(value)
        case numbers.Real():
            return float(value)
    raise UsageError(f"expected text, numbers, lists and dicts, got {shorten(repr(value))}")


def _checked(given: Any, path: Path) -> RunConfig:
    _require_budget_tables(path, given)
    try:
        config = msgspec.convert(given, RunConfig)
    except msgspec.ValidationError as error:
        raise UsageError(f"{path}: {validation.explain(str(error), given)}") from None
    _require_kinds(path, given, _kinds(config))
    rules.require_quality(path, config)
    _require_options(path, _said(config))
    _require_adapters(path, config.teachers)
    rules.require(path, config)
    return paths.absolute(config, path)


def n_calibration(config: RunConfig) -> int | None:
    """How many prompts every teacher answers, the hold-out included; None means all of them."""
    if config.router.fitted is not None:
        return 0
    match STRATEGIES.require(config.strategy.kind, "strategy").grid:
        case "all":
            return None
        case "calibration":
            return config.run.calibration
    return 0


def scores_learnability(config: RunConfig) -> bool:
    """Whether a new run has its student score the grid: where learnability has a weight, or the strategy reads it."""
    reads = STRATEGIES.require(config.strategy.kind, "strategy").reads_learnability
    return config.student is not None and (config.run.alpha > 0 or reads)


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
        raise UsageError(f"{path}: {validation.explain(str(error).replace('$[', '$.teachers['), given)}") from None
    _require_kinds(path, given, _kinds_of_teachers(teachers))
    _require_options(path, map(_said_of_teacher, teachers))
    _require_adapters(path, teachers)
    return [paths.absolute_teacher(teacher, path) for teacher in teachers]


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
        raise UsageError(f"{path}: {error}") from None
    return given


def _require_storable(given: Any) -> None:
    """Raise `UsageError` for what the store cannot hold: inf and nan, integers beyond 64 bits, NUL characters."""
    for place, why in _unstorable(given):
        raise UsageError(f"{validation.key(given, place)} {why}")


def _unstorable(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Yield (location, why) for each value that the store cannot hold."""
    match value:
        case dict():
            for key, part in value.items():
                yield from _unstorable(part, validation.join(place, key))
        case list() | tuple():
            for number, part in enumerate(value):
                yield from _unstorable(part, f"{place}[{number}]")
        case float() if not math.isfinite(value):
            yield place, f"is {value}; it must be a finite number"
        case int() if not -(2**63) <= value < 2**63:
            yield place, f"is an integer of more than 64 bits: {shorten(str(value), most=30)}"
        case str() if "\0" in value:
            yield place, f"has a NUL character, which the database cannot store: {shorten(repr(value))}"


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
    if config.student is not None:
        yield "student.engine", config.student.engine, engines.with_role("student")
    for place, scorer in validation.scorers(config):
        yield f"{place}.kind", scorer.kind, engines.with_role("quality")
    yield "strategy.kind", config.strategy.kind, list(STRATEGIES)
    yield "run.learnability", config.run.learnability, list(LEARNABILITIES)
    yield "router.kind", config.router.chosen_kind, [inputs.AUTO, *ROUTERS]
    yield from _kinds_of_teachers(config.teachers)


def _kinds_of_teachers(teachers: Sequence[TeacherTable]) -> Iterator[tuple[str, str, Sequence[str]]]:
    names = engines.with_role("teacher")
    for number, teacher in enumerate(teachers):
        yield f"teachers[{number}].engine", teacher.engine, names


def _require_kinds(path: Path, given: Any, kinds: Iterable[tuple[str, str, Sequence[str]]]) -> None:
    """Raise `UsageError` for a name that is not one of a registry's; `kinds` has (key, name, known names)."""
    for key, name, known in kinds:
        if name not in known:
            flaw = _REGISTRIES.get(key, ENGINES).flaw(name)
            hint = f"; {flaw}" if flaw else ""
            allowed = ", ".join(map(repr, known))
            raise UsageError(f"{path}: {validation.key(given, key)} is {name!r}; allowed: {allowed}{hint}")


def _said(config: RunConfig) -> Iterator[_Said]:
    student, router = config.student, config.router
    if student is not None:
        yield _Said("the student", "student.options", student.engine, student.options)
    for place, scorer in validation.scorers(config):
        yield _Said("the quality", f"{place}.options", scorer.kind, scorer.options)
        if ENGINES[scorer.kind].is_nested:  # the judge's own options were validated above
            inner = msgspec.convert(scorer.options, options.JudgeOptions)
            yield _Said("the judge's model", f"{place}.options.options", inner.engine, inner.options)
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
            flaw = validation.explain(str(error), one.options, kind, one.table)
            raise UsageError(f"{path}: {one.whose} ({one.engine}): {flaw}") from None


def _require_adapters(path: Path, teachers: Sequence[TeacherTable]) -> None:
    """Raise `UsageError` for an adapter of an engine that takes none, and for a revision without an adapter."""
    for teacher in teachers:
        if teacher.adapter_revision and not teacher.adapter:
            raise UsageError(f"{path}: teacher {teacher.name}: adapter_revision needs adapter")
        if teacher.adapter and not ENGINES[teacher.engine].takes_adapters:
            able = ", ".join(name for name, kind in ENGINES.items() if kind.takes_adapters)
            raise UsageError(
                f"{path}: teacher {teacher.name}: the engine {teacher.engine} takes no adapter; engines that do: {able}"
            )


def _require_budget_tables(path: Path, given: Any) -> None:
    """Raise `UsageError` for a mistake in a named table of limits, whose name msgspec does not say."""
    budget = given.get("budget") if isinstance(given, dict) else None
    for key in ("teachers", "stages"):
        named = budget.get(key) if isinstance(budget, dict) else None
        for name, table in named.items() if isinstance(named, dict) else ():
            try:
                msgspec.convert(table, Limits)
            except msgspec.ValidationError as error:
                flaw = validation.explain(str(error), table, Limits, f"budget.{key}.{name}")
                raise UsageError(f"{path}: {flaw}") from None
