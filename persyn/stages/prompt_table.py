"""Prompts into their table, each conversation once, with the reference answer it lacked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import bindparam, func, select, text, update
from sqlalchemy.orm import Session

from persyn.db import bulk
from persyn.db.catalog import Prompt
from persyn.stages.rows import Row


@dataclass(frozen=True, slots=True)
class Stored:
    """What came of a batch.

    hashes:    of its conversations, each once.
    new:       conversations that were not there.
    conflicts: rows that came with another answer than the stored one, which stays.
    """

    hashes: Sequence[str]
    new: int
    conflicts: int


def take_turns(session: Session) -> None:
    """Let imports come one after the other: two that meet the same prompts in another order would deadlock."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("LOCK TABLE prompts IN SHARE ROW EXCLUSIVE MODE"))


def store(session: Session, source: str, batch: Sequence[Row]) -> Stored:
    """Insert what is new, add answers that are missing."""
    by_hash = [(row.content_hash, row) for row in batch]
    answers = _known_answers(session, [content_hash for content_hash, _ in by_hash])
    new: list[dict[str, Any]] = []
    late: dict[str, str] = {}
    conflicts = 0
    for content_hash, row in by_hash:
        if content_hash not in answers:
            answers[content_hash] = row.answer
            new.append(_columns(row, content_hash, source))
        elif row.answer is not None and (known := answers[content_hash]) != row.answer:
            if known is None:
                answers[content_hash] = late[content_hash] = row.answer
            else:
                conflicts += 1
    bulk.insert_new(session, Prompt, new)
    _add_answers(session, late)
    return Stored(list(answers), len(new), conflicts)


def repeated_ids(session: Session, sources: Iterable[str]) -> tuple[tuple[str, int, str], ...]:
    """Of each source in which several prompts have one id: its name, how many such ids there are, and one of them."""
    ids = (
        select(Prompt.source, Prompt.source_id)
        .where(Prompt.source.in_(list(sources)), Prompt.source_id.is_not(None))
        .group_by(Prompt.source, Prompt.source_id)
        .having(func.count() > 1)
        .subquery()
    )
    found = select(ids.c.source, func.count(), func.min(ids.c.source_id)).group_by(ids.c.source).order_by(ids.c.source)
    return tuple((source, count, source_id) for source, count, source_id in session.execute(found))


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
