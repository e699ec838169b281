"""Prompts into the store and into a run, and the seeded choice of its calibration prompts."""

from __future__ import annotations

import hashlib
import heapq
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

from sqlalchemy import bindparam, exists, func, insert, literal, select, text, update
from sqlalchemy.orm import Session

from persyn.db import bulk
from persyn.db.catalog import Prompt, Role, RunPrompt
from persyn.errors import UsageError
from persyn.stages import rows
from persyn.stages.rows import BadRow, Row

_BATCH = 1_000
_BAD_SHOWN = 20

OnError: TypeAlias = Literal["stop", "skip"]
"""What a bad row does: stop the import before it leaves anything, or be skipped and counted."""


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What came of an import. Always: rows = new + duplicates + bad."""

    rows: int
    new: int
    #: Rows whose conversation was in the store, or earlier in the files.
    duplicates: int
    #: Those of them with another reference answer than the stored one, which stays.
    conflicts: int
    bad: int
    first_bad: tuple[BadRow, ...]


@dataclass(slots=True)
class _Tally:
    on_error: OnError
    rows: int = 0
    new: int = 0
    conflicts: int = 0
    bad: int = 0
    first_bad: list[BadRow] = field(default_factory=list)

    def take(self, chunk: list[Row | BadRow]) -> list[Row]:
        """Count a chunk's rows and return the good ones."""
        bad = [row for row in chunk if isinstance(row, BadRow)]
        self.rows += len(chunk)
        self.bad += len(bad)
        self.first_bad.extend(bad[: _BAD_SHOWN - len(self.first_bad)])
        if self.on_error == "stop" and self.bad >= _BAD_SHOWN:
            raise self.refusal(f"at least {self.bad:,} of the first {self.rows:,} rows")
        return [row for row in chunk if isinstance(row, Row)]

    def refusal(self, which: str) -> UsageError:
        """The error that lists the first bad rows."""
        lines = "".join(f"\n  {bad}" for bad in self.first_bad)
        return UsageError(f"{which} cannot be imported, so nothing was; mend or skip them:{lines}")

    def report(self) -> ImportReport:
        """The counts as they stand."""
        duplicates = self.rows - self.bad - self.new
        return ImportReport(self.rows, self.new, duplicates, self.conflicts, self.bad, tuple(self.first_bad))


def import_prompts(
    session: Session,
    paths: Sequence[Path],
    *,
    on_error: OnError = "stop",
    progress: Callable[[int], None] | None = None,
) -> ImportReport:
    """Store the prompts of files; those already stored stay, and get the reference answer they lack.

    progress: called now and then with the number of rows read.
    Raises `UsageError` for a bad row that is not to be skipped, and for a file without a single
    good one; the caller's transaction must then leave nothing.
    """
    return _import(session, paths, _Tally(on_error), lambda hashes, n_rows: progress(n_rows) if progress else None)


def add_to_run(
    session: Session,
    run_id: int,
    paths: Sequence[Path],
    *,
    on_error: OnError = "stop",
    progress: Callable[[int], None] | None = None,
) -> ImportReport:
    """Import as `import_prompts` does, and make every prompt of the files a target of the run, once."""

    def link(hashes: Sequence[str], n_rows: int) -> None:
        _add_targets(session, run_id, hashes)
        if progress:
            progress(n_rows)

    return _import(session, paths, _Tally(on_error), link)


def draw(session: Session, run_id: int, *, calibration: int, holdout: int, seed: int) -> None:
    """Choose a run's calibration prompts at random, `holdout` of them to measure the router.

    The choice depends on the seed and on which conversations the run has, not on their order or
    ids. Raises `UsageError` unless at least one prompt is left to be routed.
    """
    n_prompts = session.scalars(select(func.count()).where(RunPrompt.run_id == run_id)).one()
    if n_prompts <= calibration:
        raise UsageError(
            f"{calibration:,} calibration prompts cannot be drawn from {n_prompts:,} prompts with one left to route; "
            "lower 'calibration' or give more prompts"
        )
    prompts = session.execute(
        select(Prompt.content_hash, Prompt.id).join(RunPrompt).where(RunPrompt.run_id == run_id),
        execution_options={"yield_per": 10_000},
    )
    lots = ((_lot(seed, content_hash), prompt_id) for content_hash, prompt_id in prompts)
    drawn = [prompt_id for _, prompt_id in heapq.nsmallest(calibration, lots)]
    _set_role(session, run_id, drawn[:holdout], Role.HOLDOUT)
    _set_role(session, run_id, drawn[holdout:], Role.CALIBRATION)


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
    session: Session, paths: Sequence[Path], tally: _Tally, stored: Callable[[Sequence[str], int], None]
) -> ImportReport:
    """Store batch by batch; after each, `stored` gets its content hashes and the rows read so far."""
    if session.get_bind().dialect.name == "postgresql":
        # One import at a time: two that meet the same prompts in another order would deadlock.
        session.execute(text("LOCK TABLE prompts IN SHARE ROW EXCLUSIVE MODE"))
    for source, batch in _batches(paths, tally):
        stored(_store(session, source, batch, tally), tally.rows)
    if tally.bad and tally.on_error == "stop":
        raise tally.refusal(f"{tally.bad:,} of {tally.rows:,} rows")
    return tally.report()


def _batches(paths: Sequence[Path], tally: _Tally) -> Iterator[tuple[str, list[Row]]]:
    readers = [(path, rows.read(path)) for path in paths]  # every name is checked before a row is stored
    for path, reader in readers:
        before, n_good = tally.rows, 0
        source = os.fsencode(path.name).decode(errors="replace")
        while chunk := list(islice(reader, _BATCH)):
            good = tally.take(chunk)
            n_good += len(good)
            if good and not (tally.bad and tally.on_error == "stop"):
                yield source, good
        if tally.rows == before:
            raise UsageError(f"{path} has no rows")
        if not n_good:
            raise tally.refusal(f"all {tally.rows - before:,} rows of {path}")


def _store(session: Session, source: str, batch: list[Row], tally: _Tally) -> Sequence[str]:
    """Insert what is new, add answers that are missing; return the batch's content hashes."""
    by_hash = [(row.content_hash, row) for row in batch]
    answers = _known_answers(session, [content_hash for content_hash, _ in by_hash])
    new: list[dict[str, Any]] = []
    late: dict[str, str] = {}
    for content_hash, row in by_hash:
        if content_hash not in answers:
            answers[content_hash] = row.answer
            new.append(_columns(row, content_hash, source))
        elif row.answer is not None and (known := answers[content_hash]) != row.answer:
            if known is None:
                answers[content_hash] = late[content_hash] = row.answer
            else:
                tally.conflicts += 1
    bulk.insert_new(session, Prompt, new)
    _add_answers(session, late)
    tally.new += len(new)
    return list(answers)


def _known_answers(session: Session, hashes: list[str]) -> dict[str, str | None]:
    known = session.execute(select(Prompt.content_hash, Prompt.answer).where(Prompt.content_hash.in_(hashes)))
    return {content_hash: answer for content_hash, answer in known}


def _columns(row: Row, content_hash: str, source: str) -> dict[str, Any]:
    return {
        "content_hash": content_hash,
        "text": row.text,
        "history": row.history,
        "answer": row.answer,
        "source": source,
        "source_id": row.source_id,
        "meta": row.meta,
    }


def _add_answers(session: Session, answers: dict[str, str]) -> None:
    if answers:
        statement = update(Prompt.__table__).where(Prompt.content_hash == bindparam("of_hash"))  # type: ignore[arg-type]
        session.connection().execute(
            statement.values(answer=bindparam("answer")),
            [{"of_hash": content_hash, "answer": answer} for content_hash, answer in answers.items()],
        )


def _add_targets(session: Session, run_id: int, hashes: Sequence[str]) -> None:
    there = exists().where(RunPrompt.run_id == run_id, RunPrompt.prompt_id == Prompt.id)
    missing = select(literal(run_id), Prompt.id, literal(Role.TARGET, RunPrompt.role.type)).where(
        Prompt.content_hash.in_(hashes), ~there
    )
    session.execute(insert(RunPrompt).from_select(["run_id", "prompt_id", "role"], missing))
