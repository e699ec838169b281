"""Store each conversation once in the prompts table, and fill in reference answers that it lacked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import bindparam, func, select, text, update
from sqlalchemy.orm import Session

from persyn.db import bulk
from persyn.db.catalog import Prompt
from persyn.ingest.rows import PromptRow
from persyn.llm.scorers.code_tests import CodeFields
from persyn.llm.scorers.instructions import InstructionFields

#: Fields besides the answer that affect quality scores.
_SCORED_BY = (*InstructionFields.__struct_fields__, *CodeFields.__struct_fields__)


@dataclass(frozen=True, slots=True)
class Stored:
    """The result of storing a batch.

    hashes:    of its conversations, each once.
    new:       conversations that were not stored before.
    conflicts: rows whose answer, instructions or tests differ from the stored ones, which are kept.
    """

    hashes: Sequence[str]
    new: int
    conflicts: int


def lock(session: Session) -> None:
    """Serialise imports: two that insert the same prompts in different orders would deadlock."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("LOCK TABLE prompts IN SHARE ROW EXCLUSIVE MODE"))


def store(session: Session, source: str, batch: Sequence[PromptRow]) -> Stored:
    """Insert new prompts, and fill in missing answers and fields of stored ones."""
    by_hash = [(row.content_hash, row) for row in batch]
    known = _known(session, [content_hash for content_hash, _ in by_hash])
    new: list[dict[str, Any]] = []
    late: dict[str, _Known] = {}
    conflicts = 0
    for content_hash, row in by_hash:
        if content_hash not in known:
            known[content_hash] = _Known(row.answer, row.meta)
            new.append(_columns(row, content_hash, source))
            continue
        was = known[content_hash]
        conflicts += was.differs(row)
        if (completed := was.completed(row)) != was:
            known[content_hash] = late[content_hash] = completed
    bulk.insert_new(session, Prompt, new)
    _complete(session, late)
    return Stored(list(known), len(new), conflicts)


def n_conflicts(session: Session, batch: Sequence[PromptRow]) -> int:
    """Count the rows of a batch that `store` would report as conflicts; writes nothing."""
    known = _known(session, [row.content_hash for row in batch])
    return sum(row.content_hash in known and known[row.content_hash].differs(row) for row in batch)


def repeated_ids(session: Session, sources: Iterable[str]) -> tuple[tuple[str, int, str], ...]:
    """For each source in which several prompts share an id: its name, the number of such ids, and one of them."""
    ids = (
        select(Prompt.source, Prompt.source_id)
        .where(Prompt.source.in_(list(sources)), Prompt.source_id.is_not(None))
        .group_by(Prompt.source, Prompt.source_id)
        .having(func.count() > 1)
        .subquery()
    )
    found = select(ids.c.source, func.count(), func.min(ids.c.source_id)).group_by(ids.c.source).order_by(ids.c.source)
    return tuple((source, count, source_id) for source, count, source_id in session.execute(found))


@dataclass(frozen=True, slots=True)
class _Known:
    """The fields of a stored prompt that an import may fill in."""

    answer: str | None
    meta: dict[str, Any]

    def differs(self, row: PromptRow) -> bool:
        """Whether a row differs in fields that affect its scores."""
        pairs = [(self.answer, row.answer), *((self.meta.get(name), row.meta.get(name)) for name in _SCORED_BY)]
        return any(None not in pair and pair[0] != pair[1] for pair in pairs)

    def completed(self, row: PromptRow) -> _Known:
        """Fill in fields from another row of the same conversation; present values are kept."""
        lacked = {name: value for name, value in row.meta.items() if self.meta.get(name) is None}
        return _Known(self.answer if self.answer is not None else row.answer, {**self.meta, **lacked})


def _known(session: Session, hashes: list[str]) -> dict[str, _Known]:
    known = select(Prompt.content_hash, Prompt.answer, Prompt.meta).where(
        bulk.among(session, Prompt.content_hash, hashes)
    )
    return {content_hash: _Known(answer, meta) for content_hash, answer, meta in session.execute(known)}


def _columns(row: PromptRow, content_hash: str, source: str) -> dict[str, Any]:
    return {
        "content_hash": content_hash,
        "text": row.text,
        "history": row.history,
        "last_turn": row.last_turn,
        "tools": row.tools,
        "response_schema": row.response_schema,
        "answer": row.answer,
        "source": source,
        "source_id": row.source_id,
        "meta": row.meta,
    }


def _complete(session: Session, late: dict[str, _Known]) -> None:
    if late:
        statement = update(Prompt.__table__).where(Prompt.content_hash == bindparam("of_hash"))  # type: ignore[arg-type]
        session.connection().execute(
            statement.values(answer=bindparam("answer"), meta=bindparam("meta")),
            [{"of_hash": content_hash, "answer": row.answer, "meta": row.meta} for content_hash, row in late.items()],
        )
