"""Queries on the command line, on a store with known content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import update

from persyn.cli.sql import sql
from persyn.cli.trace import trace
from persyn.db.catalog import Prompt
from persyn.db.connect import Database
from persyn.db.results import Response, Score
from persyn.errors import UsageError
from tests.sql import by_hand


@pytest.fixture(autouse=True)
def known(database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with database.write() as session:
        by_hand.fill(session)
    monkeypatch.setenv("PERSYN_DATABASE_URL", database_url)
    monkeypatch.setenv("COLUMNS", "80")


def said(*arguments: str, stdin: str | None = None, command: Any = sql) -> str:
    result = CliRunner().invoke(command, arguments, input=stdin, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_question_is_asked_by_its_name(known: None) -> None:
    assert said("--ask", "missing", "-p", "run=first").splitlines() == [
        "stage     teacher  scorer  missing  first_prompt_id",
        "score     ada      fake          1                2",
        "generate  bob      -             1                6",
    ]


def test_an_answer_is_csv_or_json(known: None, tmp_path: Path) -> None:
    query = "SELECT id, answer, text || ',\"' AS said FROM prompts WHERE id = :id"
    assert said(query, "-p", "id=2", "--csv") == 'id,answer,said\n2,,"first: prompt 1?,"""\n'
    (file := tmp_path / "mine.sql").write_text(query)
    for asked in (["--file", str(file)], ["-"]):
        answer = said(*asked, "-p", "id=2", "--json", stdin=query)
        assert json.loads(answer) == [{"id": 2, "answer": None, "said": 'first: prompt 1?,"'}]


def test_a_row_too_wide_for_the_terminal_is_upright(known: None) -> None:
    lines = said("--ask", "origin", "-p", "run=first", "-p", "prompt=1").splitlines()
    assert lines[0] == "-- row 1"
    assert "revision        abc" in lines


def test_an_answer_that_is_cut_says_so(known: None) -> None:
    result = CliRunner().invoke(sql, ["SELECT id FROM prompts ORDER BY id", "--limit", "2"], catch_exceptions=False)
    assert result.stdout.split() == ["id", "1", "2"]
    assert "the first 2 rows" in result.stderr


def test_what_cannot_be_asked_is_refused(known: None) -> None:
    for arguments, complaint in (
        ([], "give one of"),
        (["SELECT 1", "--ask", "progress"], "give one of"),
        (["--ask", "progres"], "did you mean 'progress'"),
        (["--ask", "progress"], "-p run="),
        (["--ask", "progress", "-p", "run=first", "-p", "rnu=x"], "no parameter rnu; it takes -p run="),
        (["--ask", "progress", "-p", "run=frist"], "there is no run 'frist'; 'persyn run list'"),
        (["--ask", "origin", "-p", "run=first", "-p", "prompt=999"], "there is no prompt '999'"),
        (["--ask", "origin", "-p", "run=first", "-p", "prompt=one"], "prompt must be a number, got 'one'"),
        (["--ask", "history", "-p", "job=99999"], "there is no job '99999'"),
        (["SELECT 1", "-p", "x"], "NAME=VALUE"),
        (["SELECT 1", "--csv", "--json"], "give one"),
        (["DELETE FROM prompts"], "rejected the query"),
    ):
        with pytest.raises(UsageError, match=complaint):
            said(*arguments)


def test_a_trace_shows_both_directions(known: None) -> None:
    lines = said("first", "1", command=trace).splitlines()
    for part in ("assigned to ada", "router", "response of ada", "raw scores", "used by"):
        assert part in lines, part
    assert "  gpus                0 H100" in lines
    assert lines[-1].split() == ["second", "target", "ada", "True", "-", "-"]


def test_a_trace_shows_the_beginning_of_the_reasoning_and_all_of_it_as_json(known: None, database: Database) -> None:
    assert "reasoning" not in said("first", "2", command=trace)
    reasoning = f"Hm.\x1b[31m{'x' * 3_000}"
    with database.write() as session:
        session.execute(update(Response).values(reasoning=reasoning, reasoning_tokens=9))
        session.execute(
            update(Score).where(Score.n_tokens.is_not(None)).values(reasoning_value=-2.5, reasoning_n_tokens=8)
        )

    shown = said("first", "1", command=trace)

    assert "  reasoning           Hm.\\x1b[31mx" in shown
    assert "\u2026 (3,008 characters)" in shown
    assert "  reasoning_tokens    9" in shown
    assert "reasoning_value     -2.5" in shown
    assert "reasoning_n_tokens  8" in shown
    found = json.loads(said("first", "1", "--json", command=trace))
    assert {row["reasoning"] for row in found["responses"]} == {reasoning}


def test_a_trace_takes_the_id_that_a_prompt_has_in_its_file(known: None, database: Database) -> None:
    with database.write() as session:
        for prompt_id, source_id in ((1, "q-1"), (2, "1"), (3, "twice"), (4, "twice")):
            session.get_one(Prompt, prompt_id).source_id = source_id
        content_hash = session.get_one(Prompt, 1).content_hash

    for given in ("q-1", content_hash):
        assert json.loads(said("first", given, "--json", command=trace))["prompt_id"] == 1
    result = CliRunner().invoke(trace, ["first", "1"], catch_exceptions=False)
    assert result.stdout.startswith("prompt 1 ")
    assert result.stderr == "1 was read as a prompt_id; in its file it is also the id of prompt 2\n"
    for given, complaint in (
        ("twice", r"several prompts of run 'first' have the id 'twice'; give one by prompt_id: 3, 4"),
        ("q-9", "run 'first' has no prompt with the prompt_id or file id q-9"),
        ("99999999999999999999", "has no prompt with the prompt_id or file id 9999"),
    ):
        with pytest.raises(UsageError, match=complaint):
            said("first", given, command=trace)
