"""Compare a run file with an existing run by what determines its dataset, wherever its files are now."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace
from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from persyn.config import QualityTable, RunConfig, load_config
from persyn.db import lookup
from persyn.db.catalog import Prompt, Run, RunPrompt, Student, Teacher
from persyn.errors import UsageError, shorten
from persyn.ingest import prompt_table, rows, versions
from persyn.ingest.imports import ImportCounts, batches
from persyn.llm import transport
from persyn.llm.identity import identify, identify_embedding
from persyn.method.strategies import STRATEGIES

#: Keys that only describe a teacher; they matter only where the run's strategy reads them.
_DESCRIPTIVE = ("license", "family", "params_b", "price_in", "price_out")
#: Differences named in an error.
_MOST = 5
#: Characters shown of a value, and of the common beginning of two long values.
_VALUE_SHOWN, _ALIKE_SHOWN = 60, 20
#: Conversations looked up per query.
_CHUNK = 500


class Difference(NamedTuple):
    """A key of the run file, with its value at the start of the run and now."""

    key: str
    was: Any
    now: Any

    def __str__(self) -> str:
        was, now = ("not set" if value is None else repr(value) for value in (self.was, self.now))
        same = next((n for n, pair in enumerate(zip(was, now, strict=False)) if pair[0] != pair[1]), 0)
        # The common beginning of long values carries no information.
        skipped = max(0, same - _ALIKE_SHOWN) if max(len(was), len(now)) > _VALUE_SHOWN else 0
        return f"{self.key} was {_shown(was, skipped)} and is {_shown(now, skipped)}"


def _shown(value: str, skipped: int) -> str:
    return ("…" if skipped else "") + shorten(value[skipped:], most=_VALUE_SHOWN)


class Change(NamedTuple):
    """How the prompts in a run's files or sources differ from those that the run was started with.

    new:  prompts that are not in the run; those of an extension are.
    gone: prompts that the run was started with and the files lack.
    other:     rows whose answer, instructions or tests differ from those stored for their prompt.
    """

    names: str
    run: str
    prompts: int
    new: int = 0
    gone: int = 0
    other: int = 0

    @property
    def is_of_prompts(self) -> bool:
        """Whether the prompts themselves changed, and not only their answers."""
        return bool(self.new or self.gone)

    def __str__(self) -> str:
        parts = ["1 prompt is new" if self.new == 1 else f"{self.new:,} prompts are new"] * bool(self.new)
        parts += [f"{self.gone:,} of the run's prompts are missing"] * bool(self.gone)
        said = (
            f"{self.names} changed since run {self.run!r} was started: {' and '.join(parts)}; the run keeps "
            f"its {self.prompts:,} prompts"
        )
        others = other_answers(self.names, self.other) if self.other else ""
        return "; ".join(each for each in (said if self.is_of_prompts else "", others) if each)


def other_answers(names: str, count: int) -> str:
    """The notice for rows whose answers, instructions or tests differ from those stored for the same prompts."""
    rows_have = "1 row has" if count == 1 else f"{count:,} rows have"
    return (
        f"{names}: {rows_have} a reference answer, instructions or tests that differ from those stored for the same "
        "prompt; the stored ones are kept, and responses are scored with them: only a new store (PERSYN_HOME or "
        "PERSYN_DATABASE_URL) uses the new ones"
    )


def require(session: Session, run: Run, config: RunConfig) -> None:
    """Raise `UsageError` when a run file differs from a run in what determines its dataset, prompts included.

    config: with the versions that the run was started with, where the file names none.
    """
    was = load_config(run.config)
    moved = {place for place, _ in _moved(session, run, was, config)}
    changed = [found for found in differences(_decisive(was), _decisive(config)) if found.key not in moved]
    if changed:
        more = f", and {len(changed) - _MOST} more" if len(changed) > _MOST else ""
        said = "; ".join(map(str, changed[:_MOST]))
        keys = ", ".join(found.key for found in changed[:_MOST])
        raise UsageError(
            f"run {run.name!r} exists with another configuration (changed: {keys}): {said}{more}. Choose another "
            f"name, or resume the existing run (persyn run resume {run.name})"
        )
    change = look(session, run, config)
    if change is not None and change.is_of_prompts:
        raise UsageError(
            f"{change}. Resume the run to continue with those (persyn run resume {run.name}), add new ones to it "
            f"(persyn run extend {run.name} FILE), or start a run under another name, which uses all prompts and "
            "generates no stored response again"
        )


def look(session: Session, run: Run, config: RunConfig | None = None) -> Change | None:
    """Find changes of a run's prompts at their origin; None when there are none, or the files do not exist.

    config: names the files; None means the run's own configuration.
    """
    was = load_config(run.config)
    prompts = (config or was).prompts
    paths = [Path(file) for file in prompts.files]
    n_prompts = lookup.n_prompts(session, run.id)
    if prompts.sources:
        there = select(func.count()).select_from(Prompt).where(Prompt.source.in_(prompts.sources))
        of_run = there.join(RunPrompt).where(RunPrompt.run_id == run.id)
        new = session.scalars(there).one() - session.scalars(of_run).one()
        names = ", ".join(prompts.sources)
        return Change(names, run.name, n_prompts, new) if new > 0 else None
    if not all(path.is_file() for path in paths) or is_unchanged(was, paths):
        return None
    change = Change(", ".join(path.name for path in paths), run.name, n_prompts, *_compare(session, run, paths))
    return change if change.is_of_prompts or change.other else None


def is_unchanged(was: RunConfig, paths: Sequence[Path]) -> bool:
    """Whether files are byte for byte those that a run was started with."""
    return sorted(was.prompts.sha256) == sorted(map(sha256, paths))


def sha256(path: Path) -> str:
    """The hash of a file's content; raise `UsageError` when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"[prompts] file: cannot read {path}: {error.strerror}") from None


def adopt(session: Session, run: Run, config: RunConfig, *, with_content: bool = True) -> None:
    """Adopt the changes of a run file that do not affect the dataset: paths, teacher descriptions, outage limit,
    and what happens when a teacher is worse than predicted.

    Transport is adopted by `persyn.runs.transport`.

    with_content: whether to store the new hashes of the prompt files; otherwise a difference is reported every time.
    """
    was = load_config(run.config)
    taken = was.frozen()
    for place, row in _moved(session, run, was, config):
        if Path(_at(taken, place)).exists():
            continue  # workers still find the old path
        _put(taken, place, _at(config.frozen(), place))
        if row is not None:
            row.model = _at(taken, place)
    _describe(taken["teachers"], lookup.teachers(session, run.id), config)
    if config.student is not None:
        taken["student"]["family"] = config.student.family
    taken["run"]["outage_seconds"] = config.run.outage_seconds
    if config.generation.when_worse is not None:
        taken["generation"]["when_worse"] = config.generation.when_worse
    if config.prompts.files and all(Path(file).is_file() for file in config.prompts.files):
        contents = [sha256(Path(file)) for file in config.prompts.files] if with_content else was.prompts.sha256
        taken["prompts"] = replace(config.prompts, sha256=contents)
    taken_over = msgspec.convert(msgspec.to_builtins(taken), RunConfig)
    if taken_over != was:
        run.config, run.config_hash = taken_over.frozen(), taken_over.digest()
    session.flush()


def _describe(tables: Sequence[dict[str, Any]], rows: Sequence[Teacher], config: RunConfig) -> None:
    """Copy the descriptions of teachers from a file to their tables and, where given, to their rows."""
    for table, row, teacher in zip(tables, rows, config.teachers, strict=True):
        now = {key: getattr(teacher, key) for key in _DESCRIPTIVE}
        table |= now
        for key, value in (now | versions.prices(teacher)).items():
            if value is not None:
                setattr(row, key, value)


def _compare(session: Session, run: Run, paths: Sequence[Path]) -> tuple[int, int, int]:
    """Count conversations of files that are not in the run, of its start that are not in them, and conflicting rows.

    Conflicting rows have another answer, other instructions or other tests than those stored for their prompt.

    Raises `UsageError` for a file that cannot be read or has an invalid row.
    """
    tally, other = ImportCounts("stop"), 0
    found: set[str] = set()
    for _, batch in batches(paths, rows.read, tally):
        found.update(row.content_hash for row in batch)
        other += prompt_table.n_conflicts(session, batch)
    tally.report()
    hashes = list(found)
    from_start = func.coalesce(func.sum(case((RunPrompt.extension == 0, 1), else_=0)), 0)
    counted = select(func.count(), from_start).select_from(RunPrompt).where(RunPrompt.run_id == run.id)
    same = same_from_start = 0
    for start in range(0, len(hashes), _CHUNK):
        of_part = counted.join(Prompt).where(Prompt.content_hash.in_(hashes[start : start + _CHUNK]))
        of_run, of_start = session.execute(of_part).one()
        same, same_from_start = same + of_run, same_from_start + of_start
    _, n_started = session.execute(counted).one()
    return len(hashes) - same, n_started - same_from_start, other


def _decisive(config: RunConfig) -> dict[str, Any]:
    """The configuration that determines a run's dataset, without the prompts of its files."""
    frozen = config.frozen()
    kept = STRATEGIES.require(config.strategy.kind, "strategy").reads
    for teacher in frozen["teachers"]:
        for key in set(_DESCRIPTIVE) - set(kept):
            del teacher[key]
    if "family" not in kept and config.student is not None:
        del frozen["student"]["family"]
    for place, (engine, found) in models(config).items():
        part = table(frozen, place)
        part |= {"options": transport.decisive(engine, found.options, found.gpus)} if engine else {}
        del part["gpus"]
    del frozen["run"]["outage_seconds"]
    frozen["generation"].pop("when_worse", None)
    frozen.pop("budget", None)
    frozen["prompts"] = {"source": config.prompts.sources}
    return frozen


def models(config: RunConfig) -> dict[str, tuple[str, Any]]:
    """The tables of a run file that have options, by key, as (engine, table); the engine of a strategy is empty."""
    router = "router_fit" if config.router.engine == "router" else config.router.engine
    found: dict[str, tuple[str, Any]] = {
        "router": (router, config.router),
        "strategy": ("", config.strategy),
    }
    found |= {place: (scorer.kind, scorer) for place, scorer in zip(scorer_places(config), config.scorers, strict=True)}
    found |= {"student": (config.student.engine, config.student)} if config.student else {}
    return found | {f"teachers[{n}]": (teacher.engine, teacher) for n, teacher in enumerate(config.teachers)}


def scorer_places(config: RunConfig) -> list[str]:
    """The keys of the tables of a run's quality scorers."""
    is_one = isinstance(config.quality, QualityTable)
    return ["quality"] if is_one else [f"quality[{n}]" for n in range(len(config.scorers))]


def _moved(session: Session, run: Run, was: RunConfig, config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Find local model folders that moved but have the same content; yields (key, row)."""
    places: dict[str, Any] = {f"teachers[{n}].model": row for n, row in enumerate(lookup.teachers(session, run.id))}
    if run.student_id is not None:
        places["student.model"] = session.get_one(Student, run.student_id)
    scorers = zip(scorer_places(was), lookup.quality_scorers(session, run), strict=True)
    places |= {f"{place}.model": scorer for place, scorer in scorers}
    old, new = was.frozen(), config.frozen()
    for place, row in places.items():
        before, after = _at(old, place), _at(new, place)
        if before != after and _is_folder(after) and identify(after).revision == row.revision:
            yield place, row
    now, then = config.router, was.router
    for key, look, version in (
        ("backbone", identify, then.version),
        ("embedding", identify_embedding, then.embedding_version),
    ):
        before, after = getattr(then, key), getattr(now, key)
        if before != after and _is_folder(after) and look(after).revision == version:
            yield f"router.{key}", None


def _is_folder(model: Any) -> bool:
    return bool(model) and Path(model).is_absolute() and Path(model).is_dir()


def _at(frozen: Mapping[str, Any], place: str) -> Any:
    found = table(frozen, place.rpartition(".")[0])
    return found.get(place.rpartition(".")[2]) if isinstance(found, dict) else None


def _put(frozen: Mapping[str, Any], place: str, value: Any) -> None:
    table(frozen, place.rpartition(".")[0])[place.rpartition(".")[2]] = value


def table(frozen: Mapping[str, Any], place: str) -> Any:
    """A table of a configuration, such as `student` or `teachers[0]`; empty where there is none."""
    name, _, number = place.partition("[")
    found = frozen[name]
    if not number:
        return found
    index = int(number.rstrip("]"))
    return found[index] if isinstance(found, list) and index < len(found) else {}


def differences(was: Any, now: Any, place: str = "") -> list[Difference]:
    """The keys, from a location on, that have other values in another configuration."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = sorted(was.keys() | now.keys())
        within = [(f"{place}.{key}" if place else key, was.get(key), now.get(key)) for key in keys]
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now) and place:
        within = [(f"{place}[{number}]", *pair) for number, pair in enumerate(zip(was, now, strict=True))]
    else:
        return [] if was == now else [Difference(place, *_brief(was, now))]
    return [found for name, old, new in within for found in differences(old, new, name)]


def _brief(was: Any, now: Any) -> tuple[Any, Any]:
    """Reduce lists of teachers to their names."""
    return tuple(  # type: ignore[return-value]
        [part["name"] for part in value] if isinstance(value, list) and value and "name" in value[0] else value
        for value in (was, now)
    )
