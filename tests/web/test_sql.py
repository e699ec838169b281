"""The SQL page; what a query may not do is tested in tests/sql."""

from __future__ import annotations

import csv
import io
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from urllib.parse import quote

import pytest

from persyn.sql import saved
from persyn.web import sql
from tests.web.conftest import Filled
from tests.web.test_pages import Read, rows

PROMPTS = "select id, text, answer from prompts order by id"


def test_an_answer_is_a_table(filled: Filled) -> None:
    html = filled.get(f"/sql?query={quote(PROMPTS + ' limit 2')}")
    first, second = filled.made.run.prompt_ids[:2]
    assert rows(html) == ["id text answer", f"{first} What is 0 plus 0? 0", f"{second} What is 1 plus 1? 2"]
    assert "2 rows, after" in Read(html).text
    assert PROMPTS in html  # for editing and running again


def test_a_page_has_so_many_rows_and_says_that_there_are_more(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "_PAGE", sql.Limits(rows=3))
    html = filled.get(f"/sql?query={quote(PROMPTS)}")
    assert len(rows(html)) == 4
    assert "3 rows, and there are more" in Read(html).text


@pytest.mark.parametrize("query", ["delete from runs", "select 1; select 2"])
def test_what_is_no_question_is_refused_with_the_reason(filled: Filled, query: str) -> None:
    html = filled.get(f"/sql?query={quote(query)}")
    assert 'role="alert"' in html
    assert "<table" not in html
    assert filled.console.get("/runs/maths").status_code == 200


def test_a_file_has_the_values_as_they_are(filled: Filled) -> None:
    answer = filled.console.get(f"/sql.csv?query={quote(PROMPTS)}")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert answer.headers["content-disposition"] == 'attachment; filename="answer.csv"'
    found = list(csv.reader(io.StringIO(answer.text)))
    assert found[0] == ["id", "text", "answer"]
    assert [int(row[0]) for row in found[1:9]] == filled.made.run.prompt_ids
    assert filled.console.get(f"/sql.csv?query={quote('delete from runs')}").status_code == 400
    assert filled.console.get("/sql.csv").status_code == 400


def test_the_schema_stands_beside_the_question(filled: Filled) -> None:
    html = filled.get("/sql")
    assert "v_dataset run prompt_id role" in Read(html).text
    assert "run_teachers run_id position teacher_id" in Read(html).text


def test_a_text_with_a_colon_is_no_parameter(filled: Filled) -> None:
    query = quote("select '12:noon' as at")
    assert rows(filled.get(f"/sql?query={query}"))[1] == "12:noon"


def test_an_array_in_a_file_is_json(filled: Filled) -> None:
    if filled.database.url.get_backend_name() == "sqlite":
        pytest.skip("SQLite has no arrays")
    query = quote("select array['it''s', null] as a")
    assert filled.get(f"/sql.csv?query={query}") == 'a\n"[""it\'s"", null]"\n'


def test_a_question_whose_process_ends_is_told_of(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    for path, status in (("/sql", 200), ("/sql.csv", 400)):
        answer = filled.console.get(f"{path}?query=select+1")
        assert answer.status_code == status
        assert "process ended (exit code" in answer.text


def test_a_link_of_another_site_asks_nothing(filled: Filled) -> None:
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    html = filled.console.get(f"/sql?query={quote(PROMPTS)}", headers=headers).text
    assert PROMPTS in html
    assert "<table" not in html
    assert filled.console.get(f"/sql.csv?query={quote(PROMPTS)}", headers=headers).status_code == 403


def test_who_asks_while_others_ask_is_told_to_wait(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "_WAIT_SECONDS", 0.01)
    with sql._turn(), sql._turn():
        assert filled.console.get(f"/sql?query={quote(PROMPTS)}").status_code == 429
    assert filled.console.get(f"/sql?query={quote(PROMPTS)}").status_code == 200


def test_so_many_wait_that_pages_are_still_answered(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "_WAIT_SECONDS", 60.0)

    def ask() -> int:
        return filled.console.get("/sql?query=select+1").status_code

    with ThreadPoolExecutor(8) as people:
        with sql._turn(), sql._turn():
            waiting = [people.submit(ask) for _ in range(8)]
            # Six may wait, the others are rejected at once.
            assert [done.result() for done in islice(as_completed(waiting, timeout=30), 2)] == [429, 429]
            assert filled.console.get("/").status_code == 200
        assert sorted(one.result() for one in waiting) == [200] * 6 + [429] * 2


def test_a_shipped_question_is_answered_at_a_click_unless_it_needs_more_than_a_run(filled: Filled) -> None:
    html = filled.get("/sql?question=progress")
    assert 'name="run" value="failed"' in html  # of the newest run by default
    assert any(row.startswith("calibrate") for row in rows(html))
    assert "<table" not in filled.get("/sql?question=why")  # no prompt was given
    html = filled.get("/sql?question=progress&run=maths")
    assert any("generate" in row for row in rows(html))
    assert filled.console.get("/sql.csv?question=progress").status_code == 400
    assert "generate" in filled.console.get("/sql.csv?question=progress&run=maths").text
    assert filled.console.get("/sql?question=nothing").status_code == 404


def test_the_books_questions_are_all_offered(filled: Filled) -> None:
    links = Read(filled.get("/sql")).links
    assert {f"/sql?question={name}" for name in saved.queries()} <= set(links.values())


def test_a_parameter_is_bound_and_never_part_of_the_statement(filled: Filled) -> None:
    query = quote("select count(*) from runs where name = :name")
    assert rows(filled.get(f"/sql?query={query}&name=maths"))[1] == "1"
    assert rows(filled.get(f"/sql?query={query}&name={quote(chr(39) + ' or 1=1 --')}"))[1] == "0"
