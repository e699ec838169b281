"""The prompts on which a student is evaluated: those of files that its run does not have."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from msgspec import Struct
from sqlalchemy import select
from sqlalchemy.orm import Session

from persyn.config import QualityTable
from persyn.db.catalog import Prompt, Run, RunPrompt
from persyn.errors import UsageError, shorten
from persyn.ingest import prompt_import, rows
from persyn.ingest.imports import ImportCounts, batches
from persyn.ingest.layouts import Names
from persyn.ingest.rows import PromptRow
from persyn.llm.scorers.code_tests import CodeFields
from persyn.llm.scorers.instructions import InstructionFields

#: Scores the reference answers, not the student's responses.
PERPLEXITY = "log_likelihood"
#: The fields of a prompt's row that scorers read.
_ROWS: dict[str, type[Struct]] = {"instructions": InstructionFields, "code": CodeFields}


def prompts(
    session: Session, run: Run, files: Sequence[Path], table: QualityTable | None, names: Names
) -> tuple[list[int], str]:
    """The prompts of files that are not in the run: their ids, and a digest of all of them.

    table: the scorer's; None for the likelihood of the reference answers.
    Raises `UsageError` if there are none, or if a row differs from what is stored in what the scorer reads.
    """
    needs_answer = table is None or table.kind == "math"
    hashes = prompt_import.hashes_of(session, files, names)
    of_run = select(RunPrompt.prompt_id).where(RunPrompt.run_id == run.id)
    found: list[tuple[int, str]] = []
    for some in _pieces(sorted(hashes), 1_000):
        wanted = select(Prompt.id, Prompt.content_hash).where(Prompt.content_hash.in_(some), Prompt.id.not_in(of_run))
        if needs_answer:
            wanted = wanted.where(Prompt.answer.is_not(None))
        found += session.execute(wanted.order_by(Prompt.content_hash)).all()
    if not found:
        what = "both has a reference answer and is outside the run" if needs_answer else "is outside the run"
        raise UsageError(
            f"none of {len(hashes):,} prompts {what}: a student must be evaluated on prompts it was not trained on"
        )
    asked = {content_hash for _, content_hash in found}
    for source, batch in batches(files, partial(rows.read, names=names), ImportCounts("stop")):
        _require_as_stored(session, source, [row for row in batch if row.content_hash in asked], table)
    digest = hashlib.sha256("".join(content_hash for _, content_hash in found).encode()).hexdigest()
    return [prompt_id for prompt_id, _ in found], digest


def _require_as_stored(session: Session, source: str, batch: Sequence[PromptRow], table: QualityTable | None) -> None:
    """Raise `UsageError` for a row that differs from the store in fields that affect its score."""
    wanted = select(Prompt.id, Prompt.content_hash, Prompt.answer, Prompt.meta)
    found = session.execute(wanted.where(Prompt.content_hash.in_([row.content_hash for row in batch])))
    stored = {prompt.content_hash: prompt for prompt in found}
    for row in batch:
        prompt = stored[row.content_hash]
        known = _judged_by(prompt, table)
        for name, value in _judged_by(row, table).items():
            if known.get(name) != value:
                here, there = (shorten(repr(each), most=80) for each in (value, known.get(name)))
                raise UsageError(
                    f"{source}: the prompt {shorten(row.text, most=80)!r} has {name} {here}, but {there} is stored "
                    f"with it ('persyn prompts show {prompt.id}'), which would be used to score its responses; "
                    f"give the row the same {name} or none, or remove it"
                )


def _judged_by(prompt: Any, table: QualityTable | None) -> dict[str, Any]:
    """The fields of a prompt, besides its conversation, that a scorer reads; nulls are left out."""
    kind = table.kind if table else PERPLEXITY
    fields: dict[str, Any] = {}
    if kind in (PERPLEXITY, "math", "python") or (kind == "judge" and table and table.options.get("against")):
        fields["answer"] = prompt.answer
    if (of_row := _ROWS.get(kind)) is not None:
        fields |= {name: prompt.meta.get(name) for name in of_row.__struct_fields__}
    elif kind == "python":
        fields |= prompt.meta
    found: dict[str, Any] = _without_nulls(fields)
    return found


def _without_nulls(value: Any) -> Any:
    """Remove null fields, recursively, since other formats of the same file omit them."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _pieces(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
