"""Many rows are written and found in one statement on both kinds of database."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import event, select

from persyn.db import bulk
from persyn.db.catalog import Prompt
from persyn.db.connect import Database
from persyn.db.results import Assignment, Origin, Response
from persyn.db.time import now
from tests.factories import make_run

_HASHES = [f"{n:064x}" for n in range(5)]


def prompt(content_hash: str, **fields: Any) -> dict[str, Any]:
    return {"content_hash": content_hash, "text": "What?", "source": "p", "meta": {}, **fields}


def test_rows_are_inserted_as_they_are(database: Database) -> None:
    turns = [{"role": "user", "content": 'it\'s {a}, "b", \\c\nand ü 漢 :d %s %(e)s'}]
    rows = [
        prompt(_HASHES[0], history=turns, meta={"list": [1, [2, None]], "empty": {}}, answer="{}"),
        prompt(_HASHES[1], history=None, meta={}, answer=None),
        prompt(_HASHES[2], history=[], meta={"n": 10**30}, answer="NULL"),
    ]

    with database.write() as session:
        bulk.insert_new(session, Prompt, rows)

    with database.read() as session:
        found = session.scalars(select(Prompt).order_by(Prompt.id)).all()
    assert [(p.content_hash, p.history, p.meta, p.answer) for p in found] == [
        (row["content_hash"], row["history"], row["meta"], row["answer"]) for row in rows
    ]


def test_lists_enums_and_defaults_are_kept(database: Database) -> None:
    with database.write() as session:
        made = make_run(session, teachers=["a", "b"], prompts=2, calibration=0)
        first, second = made.prompt_ids
        a, b = made.teacher_ids
        answered = {"teacher_id": a, "text": "x", "origin": Origin.IMPORTED}
        bulk.insert_new(session, Response, [{"prompt_id": each, **answered} for each in (first, second)])
        chosen = {"run_id": made.id, "teacher_id": a, "reason": "test"}
        further = [{"prompt_id": first, "further": [b, a]}, {"prompt_id": second, "further": [b]}]
        bulk.insert_new(session, Assignment, [{**chosen, **each} for each in further])

    with database.read() as session:
        responses = session.scalars(select(Response).order_by(Response.prompt_id)).all()
        assignments = session.scalars(select(Assignment).order_by(Assignment.prompt_id)).all()
    assert [(r.origin, r.sample, r.seconds) for r in responses] == [(Origin.IMPORTED, 0, None)] * 2
    assert [(a.further, a.choice) for a in assignments] == [([b, a], 1), ([b], 1)]


def test_a_column_of_numbers_may_have_integers_and_floats(database: Database) -> None:
    with database.write() as session:
        made = make_run(session, prompts=3, calibration=0)
        rows = [
            {
                "run_id": made.id,
                "prompt_id": prompt_id,
                "teacher_id": made.teacher_ids[0],
                "reason": "r",
                "score": score,
            }
            for prompt_id, score in zip(made.prompt_ids, (0.5, 1, None), strict=True)
        ]
        bulk.insert_new(session, Assignment, rows)

    with database.read() as session:
        assert session.scalars(select(Assignment.score).order_by(Assignment.prompt_id)).all() == [0.5, 1.0, None]


def test_rows_that_exist_are_skipped(database: Database) -> None:
    with database.write() as session:
        bulk.insert_new(session, Prompt, [prompt(_HASHES[0]), prompt(_HASHES[1])])
        bulk.insert_new(session, Prompt, [prompt(_HASHES[1], text="Other?"), prompt(_HASHES[2])])
        bulk.insert_new(session, Prompt, [])

    with database.read() as session:
        found = session.execute(select(Prompt.content_hash, Prompt.text).order_by(Prompt.content_hash)).all()
    assert [tuple(row) for row in found] == [(each, "What?") for each in _HASHES[:3]]


def test_many_values_are_one_parameter(database: Database) -> None:
    with database.write() as session:
        bulk.insert_new(session, Prompt, [prompt(each, answer=f"'{each[-1]}\"") for each in _HASHES])
    asked: list[str] = []
    event.listen(database.engine, "before_cursor_execute", lambda *given: asked.append(given[2]))

    with database.write() as session:
        for wanted in (["'1\"", "'3\"", "none"], ["'4\""], []):
            found = session.scalars(select(Prompt.answer).where(bulk.among(session, Prompt.answer, wanted)))
            assert sorted(found) == [each for each in wanted if each != "none"]

    assert len({statement for statement in asked if "SELECT" in statement}) == 1


def test_a_statement_with_a_time_is_compiled_once(database: Database) -> None:
    hits: list[str] = []
    event.listen(
        database.engine, "before_cursor_execute", lambda *given: hits.append(getattr(given[4], "cache_hit", None).name)
    )

    with database.write() as session:
        for seconds in (90, -5, 0.001, 1e-5):
            at = session.scalars(select(now(timedelta(seconds=seconds)))).one()
            assert abs((at - datetime.now(UTC)).total_seconds() - seconds) < 2

    assert [hit for hit in hits if hit != "NO_CACHE_KEY"][1:] == ["CACHE_HIT"] * 3
