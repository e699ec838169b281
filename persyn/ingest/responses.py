"""Import responses generated elsewhere into the store, as a complete or partial grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from sqlalchemy import bindparam, delete, or_, select, tuple_, update
from sqlalchemy.orm import Session

from persyn.config import QualityTable, TeacherTable
from persyn.db import bulk, combined
from persyn.db.catalog import Prompt
from persyn.db.results import NO_TEXT, Origin, Response, Score
from persyn.db.text import reason
from persyn.errors import UsageError
from persyn.ingest import prompt_table, response_rows, versions
from persyn.ingest.imports import ImportCounts, ImportReport, OnError, batches
from persyn.ingest.response_rows import SCORES_ONLY, Layout, ResponseRow

Cell: TypeAlias = tuple[int, int]
"""(prompt id, teacher id)."""


def import_responses(
    session: Session,
    paths: Sequence[Path],
    *,
    layout: Layout = Layout(),  # noqa: B008  frozen
    teachers: Mapping[str, int] | None = None,
    on_error: OnError = "stop",
    progress: Callable[[int], None] | None = None,
) -> ImportReport:
    """Store the cells of files, with prompts and teachers that are not stored yet.

    A stored cell is kept, unless it had failed and the file has a text for it. A row without a text is stored as a
    failure, `empty`; in a file of scores only as `no_text`, with its scores. A text that comes later for such a cell
    replaces both, since the scores may be of another response.

    teachers: {name: id} of the permitted teachers; None accepts every name, as a teacher of engine "imported".
    progress: called from time to time with the number of rows read.
    Raises `UsageError` for a bad row that is not skipped, for a file without a good row, and for a score that no row
    has; the caller must then roll the transaction back.
    """
    prompt_table.lock(session)
    ids = dict(teachers or {})
    scorers = {field: versions.quality(session, QualityTable("imported", field), {}) for field in layout.score}
    tally, scored, sources = ImportCounts(on_error, "options"), set[str](), set[str]()
    for source, batch in batches(paths, partial(response_rows.read, layout=layout), tally):
        sources.add(source)
        strangers = sorted({row.teacher for row in batch} - ids.keys())
        if strangers and teachers is not None:
            raise _unknown(strangers[0], teachers)
        ids |= {name: versions.teacher(session, _stranger(name), {}) for name in strangers}
        tally.conflicts += prompt_table.store(session, source, [row.prompt for row in batch]).conflicts
        cells = _cells(session, batch, ids, tally)
        _store(session, cells, tally)
        _store_scores(session, cells, scorers, tally)
        tally.missing_scores += sum(len(scorers) - len(row.scores) for row in batch)
        scored.update(*(row.scores for row in batch))
        if progress:
            progress(tally.rows)
    tally.repeated_ids = prompt_table.repeated_ids(session, sources)
    report = tally.report()
    if lacking := sorted(scorers.keys() - scored):
        raise UsageError(f"no row has a score in a field {', '.join(lacking)}; nothing was imported")
    return report


def _unknown(name: str, teachers: Mapping[str, int]) -> UsageError:
    known = ", ".join(sorted(teachers))
    return UsageError(f"a row has teacher {name!r}, but the teachers' file has {known}; nothing was imported")


def _stranger(name: str) -> TeacherTable:
    return TeacherTable(name=name, model=name, engine="imported", gpus=0)


def _cells(
    session: Session, batch: Sequence[ResponseRow], teachers: dict[str, int], tally: ImportCounts
) -> dict[Cell, ResponseRow]:
    """Group the batch by cell: the first row with text wins; scores of identical rows are merged."""
    hashes = [row.prompt.content_hash for row in batch]
    found = session.execute(
        select(Prompt.content_hash, Prompt.id).where(bulk.among(session, Prompt.content_hash, hashes))
    )
    prompts = {content_hash: prompt_id for content_hash, prompt_id in found}
    cells: dict[Cell, ResponseRow] = {}
    for content_hash, row in zip(hashes, batch, strict=True):
        cell = prompts[content_hash], teachers[row.teacher]
        kept = cells.get(cell)
        if kept is None or (kept.text is None and row.text is not None):
            cells[cell] = row
            tally.other_scores += len(kept.scores) if kept else 0
        elif _content(row) == _content(kept):
            cells[cell] = replace(kept, scores=row.scores | kept.scores)
            tally.other_scores += sum(kept.scores.get(name, value) != value for name, value in row.scores.items())
        else:
            tally.conflicts += row.text is not None
            tally.other_scores += len(row.scores)
    return cells


def _store(session: Session, cells: dict[Cell, ResponseRow], tally: ImportCounts) -> None:
    there = _there(session, cells)
    _forget_scores(session, [cell for cell in there if there[cell] is None and cells[cell].text is not None])
    bulk.insert_new(session, Response, [_columns(cell, row) for cell, row in cells.items() if cell not in there])
    late = [cell for cell in there if there[cell] is None and cells[cell].text is not None]
    if late:
        replaced = update(Response.__table__).where(  # type: ignore[arg-type]
            Response.prompt_id == bindparam("of_prompt"),
            Response.teacher_id == bindparam("of_teacher"),
            Response.sample == 0,
        )
        columns = [_said(cells[cell]) | _NOT_MADE_HERE for cell in late]
        session.connection().execute(
            replaced.values({name: bindparam(name) for name in columns[0]}),
            [
                {**row, "of_prompt": prompt_id, "of_teacher": teacher_id}
                for row, (prompt_id, teacher_id) in zip(columns, late, strict=True)
            ],
        )
    _mark_scored(session, [cell for cell in there if there[cell] is None and cells[cell].failure == SCORES_ONLY])
    tally.new += len(cells) - len(there)
    tally.replaced += len(late)
    tally.conflicts += sum(
        there[cell] != _content(cells[cell])
        for cell in there
        if there[cell] is not None and cells[cell].text is not None
    )


#: Columns of the failed attempt that do not apply to the text that replaces it.
_NOT_MADE_HERE = {"seed": None, "engine": None, "seconds": None, "job_id": None}


def _content(row: ResponseRow) -> tuple[str | None, Any]:
    """What a teacher wrote: its text and its calls."""
    return row.text, row.tool_calls


def _there(session: Session, cells: dict[Cell, ResponseRow]) -> dict[Cell, tuple[str, Any] | None]:
    """{cell: its stored text and calls, or None if it failed}."""
    found = session.execute(
        select(Response.prompt_id, Response.teacher_id, Response.text, Response.tool_calls).where(
            tuple_(Response.prompt_id, Response.teacher_id).in_(list(cells)), Response.sample == 0
        )
    )
    return {
        (prompt_id, teacher_id): None if text is None else (text, calls) for prompt_id, teacher_id, text, calls in found
    }


def _mark_scored(session: Session, cells: Sequence[Cell]) -> None:
    """Say of responses that a run noted as not imported that their scores are there now."""
    absent = (
        tuple_(Response.prompt_id, Response.teacher_id).in_(cells),
        Response.sample == 0,
        reason(Response.failure) == "not_imported",
    )
    if cells:
        session.execute(update(Response).where(*absent).values(failure=SCORES_ONLY))


def _forget_scores(session: Session, cells: Sequence[Cell]) -> None:
    """Delete the scores of responses without a text that are about to get one."""
    of_cells = select(Response.id).where(
        tuple_(Response.prompt_id, Response.teacher_id).in_(cells), Response.sample == 0, Response.text.is_(None)
    )
    if cells:
        session.execute(delete(Score).where(Score.response_id.in_(of_cells)))


def _store_scores(
    session: Session, cells: dict[Cell, ResponseRow], scorers: dict[str, int], tally: ImportCounts
) -> None:
    """Store scores that are missing or failed."""
    if not scorers:
        return
    responses = session.execute(
        select(Response.id, Response.prompt_id, Response.teacher_id, Response.text, Response.tool_calls).where(
            tuple_(Response.prompt_id, Response.teacher_id).in_(list(cells)),
            Response.sample == 0,
            or_(Response.text.is_not(None), reason(Response.failure) == NO_TEXT),
        )
    )
    rows: list[dict[str, Any]] = [
        {
            "response_id": response_id,
            "scorer_id": scorers[field],
            "value": value,
            "n_tokens": None,
            "failure": None,
            "detail": {},
            "job_id": None,
        }
        for response_id, prompt_id, teacher_id, *content in responses
        if (*content,) == _content(cells[prompt_id, teacher_id])  # the score must belong to this response
        for field, value in cells[prompt_id, teacher_id].scores.items()
    ]
    mine = Score.scorer_id.in_(scorers.values()), Score.response_id.in_([row["response_id"] for row in rows])
    session.execute(delete(Score).where(*mine, Score.failure.is_not(None)))
    found = session.execute(select(Score.response_id, Score.scorer_id, Score.value).where(*mine))
    there = {(response_id, scorer_id): value for response_id, scorer_id, value in found}
    known = [there.get((row["response_id"], row["scorer_id"])) for row in rows]
    new = [row for row, value in zip(rows, known, strict=True) if value is None]
    bulk.insert_new(session, Score, new)
    combined.follow(session, scorers.values(), [row["response_id"] for row in new])
    tally.new_scores += len(new)
    n_differing = sum(value not in (None, row["value"]) for row, value in zip(rows, known, strict=True))
    n_of_others = sum(len(row.scores) for row in cells.values()) - len(rows)
    tally.other_scores += n_differing + n_of_others


def _columns(cell: Cell, row: ResponseRow) -> dict[str, Any]:
    return {"prompt_id": cell[0], "teacher_id": cell[1], "sample": 0, **_said(row)}


def _said(row: ResponseRow) -> dict[str, Any]:
    return {
        "text": row.text,
        "tool_calls": row.tool_calls,
        "failure": row.failure,
        "finish_reason": row.finish_reason,
        "prompt_tokens": row.prompt_tokens,
        "response_tokens": row.response_tokens,
        "origin": Origin.IMPORTED,
        "meta": row.meta,
    }
