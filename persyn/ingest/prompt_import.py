"""Import prompts into the store and a run, and draw the run's calibration prompts from a seed."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, bindparam, literal, select, update
from sqlalchemy.orm import Session

from persyn.config import GenerationTable, PromptsTable
from persyn.db import bulk, lookup
from persyn.db.catalog import Prompt, Role, RunPrompt
from persyn.errors import UsageError, shorten
from persyn.ingest import prompt_table, rows
from persyn.ingest.imports import ImportCounts, ImportReport, OnError, batches
from persyn.ingest.layouts import NO_NAMES, Names
from persyn.ingest.rows import PromptRow
from persyn.llm.needs import Need, is_placeholder


@dataclass(frozen=True, slots=True)
class PromptFiles:
    """Files with prompts, and how to read them.

    names: {our field: the file's field}, for fields without a common name.
    """

    paths: Sequence[Path]
    names: Names = field(default_factory=dict)
    on_error: OnError = "stop"

    def rows(self) -> Iterator[PromptRow]:
        """Read the rows without storing them; raise `UsageError` for a bad row that is not skipped."""
        tally = ImportCounts(self.on_error, "options")
        for _, batch in batches(self.paths, partial(rows.read, names=self.names), tally):
            yield from batch
        tally.report()


def import_prompts(
    session: Session,
    paths: Sequence[Path],
    *,
    names: Names = NO_NAMES,
    on_error: OnError = "stop",
    progress: Callable[[int], None] | None = None,
) -> ImportReport:
    """Store the prompts of files; prompts already stored are kept and only receive missing reference answers.

    names:    {our field: the file's field}, for fields without a common name.
    progress: called from time to time with the number of rows read.
    Raises `UsageError` for a bad row that is not skipped, and for a file without a good row; the caller must then roll
    the transaction back.
    """

    def stored(hashes: Sequence[str], n_rows: int) -> None:
        if progress:
            progress(n_rows)

    return _import(session, paths, ImportCounts(on_error, "options"), stored, names)


def hashes_of(session: Session, paths: Sequence[Path], names: Names = NO_NAMES) -> set[str]:
    """Store the prompts of files like `import_prompts`; return the content hashes of all their conversations."""
    found: set[str] = set()
    _import(session, paths, ImportCounts("stop", "map"), lambda hashes, n_rows: found.update(hashes), names)
    return found


def add_to_run(
    session: Session, run_id: int, prompts: PromptsTable, *, progress: Callable[[int], None] | None = None
) -> int:
    """Add every prompt of the files, or of sources imported before, to the run as a target, once each.

    Returns the number of rows whose answer, instructions or tests differ from the stored ones, which are kept.

    Files are imported like `import_prompts` does; a bad row stops the import. Raises `UsageError` also for a source
    without prompts in the store.
    """

    def link(hashes: Sequence[str], n_rows: int) -> None:
        _add_targets(session, run_id, bulk.among(session, Prompt.content_hash, hashes))
        if progress:
            progress(n_rows)

    conflicts = 0
    if prompts.files:
        tally = ImportCounts("stop", "command")
        try:
            conflicts = _import(session, [Path(file) for file in prompts.files], tally, link).conflicts
        except UsageError as error:
            raise UsageError(f"[prompts] file: {error}") from None
    for source in prompts.sources:
        if session.scalars(select(Prompt.id).where(Prompt.source == source).limit(1)).one_or_none() is None:
            raise UsageError(f"no prompt was imported from a file named {source!r}; 'persyn prompts stats' lists them")
        _add_targets(session, run_id, Prompt.source == source)
    return conflicts


def extend_run(
    session: Session,
    run_id: int,
    extension: int,
    files: PromptFiles,
    *,
    progress: Callable[[int], None] | None = None,
) -> ImportReport:
    """Add the prompts of files that are not in the run, as targets of an extension; import them like `import_prompts`.

    Raises `UsageError` as it does; the caller must then roll the transaction back.
    """

    def link(hashes: Sequence[str], n_rows: int) -> None:
        _add_targets(session, run_id, bulk.among(session, Prompt.content_hash, hashes), extension)
        if progress:
            progress(n_rows)

    return _import(session, files.paths, ImportCounts(files.on_error, "options"), link, files.names)


def draw(
    session: Session,
    run_id: int,
    *,
    calibration: int | None,
    holdout: float,
    seed: int,
    need: Need | None = None,
) -> list[str]:
    """Draw a run's calibration prompts at random (None: all), with a share `holdout` of them as the hold-out.

    The draw depends only on the seed and on the set of conversations, not on their order or ids. Prompts that lack a
    field that the quality scorer needs are not drawn. Returns notices for the user about those, and about placeholder
    answers. Raises `UsageError` when there are too few prompts, none that can be scored, or none left to learn from.
    """
    if calibration == 0:
        return []
    n_prompts = lookup.n_prompts(session, run_id)
    if calibration is not None and n_prompts < calibration:
        raise UsageError(
            f"{calibration:,} calibration prompts cannot be drawn from {n_prompts:,} prompts; "
            "lower 'calibration' or give more prompts"
        )
    lacking = _look_over(session, run_id, need, n_prompts)
    lacking.require(calibration)
    _require_some_to_learn_from(calibration, holdout)
    if calibration is None and not holdout:
        session.execute(update(RunPrompt).where(RunPrompt.run_id == run_id).values(role=Role.CALIBRATION))
        return list(lacking.said(is_all=True))
    is_all = calibration is None
    calibration = n_prompts if calibration is None else calibration
    lots = (
        (_lot(seed, row.content_hash), row.id)
        for row in _prompts(session, run_id, need)
        if is_all or need is None or need.is_met(row.answer, row.meta)
    )
    drawn = [prompt_id for _, prompt_id in heapq.nsmallest(calibration, lots)]
    n_holdout = round(calibration * holdout)
    _set_role(session, run_id, drawn[:n_holdout], Role.HOLDOUT)
    _set_role(session, run_id, drawn[n_holdout:], Role.CALIBRATION)
    return list(lacking.said(is_all=is_all))


def drawable(
    session: Session, run_id: int, *, seed: int, need: Need | None, most: int
) -> dict[int, tuple[int, list[tuple[bytes, int]]]]:
    """{extension: (how many of its targets can be drawn, lots and ids of the next ones in the order of `draw`)}.

    most: of each extension. The prompts that a run was started with are those of extension 0.
    """
    counts, lots = Counter[int](), dict[int, list[tuple[bytes, int]]]()
    for row in _prompts(session, run_id, need, role=Role.TARGET):
        if need is None or need.is_met(row.answer, row.meta):
            counts[row.extension] += 1
            found = lots.setdefault(row.extension, [])
            found.append((_lot(seed, row.content_hash), row.id))
            if len(found) >= 2 * most:
                lots[row.extension] = heapq.nsmallest(most, found)
    return {extension: (counts[extension], heapq.nsmallest(most, found)) for extension, found in sorted(lots.items())}


def unscorable(session: Session, run_id: int, need: Need, *, extension: int = 0) -> int:
    """The number of a run's prompts, from an extension on, that lack a field that its quality scorer needs."""
    return sum(not need.is_met(row.answer, row.meta) for row in _prompts(session, run_id, need, extension))


def not_scored(count: int, need: Need, generation: GenerationTable) -> str:
    """The notice for prompts whose responses cannot be scored."""
    then = "are never called wrong"
    if generation.is_choice:
        then = "have no row in the dataset" if generation.keep == "correct" else "keep their first response"
    return f"{count:,} prompts have no {need.what}, so their responses cannot be scored, and they {then}"


def _require_some_to_learn_from(calibration: int | None, holdout: float) -> None:
    if calibration is not None and round(calibration * holdout) >= calibration:
        raise UsageError(
            f"holdout = {holdout:g} reserves all {calibration:,} calibration prompts for measuring the router and "
            "leaves none to fit it to; lower 'holdout', or raise 'calibration'"
        )


@dataclass(frozen=True, slots=True)
class _Lacking:
    """How many of a run's prompts lack a field that its quality scorer needs.

    prompts:      of the run.
    count:        prompts that lack the field.
    flaw:         the first scoring failure where the field is present but unusable; otherwise empty.
    fields:       the other fields of the first prompt that lacks it.
    placeholders: prompts whose reference answer looks like a missing value.
    """

    need: Need | None
    prompts: int
    count: int = 0
    flaw: str = ""
    fields: tuple[str, ...] = ()
    placeholders: int = 0

    def require(self, calibration: int | None) -> None:
        """Raise `UsageError` if the remaining prompts do not suffice."""
        if self.need is None or not self.count:
            return
        needs = f"quality {self.need.quality!r} {self.need.use}: give each row its {self._fields()}{self._how()}"
        if self.count == self.prompts:
            besides = f" (their rows have: {shorten(', '.join(self.fields))})" if self.fields and not self.flaw else ""
            raise UsageError(
                f"none of the {self.prompts:,} prompts has a {self.need.what}{self._example()}, and {needs}{besides}, "
                "or use another [quality]"
            )
        left = self.prompts - self.count
        if calibration is not None and left < calibration:
            raise UsageError(
                f"{self.count:,} of the {self.prompts:,} prompts have no {self.need.what}{self._example()}, so "
                f"{calibration:,} calibration prompts cannot be drawn from the remaining {left:,}; {needs}, or lower "
                "'calibration'"
            )

    def _how(self) -> str:
        """How imported responses bring a field of their prompts; only their answers are recognised."""
        others = [field for field in self.need.fields if field != "answer"] if self.need else []
        if self.flaw or not others:
            return ""
        given = "".join(f" --prompt-field {field}" for field in others)
        return f" (of imported responses, with persyn responses import{given})"

    def _fields(self) -> str:
        return " and ".join(map(repr, self.need.fields)) if self.need else ""

    def said(self, *, is_all: bool) -> Iterator[str]:
        """Yield notices for the user."""
        if self.need is not None and self.count:
            some = f"{self.count:,} of {self.prompts:,} prompts have no {self.need.what} (field {self._fields()})"
            yield some + self._example() + self._consequence(self.need, is_all=is_all)
        if self.placeholders:
            yield (
                f"{self.placeholders:,} of {self.prompts:,} reference answers look like missing ones (None, nan, N/A, "
                "...): almost every response will count as wrong there; leave the field empty where there is no answer"
            )

    def _consequence(self, need: Need, *, is_all: bool) -> str:
        if is_all:
            return f": their responses get no score from quality {need.quality!r}"
        return (
            f", which quality {need.quality!r} needs: calibration prompts are drawn from the remaining "
            f"{self.prompts - self.count:,}, and those without are answered by one teacher each"
        )

    def _example(self) -> str:
        return f" ({shorten(self.flaw)})" if self.flaw else ""


def _look_over(session: Session, run_id: int, need: Need | None, n_prompts: int) -> _Lacking:
    if need is None:
        return _Lacking(need, n_prompts)
    count = placeholders = 0
    example, fields = "", ()
    for row in _prompts(session, run_id, need):
        flaw = need.flaw(row.answer, row.meta)
        placeholders += "answer" in need.fields and is_placeholder(row.answer)
        if flaw is not None:
            fields = fields if count else tuple(row.meta)
            count += 1
            example = example or flaw
    return _Lacking(need, n_prompts, count, example, fields, placeholders)


def _prompts(
    session: Session, run_id: int, need: Need | None, extension: int = 0, *, role: Role | None = None
) -> Iterable[Any]:
    """Select what a draw depends on, one row per prompt, from an extension on, and with a role."""
    of_row = (Prompt.answer, Prompt.meta) if need is not None else ()
    columns = Prompt.content_hash, Prompt.id, RunPrompt.extension
    wanted = select(*columns, *of_row).join(RunPrompt, RunPrompt.prompt_id == Prompt.id)
    wanted = wanted.where(RunPrompt.run_id == run_id, RunPrompt.extension >= extension)
    wanted = wanted if role is None else wanted.where(RunPrompt.role == role)
    return session.execute(wanted, execution_options={"yield_per": 10_000})


def _lot(seed: int, content_hash: str) -> bytes:
    return hashlib.blake2b(content_hash.encode(), key=seed.to_bytes(8, "big"), digest_size=16).digest()


def _set_role(session: Session, run_id: int, prompt_ids: list[int], role: Role) -> None:
    table = RunPrompt.__table__
    statement = update(RunPrompt).where(table.c.run_id == run_id, table.c.prompt_id == bindparam("of_prompt"))
    if prompt_ids:
        session.connection().execute(
            statement.values(role=role), [{"of_prompt": prompt_id} for prompt_id in prompt_ids]
        )


def _import(
    session: Session,
    paths: Sequence[Path],
    tally: ImportCounts,
    stored: Callable[[Sequence[str], int], None],
    names: Names = NO_NAMES,
) -> ImportReport:
    """Store prompts batch by batch; call `stored` after each with its content hashes and the number of rows read."""
    prompt_table.lock(session)
    sources = set()
    for source, batch in batches(paths, partial(rows.read, names=names), tally):
        sources.add(source)
        done = prompt_table.store(session, source, batch)
        tally.new += done.new
        tally.conflicts += done.conflicts
        stored(done.hashes, tally.rows)
    tally.repeated_ids = prompt_table.repeated_ids(session, sources)
    return tally.report()


def _add_targets(session: Session, run_id: int, which: ColumnElement[bool], extension: int = 0) -> None:
    same = literal(Role.TARGET, RunPrompt.role.type), literal(extension, RunPrompt.extension.type)
    found = select(literal(run_id), Prompt.id, *same).where(which)
    bulk.insert_found(session, RunPrompt, ["run_id", "prompt_id", "role", "extension"], found)
