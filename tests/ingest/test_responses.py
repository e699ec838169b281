"""Imports of a grid store its cells exactly, including gaps, and are atomic."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sqlalchemy import func, select

from persyn.config import TeacherTable
from persyn.db.catalog import Prompt, Scorer, Teacher
from persyn.db.connect import Database
from persyn.db.results import Origin, Response, Score
from persyn.errors import UsageError
from persyn.ingest import responses, versions
from persyn.ingest.imports import ImportReport
from persyn.ingest.response_rows import Layout
from persyn.ingest.rows import parse


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def cell(number: int, teacher: str, response: str | None = "Two.", **more: Any) -> dict[str, Any]:
    return {"prompt": f"{number} + 1?", "teacher": teacher, "response": response, **more}


def load(database: Database, path: Path, **how: Any) -> ImportReport:
    with database.write() as session:
        return responses.import_responses(session, [path], **how)


def count(database: Database, model: Any) -> int:
    with database.read() as session:
        return session.scalars(select(func.count()).select_from(model)).one()


def test_a_ragged_grid_is_stored_cell_by_cell(database: Database, tmp_path: Path) -> None:
    path = write(
        tmp_path / "grid.jsonl",
        cell(1, "ada", "Two.", answer=2, id="p1", response_tokens=3, finish_reason="stop", level=5),
        cell(1, "bob", "  "),
        cell(2, "ada", "Three."),
        cell(1, "ada", "Two."),
    )

    report = load(database, path)

    assert report == ImportReport(
        rows=4, new=3, replaced=0, duplicates=1, conflicts=0, bad=0, new_scores=0, first_bad=()
    )
    with database.read() as session:
        found = session.execute(
            select(Prompt.text, Teacher.name, Response.text, Response.failure)
            .select_from(Response)
            .join(Prompt, Prompt.id == Response.prompt_id)
            .join(Teacher, Teacher.id == Response.teacher_id)
            .order_by(Response.id)
        ).all()
        assert [tuple(row) for row in found] == [
            ("1 + 1?", "ada", "Two.", None),
            ("1 + 1?", "bob", None, "empty: the teacher wrote nothing"),
            ("2 + 1?", "ada", "Three.", None),
        ]
        first = session.scalars(select(Response).order_by(Response.id)).first()
        assert first is not None
        assert (first.origin, first.response_tokens, first.finish_reason) == (Origin.IMPORTED, 3, "stop")
        assert first.meta == {"level": 5}
        prompt = session.get_one(Prompt, first.prompt_id)
        assert (prompt.answer, prompt.source_id, prompt.source, prompt.meta) == ("2", "p1", "grid.jsonl", {})
        assert {teacher.engine for teacher in session.scalars(select(Teacher))} == {"imported"}


def test_the_usual_other_names_and_any_other_are_understood(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "grid.jsonl.gz"
    record = {"q": "1 + 1?", "model": "ada", "output": "2", "reference_answer": "2", "prompt_id": "x", "rules": [1]}
    with gzip.open(path, "wt") as file:
        file.write(json.dumps(record) + "\n")

    load(database, path, layout=Layout(names={"prompt": "q"}, prompt=("rules",)))

    with database.read() as session:
        prompt, response = session.scalars(select(Prompt)).one(), session.scalars(select(Response)).one()
    assert (prompt.text, prompt.answer, prompt.source_id, prompt.meta) == ("1 + 1?", "2", "x", {"rules": [1]})
    assert (response.text, response.meta) == ("2", {})


def test_a_stored_text_stays_and_a_failed_cell_takes_the_text_that_comes(database: Database, tmp_path: Path) -> None:
    load(database, write(tmp_path / "a.jsonl", cell(1, "ada", "Two."), cell(1, "bob", None)))
    report = load(database, write(tmp_path / "b.jsonl", cell(1, "ada", "Other."), cell(1, "bob", "Late.")))

    assert (report.new, report.replaced, report.duplicates, report.conflicts) == (0, 1, 1, 1)
    with database.read() as session:
        assert set(session.scalars(select(Response.text))) == {"Two.", "Late."}
        assert session.scalars(select(Response.failure)).all() == [None, None]


def test_scores_come_with_the_responses(database: Database, tmp_path: Path) -> None:
    layout = Layout(score=("label",))
    load(database, write(tmp_path / "a.jsonl", cell(1, "ada", label=True), cell(2, "ada", label=0.5)), layout=layout)
    late = load(
        database, write(tmp_path / "b.jsonl", cell(1, "ada", label=False), cell(3, "ada", label=1)), layout=layout
    )

    with database.read() as session:
        assert session.scalars(select(Score.value).order_by(Score.response_id)).all() == [1.0, 0.5, 1.0]
        scorer = session.scalars(select(Scorer)).one()
        assert (scorer.kind, scorer.model) == ("imported", "label")
    assert (late.new, late.new_scores) == (1, 1)


def test_rows_of_one_cell_bring_their_scores_together_and_another_text_is_told_of(
    database: Database, tmp_path: Path
) -> None:
    layout = Layout(score=("right", "liked"))
    rows = [
        cell(1, "ada", "Two.", right=1, answer="2"),
        cell(1, "ada", "Three.", right=0),
        cell(1, "ada", "Two.", liked=0.3, right=0),
        cell(1, "bob", "Two.", right=1, answer="3"),
    ]
    report = load(database, write(tmp_path / "a.jsonl", *rows), layout=layout)
    # A different text by ada, and a different answer to the same prompt.
    assert (report.new, report.duplicates, report.conflicts, report.new_scores) == (2, 2, 2, 3)
    with database.read() as session:
        found = session.execute(select(Scorer.model, Score.value).join(Scorer, Scorer.id == Score.scorer_id)).all()
    assert sorted(map(tuple, found)) == [("liked", 0.3), ("right", 1.0), ("right", 1.0)]


def test_a_number_of_four_hundred_digits_is_no_score(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "Why?", "teacher": "ada", "response": "So.", "label": 1' + "0" * 400 + "}\n")
    with pytest.raises(UsageError, match="'label' must be a number"):
        load(database, path, layout=Layout(score=("label",)))


def test_a_teachers_file_says_whose_rows_there_may_be(database: Database, tmp_path: Path) -> None:
    table = TeacherTable(name="ada", model="ada", engine="imported", gpus=0, family="a", params_b=7.0)
    with database.write() as session:
        ids = {"ada": versions.teacher(session, table, {})}
    path = write(tmp_path / "a.jsonl", cell(1, "ada"), cell(1, "adda"))

    with pytest.raises(UsageError, match="a row has teacher 'adda', but the teachers' file has ada"):
        load(database, path, teachers=ids)
    assert count(database, Response) == count(database, Prompt) == 0

    load(database, write(tmp_path / "b.jsonl", cell(1, "ada")))  # without the teachers' file it is the same teacher
    with database.read() as session:
        teacher = session.scalars(select(Teacher)).one()
        assert (teacher.family, teacher.params_b) == ("a", 7.0)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "a", "response": "b"}, "no 'teacher'"),
        ({"prompt": "a", "teacher": " ", "response": "b"}, "'teacher' must be a name"),
        ({"prompt": "a", "teacher": "a<b>", "response": "b"}, "'teacher' 'a<b>' must be at most 100 letters"),
        ({"teacher": "ada", "response": "b"}, "neither 'prompt' nor 'messages'"),
        ({"prompt": "a", "teacher": "ada", "response": ["b"]}, "'response' must be text"),
        ({"prompt": "a", "teacher": "ada", "response": "b\0"}, "a NUL character"),
        ({"prompt": "a", "teacher": "ada", "response": "b", "response_tokens": "9.5"}, "'response_tokens' must be"),
        ({"prompt": "a", "teacher": "ada", "response": "b", "response_tokens": 2**31}, "'response_tokens' must be"),
        ({"prompt": "a", "teacher": "ada", "response": "b", "label": "good"}, "'label' must be a number"),
    ],
)
def test_a_bad_row_is_named_and_leaves_nothing(
    database: Database, tmp_path: Path, record: dict[str, Any], reason: str
) -> None:
    path = write(tmp_path / "a.jsonl", cell(1, "ada", label=1), record)

    with pytest.raises(UsageError, match=rf"(?s)a\.jsonl:2: .*{reason}"):
        load(database, path, layout=Layout(score=("label",)))
    assert count(database, Response) == 0

    report = load(database, path, layout=Layout(score=("label",)), on_error="skip")
    assert (report.new, report.bad) == (1, 1)


@pytest.mark.parametrize(
    "layout",
    [Layout(names={"answer": "nope"}), Layout(names={"response_tokens": "nope"}), Layout(prompt=("nope",))],
)
def test_a_field_that_no_row_has_is_a_mistake_in_the_command(
    database: Database, tmp_path: Path, layout: Layout
) -> None:
    path = write(tmp_path / "a.jsonl", cell(1, "ada"))

    with pytest.raises(UsageError, match=r"no row of a\.jsonl has a field nope; nothing was imported"):
        load(database, path, layout=layout)
    assert count(database, Response) == 0


def test_a_file_without_a_single_response_is_not_a_grid_of_failures(database: Database, tmp_path: Path) -> None:
    row = {"prompt": "Why?", "teacher": "ada", "completion": "So."}
    path = write(tmp_path / "a.jsonl", row)

    with pytest.raises(UsageError, match=r"no row of a\.jsonl has the teacher's response.*--map response=FIELD"):
        load(database, path)
    assert load(database, path, layout=Layout(names={"response": "completion"})).new == 1


def test_a_score_of_a_text_that_is_not_stored_is_not_kept(database: Database, tmp_path: Path) -> None:
    load(database, write(tmp_path / "a.jsonl", cell(1, "ada", "Two."), cell(2, "ada", "Three.")))
    rows = cell(1, "ada", "Three.", label=1), cell(2, "ada", None, label=1)
    report = load(database, write(tmp_path / "b.jsonl", *rows), layout=Layout(score=("label",)))

    assert (report.duplicates, report.conflicts) == (2, 1)
    assert count(database, Score) == 0


def test_of_several_rows_for_a_cell_the_first_text_counts_wherever_they_stand(
    database: Database, tmp_path: Path
) -> None:
    load(database, write(tmp_path / "a.jsonl", cell(1, "ada", None), cell(1, "ada", "Two."), cell(1, "ada", "2")))
    with database.read() as session:
        assert session.scalars(select(Response.text)).all() == ["Two."]


def test_a_csv_file_has_numbers_as_text(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "grid.csv"
    path.write_text("prompt,teacher,response,response_tokens,label,right\n1?,ada,Two.,9,0.5,True\n2?,ada,2,,,false\n")
    load(database, path, layout=Layout(score=("label", "right")))
    with database.read() as session:
        assert session.scalars(select(Response.response_tokens).order_by(Response.id)).all() == [9, None]
        assert sorted(session.scalars(select(Score.value))) == [0.0, 0.5, 1.0]


def test_a_parquet_file_has_a_column_for_each_field_and_null_where_a_row_has_none(
    database: Database, tmp_path: Path
) -> None:
    rows = [
        cell(1, "ada", response_tokens=9, answer="2", label=True, level=3, id=7),
        cell(1, "bob", None, response_tokens=None, answer="2", label=None, level=3, id=7),
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "grid.parquet")

    report = load(database, tmp_path / "grid.parquet", layout=Layout(prompt=("level",), score=("label",)))

    assert (report.rows, report.new, report.bad, report.new_scores) == (2, 2, 0, 1)
    with database.read() as session:
        prompt = session.scalars(select(Prompt)).one()
        assert (prompt.text, prompt.answer, prompt.source, prompt.source_id, prompt.meta) == (
            "1 + 1?",
            "2",
            "grid.parquet",
            "7",
            {"level": 3},
        )
        found = session.execute(
            select(Teacher.name, Response.text, Response.failure, Response.response_tokens)
            .join(Teacher, Teacher.id == Response.teacher_id)
            .order_by(Teacher.name)
        ).all()
        assert [tuple(row) for row in found] == [
            ("ada", "Two.", None, 9),
            ("bob", None, "empty: the teacher wrote nothing", None),
        ]
        assert session.scalars(select(Score.value)).all() == [1.0]


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "1 + 1?"},
]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "csv"])
def test_a_row_may_have_a_conversation_in_place_of_a_prompt(database: Database, tmp_path: Path, form: str) -> None:
    path = tmp_path / f"grid.{form}"
    rows = [{"messages": TURNS, "teacher": teacher, "response": "Two."} for teacher in ("ada", "bob")]
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form == "csv":  # a cell is text
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(row | {"messages": json.dumps(TURNS)} for row in rows)
    else:
        write(path, *rows)

    report = load(database, path)

    assert (report.new, report.bad) == (2, 0)
    with database.read() as session:
        prompt = session.scalars(select(Prompt)).one()
        assert (prompt.text, prompt.history, prompt.meta) == ("1 + 1?", TURNS[:-1], {})
        assert prompt.content_hash == parse({"messages": TURNS}).content_hash
        assert session.scalars(select(Response.text)).all() == ["Two.", "Two."]


def test_a_row_with_a_prompt_and_a_conversation_is_bad(database: Database, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="both 'prompt' and 'messages'; one row is one conversation"):
        load(database, write(tmp_path / "a.jsonl", cell(1, "ada", messages=TURNS)))


def test_a_text_that_takes_a_failed_ones_place_says_nothing_of_how_that_was_made(
    database: Database, tmp_path: Path
) -> None:
    load(database, write(tmp_path / "a.jsonl", cell(1, "ada", None)))
    with database.write() as session:
        failed = session.scalars(select(Response)).one()
        failed.engine, failed.seed, failed.seconds = "vllm 1", 7, 1.5
    load(database, write(tmp_path / "b.jsonl", cell(1, "ada", "Two.")))
    with database.read() as session:
        response = session.scalars(select(Response)).one()
        assert (response.text, response.failure) == ("Two.", None)
        assert (response.engine, response.seed, response.seconds) == (None, None, None)
