"""Parse and validate a run file; locate errors; resolve paths."""

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

from persyn.config import IMPORTED, LIMITS, Limits, QualityPart, QualityTable, RouterTable, RunConfig, TeacherTable
from persyn.errors import UsageError, shorten
from persyn.llm import engines, options, quality
from persyn.llm.engines import ENGINES
from persyn.method.learnability import LEARNABILITIES
from persyn.method.strategies import STRATEGIES
from persyn.registry import Registry
from persyn.router import inputs
from persyn.router.kinds.registry import ROUTERS
from persyn.runs import fallbacks, prices, validation
from persyn.stages.registry import STAGES

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
    _require_quality(path, config)
    _require_strategy(path, config)
    _require_router(path, config.router)
    _require_fitted(path, config)
    _require_learnability(path, config)
    _require_options(path, _said(config))
    _require_samples(path, config)
    fallbacks.require(path, config)
    _require_adapters(path, config.teachers)
    _require_budget(path, config)
    return _absolute(config, path)


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
    return [_absolute_teacher(teacher, path) for teacher in teachers]


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
    for place, scorer in _scorers(config):
        yield f"{place}.kind", scorer.kind, engines.with_role("quality")
    yield "strategy.kind", config.strategy.kind, list(STRATEGIES)
    yield "run.learnability", config.run.learnability, list(LEARNABILITIES)
    yield "router.kind", config.router.chosen_kind, [inputs.AUTO, *ROUTERS]
    yield from _kinds_of_teachers(config.teachers)


def _scorers(config: RunConfig) -> Iterator[tuple[str, QualityTable]]:
    """The tables of the scorers of quality with their keys."""
    for number, scorer in enumerate(config.scorers):
        yield f"quality[{number}]" if isinstance(scorer, QualityPart) else "quality", scorer


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


def _require_quality(path: Path, config: RunConfig) -> None:
    """Raise `UsageError` for a scorer without the model that it needs, and for a judge without its engine."""
    for place, scorer in _scorers(config):
        table, kind = validation.heading(place), ENGINES[scorer.kind]
        needed = {"function": "model, a module:function", "field": "model, the field that scores were imported from"}
        if not scorer.model and (kind.is_nested or kind.model):
            raise UsageError(f"{path}: {table} a {kind.name} needs {needed.get(kind.model, 'a model')}")
        if kind.is_nested and scorer.options.get("engine") not in (known := engines.with_role("judge")):
            raise UsageError(f"{path}: {table} a {kind.name} needs options.engine, one of {', '.join(known)}")
        if isinstance(scorer, QualityPart) and scorer.gate and not kind.may_be_verdict:
            able = ", ".join(name for name in engines.with_role("quality") if ENGINES[name].may_be_verdict)
            raise UsageError(
                f"{path}: {table} a {kind.name} cannot be a gate, because it does not say which responses are right; "
                f"scorers that do: {able}. Give it a weight"
            )


def _require_strategy(path: Path, config: RunConfig) -> None:
    """Raise `UsageError` for a strategy without the fields that it needs."""
    strategy, kind = config.strategy, STRATEGIES[config.strategy.kind]
    if bool(strategy.model) != (kind.decided_by == "function"):
        raise UsageError(f"{path}: [strategy] python needs model, a module:function; no other strategy has a model")
    _require_limits(path, config)
    for field in kind.needs:
        if without := [teacher.name for teacher in config.teachers if getattr(teacher, field) is None]:
            raise UsageError(f"{path}: strategy {kind.name} needs {field} of {', '.join(without)}")
    families = {teacher.family for teacher in config.teachers}
    family = config.student.family if config.student else None
    if kind.needs_family and (family is None or family not in families):
        raise UsageError(f"{path}: strategy {kind.name} needs a [student] family that a teacher has, got {family}")
    if kind.needs_learnability and config.student is None:
        raise UsageError(f"{path}: strategy {kind.name} needs learnability, also at alpha 0; add [student]")


def _require_limits(path: Path, config: RunConfig) -> None:
    """Raise `UsageError` for limits of another strategy than the router's, and for those of unknown teachers."""
    strategy, names = config.strategy, [teacher.name for teacher in config.teachers]
    given = [key for key in LIMITS if getattr(strategy, key) is not None]
    if given and STRATEGIES[strategy.kind].decided_by != "router":
        raise UsageError(
            f"{path}: `strategy.{given[0]}` is only for strategy persyn, whose expected rewards are known; got "
            f"{strategy.kind}"
        )
    for key in given:
        table = getattr(strategy, key)
        if isinstance(table, dict) and (unknown := sorted(table.keys() - set(names))):
            raise UsageError(
                f"{path}: `strategy.{key}` names {', '.join(unknown)}; the teachers are {', '.join(names)}"
            )


def _require_router(path: Path, router: RouterTable) -> None:
    """Raise `UsageError` for a router that cannot read what it is given."""
    kind, encoders, fields = router.chosen_kind, router.encoders, router.features
    lists: dict[str, list[str]] = {"encoders": [*encoders], "features": fields}
    for key, names in lists.items():
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UsageError(f"{path}: `router.{key}` names {', '.join(map(repr, twice))} more than once")
    if ("embedding" in encoders) != (router.embedding is not None):
        raise UsageError(
            f'{path}: [router] an embedding needs both keys: encoders = ["embedding"], and embedding = a model folder '
            "or hub id"
        )
    if router.tune in ("full", "lora") and (kind, encoders, fields) != ("head", ["backbone"], []):
        raise UsageError(
            f"{path}: `router.tune` is {router.tune!r}, which trains a head that reads the backbone alone; use "
            'kind = "head", encoders = ["backbone"] and no features, or tune = "auto"'
        )
    if not inputs.can_read(kind, encoders, fields):
        known = ", ".join(inputs.readable(kind))
        raise UsageError(
            f"{path}: a router of kind {kind!r} reads nothing of its encoders and features; it can read {known}"
        )


def _require_fitted(path: Path, config: RunConfig) -> None:
    """Raise `UsageError` for a router that was fitted before, beside keys that need a calibration or another router."""
    router, strategy = config.router, config.strategy
    if router.fitted is None:
        return
    alone = RouterTable(fitted=router.fitted, gpus=router.gpus, options=router.options)
    if others := [name for name in router.__struct_fields__ if getattr(router, name) != getattr(alone, name)]:
        raise UsageError(f"{path}: `router.{others[0]}` cannot be set beside `router.fitted`, which says all about it")
    if STRATEGIES[strategy.kind].decided_by != "router" or strategy.is_limited:
        raise UsageError(
            f"{path}: `router.fitted` is for strategy persyn without costs and limits, which need calibration prompts"
        )


def _require_samples(path: Path, config: RunConfig) -> None:
    """Raise `UsageError` for several samples of a greedy teacher, and for a choice that the quality cannot make."""
    greedy = [each.name for each in config.teachers if each.engine != IMPORTED and each.is_greedy]
    for table, samples in (("run", config.run.samples), ("generation", config.generation.samples)):
        if samples > 1 and greedy:
            raise UsageError(
                f"{path}: `{table}.samples` is {samples}, but all samples of {', '.join(greedy)} would be the same, as "
                "its sampling temperature is 0; raise the temperature, or set samples = 1"
            )
    keep = config.generation.keep
    if keep == "correct" and not quality.may_be_verdict(config):
        raise UsageError(
            f"{path}: `generation.keep` is 'correct', but quality {quality.name(config)} does not say what is correct; "
            "use keep = 'best', with good_enough if a threshold is known"
        )
    if config.generation.is_choice and any(scorer.kind == IMPORTED for scorer in config.scorers):
        raise UsageError(
            f"{path}: `generation.keep` is {keep!r}, but an imported quality has no score of new responses; use "
            "another quality, or samples = 1"
        )


def _require_learnability(path: Path, config: RunConfig) -> None:
    """Raise `UsageError` for a learnability that the student's engine, the strategy or `learnability_per` rules out."""
    kind = LEARNABILITIES[config.run.learnability]
    engine = ENGINES[config.student.engine] if config.student else None
    if engine and kind.needs and not engine.computes_statistics:
        raise UsageError(
            f"{path}: `run.learnability` {kind.name} needs statistics of tokens, which the student's engine "
            f"{engine.name} does not compute"
        )
    if kind.name != "log_likelihood" and config.run.learnability_per != "token":
        raise UsageError(f"{path}: `run.learnability_per` is only for learnability log_likelihood, got {kind.name}")
    if config.strategy.kind == "car" and not kind.is_log_likelihood:
        raise UsageError(f"{path}: strategy car needs the student's loss, which learnability {kind.name} is not")


def _said(config: RunConfig) -> Iterator[_Said]:
    student, router = config.student, config.router
    if student is not None:
        yield _Said("the student", "student.options", student.engine, student.options)
    for place, scorer in _scorers(config):
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


def _require_budget(path: Path, config: RunConfig) -> None:
    """Raise `UsageError` for limits of unknown teachers or stages, and for dollars of a model without a price."""
    budget = config.budget
    if budget is None:
        return
    known = {"teachers": [teacher.name for teacher in config.teachers], "stages": list(STAGES)}
    named = {"teachers": budget.teachers, "stages": budget.stages}
    for key, tables in named.items():
        if unknown := sorted(set(tables) - set(known[key])):
            raise UsageError(f"{path}: [budget.{key}.{unknown[0]}]: the run's {key} are {', '.join(known[key])}")
    has_usd = any(limits.usd is not None for limits in (budget, *budget.teachers.values(), *budget.stages.values()))
    if has_usd and (lacking := prices.unpriced(config)):
        raise UsageError(
            f"{path}: [budget] usd needs price_in and price_out of {', '.join(lacking)}, in US dollars per million "
            "tokens; 0 for a server that costs nothing"
        )


def _absolute(config: RunConfig, file: Path) -> RunConfig:
    """Make the paths of existing files absolute."""
    prompts = [str(_resolved(each, file, "`prompts.file`")) for each in config.prompts.files]
    scorers = [_absolute_scorer(place, scorer, file) for place, scorer in _scorers(config)]
    replace = msgspec.structs.replace
    return replace(
        config,
        prompts=replace(config.prompts, file=prompts),
        student=config.student and replace(config.student, model=_local(config.student.model, file, "`student.model`")),
        quality=scorers if isinstance(config.quality, list) else scorers[0],
        router=_absolute_router(config.router, file),
        teachers=[_absolute_teacher(teacher, file) for teacher in config.teachers],
    )


def _absolute_scorer(place: str, scorer: QualityTable, file: Path) -> QualityTable:
    if not engines.loads_weights(scorer.kind, scorer.options):
        return scorer
    key = validation.key({}, f"{place}.model")
    return msgspec.structs.replace(scorer, model=_local(scorer.model, file, key))


def _absolute_router(router: RouterTable, file: Path) -> RouterTable:
    embedding = router.embedding and _local(router.embedding, file, "`router.embedding`")
    backbone = _local(router.backbone, file, "`router.backbone`")
    return msgspec.structs.replace(router, backbone=backbone, embedding=embedding)


def _absolute_teacher(teacher: TeacherTable, file: Path) -> TeacherTable:
    if ENGINES[teacher.engine].model in ("server", "field"):  # the model is not a local path
        return teacher
    model = _local(teacher.model, file, f"teacher {teacher.name}: `teachers.model`")
    adapter = teacher.adapter and _local(teacher.adapter, file, f"teacher {teacher.name}: `teachers.adapter`")
    return msgspec.structs.replace(teacher, model=model, adapter=adapter)


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
        raise UsageError(f"{file}: {key} is {shorten(repr(name))}, which cannot be looked up: {why}") from error
    return path
