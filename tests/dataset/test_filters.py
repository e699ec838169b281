"""Filters and splits are reproducible, and every assignment is accounted for."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from persyn.dataset import export
from persyn.dataset.manifest import Manifest
from persyn.dataset.options import ExportOptions
from persyn.db.catalog import Run
from persyn.db.connect import Database
from persyn.db.results import Score
from persyn.errors import PersynError, UsageError
from tests.factories import MadeRun, make_assignment, make_prompt, make_response, make_run

#: For what is decided in Python row by row, so that one database suffices.
SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
#: Fifteen distinct words.
FIFTEEN = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"


def write(database: Database, run: MadeRun, folder: Path, **options: Any) -> Manifest:
    return export.write(database, run.id, folder, ExportOptions(formats=("messages",), **options))


def prompts_in(folder: Path, file: str = "messages.jsonl") -> list[int]:
    return [json.loads(line)["prompt_id"] for line in (folder / file).read_text().splitlines()]


def dropped(folder: Path) -> list[tuple[int, str, str]]:
    rows = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    return [(row["prompt_id"], row["filter"], row["found"]) for row in rows]


def answered(
    session: Session, run: MadeRun, text: str, response: str = "Yes.", *, teacher: int = 0, **columns: Any
) -> int:
    """Create a prompt of the run answered by its teacher in that position; return the prompt's id."""
    prompt_id = make_prompt(session, text, history=columns.pop("history", None))
    make_assignment(session, run.id, prompt_id, run.teacher_ids[teacher])
    quality = columns.pop("quality", None)
    response_id = make_response(session, prompt_id, run.teacher_ids[teacher], response, **columns)
    if quality is not None:
        scorer_id = session.get_one(Run, run.id).quality_scorer_id
        session.add(Score(response_id=response_id, scorer_id=scorer_id, value=quality, detail={}))
        session.flush()
    return prompt_id


@pytest.fixture
def run(database: Database) -> MadeRun:
    """A run without prompts."""
    with database.write() as session:
        return make_run(session, prompts=0)


def test_what_a_student_learns_is_the_split_train_without_what_the_filters_leave_out(
    database: Database, run: MadeRun, tmp_path: Path
) -> None:
    with database.write() as session:
        for number in range(20):
            answered(session, run, f"prompt {number}?", finish_reason="length" if number % 4 == 0 else "stop")
    options = {"finish_reasons": ("stop",), "splits": {"test": 0.3}}
    write(database, run, tmp_path / "out", **options)

    with database.read() as session:
        rows = list(export.training_rows(session, run.id, ExportOptions(**options)))

    learned, held_out = (prompts_in(tmp_path / "out", f"messages-{split}.jsonl") for split in ("train", "test"))
    assert [row.prompt_id for row in rows] == learned
    assert len(learned) + len(held_out) == 15
    assert held_out


def judge_by(session: Session, run: MadeRun, kind: str) -> None:
    """Set the run's kind of quality."""
    stored = session.get_one(Run, run.id)
    stored.config = {**stored.config, "quality": {"kind": kind, "model": "passed"}}


@pytest.mark.parametrize("kind", ["math", "instructions", "imported", "python"])
def test_answers_that_are_known_to_be_wrong_are_told_of_and_left_out_on_demand(
    database: Database, run: MadeRun, tmp_path: Path, kind: str
) -> None:
    with database.write() as session:
        judge_by(session, run, kind)
        answered(session, run, "a", quality=0.0)
        right, unknown = answered(session, run, "b", quality=1.0), answered(session, run, "c")

    kept = write(database, run, tmp_path / "kept")
    clean = write(database, run, tmp_path / "clean", drop_wrong=True)

    assert (kept.exported, kept.wrong, kept.dropped) == (3, 1, {})
    assert "**1 responses are known to be wrong**" in (tmp_path / "kept" / "README.md").read_text()
    assert (clean.exported, clean.wrong, clean.dropped) == (2, 0, {"wrong": 1})
    assert prompts_in(tmp_path / "clean") == [right, unknown]
    card = (tmp_path / "clean" / "README.md").read_text()
    assert "left out: known to be wrong | -1" in card
    assert "persyn export run --format messages --drop-wrong" in card


@SQLITE
@pytest.mark.parametrize(("kind", "quality"), [("reward_model", 0.0), ("judge", 0.0), ("imported", 0.5)])
def test_a_quality_that_is_no_verdict_calls_nothing_wrong(
    database: Database, run: MadeRun, tmp_path: Path, kind: str, quality: float
) -> None:
    with database.write() as session:
        judge_by(session, run, kind)
        if kind == "judge":
            stored = session.get_one(Run, run.id)
            stored.config = {**stored.config, "quality": {"kind": kind, "model": "m", "options": {"engine": "fake"}}}
        answered(session, run, "a", quality=0.0)
        answered(session, run, "b", quality=quality)

    assert write(database, run, tmp_path / "out").wrong is None
    with pytest.raises(UsageError, match=f"quality .{kind}. of run .* does not say which"):
        write(database, run, tmp_path / "out", drop_wrong=True)


def test_responses_that_are_cut_off_are_told_by_teacher(database: Database, run: MadeRun, tmp_path: Path) -> None:
    with database.write() as session:
        answered(session, run, "a", finish_reason="length")
        answered(session, run, "b")
        answered(session, run, "c", teacher=1)

    manifest = write(database, run, tmp_path / "out")

    assert [(each.name, each.truncated, each.exported) for each in manifest.teachers] == [("a", 1, 2), ("b", 0, 1)]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "1 responses are cut off at `max_tokens` (`finish_reason` is `length`): a 1 of 2 (50%)." in card


@SQLITE
def test_only_responses_that_finished_as_asked(database: Database, run: MadeRun, tmp_path: Path) -> None:
    with database.write() as session:
        whole = answered(session, run, "a")
        cut = answered(session, run, "b", finish_reason="length")
        imported = answered(session, run, "c", finish_reason=None)

    manifest = write(database, run, tmp_path / "out", finish_reasons=("stop",))

    assert prompts_in(tmp_path / "out") == [whole]
    assert dropped(tmp_path / "out") == [(cut, "finish_reason", "length"), (imported, "finish_reason", "unknown")]
    assert (manifest.assigned, manifest.exported, manifest.dropped) == (3, 1, {"finish_reason": 2})
    write(database, run, tmp_path / "out", finish_reasons=("stop", "unknown"))
    assert prompts_in(tmp_path / "out") == [whole, imported]


def test_a_minimum_of_quality_asks_what_becomes_of_the_unscored(
    database: Database, run: MadeRun, tmp_path: Path
) -> None:
    with database.write() as session:
        good = answered(session, run, "a", quality=0.5)
        bad = answered(session, run, "b", quality=0.49)
        unscored = answered(session, run, "c")

    with pytest.raises(UsageError, match=r"1 of the 3 responses have no quality.*set unscored to 'keep' or 'drop'"):
        write(database, run, tmp_path / "out", min_quality=0.5)
    assert not (tmp_path / "out").exists()

    manifest = write(database, run, tmp_path / "out", min_quality=0.5, unscored="keep")
    assert prompts_in(tmp_path / "out") == [good, unscored]
    assert manifest.dropped == {"quality": 1}
    manifest = write(database, run, tmp_path / "out", min_quality=0.5, unscored="drop")
    assert prompts_in(tmp_path / "out") == [good]
    assert dropped(tmp_path / "out") == [(bad, "quality", "0.49"), (unscored, "unscored", "")]
    assert manifest.dropped == {"quality": 1, "unscored": 1}


def test_where_all_are_scored_nothing_is_asked(database: Database, run: MadeRun, tmp_path: Path) -> None:
    with database.write() as session:
        good = answered(session, run, "a", quality=1.0)
        answered(session, run, "b", quality=-3.0)

    write(database, run, tmp_path / "out", min_quality=0.0)

    assert prompts_in(tmp_path / "out") == [good]


@SQLITE
@pytest.mark.parametrize(
    ("row", "is_contaminated"),
    [
        pytest.param({"text": f"Say: {FIFTEEN}!"}, True, id="in the prompt"),
        pytest.param({"text": "Say it.", "response": FIFTEEN.upper()}, True, id="in the response, in other letters"),
        pytest.param({"text": FIFTEEN.replace(" ", ", ")}, True, id="with other punctuation"),
        # The benchmark shares 13 words from "one" to "thirteen", and only 12 from "four" to "fifteen".
        pytest.param({"text": "And " + FIFTEEN.split(" fourteen")[0]}, True, id="13 words"),
        pytest.param({"text": "And " + FIFTEEN.split("three ")[1]}, False, id="12 words"),
        pytest.param({"text": "What is 2+2?"}, True, id="the short prompt, whole"),
        pytest.param({"text": "What is 2 + 2 in binary?"}, False, id="the short prompt, in a longer one"),
        pytest.param(
            {
                "text": "Go on.",
                "history": [{"role": "user", "content": FIFTEEN}, {"role": "assistant", "content": "x"}],
            },
            True,
            id="in an earlier turn",
        ),
        pytest.param(
            {"text": "Go on.", "history": [{"role": "system", "content": FIFTEEN}]}, False, id="in the system turn"
        ),
    ],
)
def test_rows_that_overlap_with_a_benchmark_are_left_out(
    database: Database, run: MadeRun, tmp_path: Path, row: dict[str, Any], is_contaminated: bool
) -> None:
    questions = [{"question": FIFTEEN, "choices": ["A", "B"]}, {"turns": [{"content": "what is 2 + 2"}], "n": 3}]
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    with database.write() as session:
        clean = answered(session, run, "clean")
        other = answered(session, run, **row)

    manifest = write(database, run, tmp_path / "out", benchmarks=(str(tmp_path / "bench.jsonl"),))

    assert prompts_in(tmp_path / "out") == ([clean] if is_contaminated else [clean, other])
    assert dropped(tmp_path / "out") == ([(other, "contaminated", "bench.jsonl")] if is_contaminated else [])
    found = manifest.benchmarks[0]
    assert (found.name, found.rows, found.dropped) == ("bench.jsonl", 2, int(is_contaminated))
    assert len(found.sha256) == 64


@SQLITE
def test_a_benchmark_that_cannot_be_read_stops_the_export(database: Database, run: MadeRun, tmp_path: Path) -> None:
    with database.write() as session:
        answered(session, run, "a")
    (tmp_path / "empty.jsonl").write_text('{"n": 1}\n')
    (tmp_path / "bad.jsonl").write_text('{"question": "q"}\nnot JSON\n')

    for name, said in (
        ("empty.jsonl", "contains no text"),
        ("bad.jsonl", "bad.jsonl:2: not JSON"),
        ("no.jsonl", "no file"),
    ):
        with pytest.raises(UsageError, match=said):
            write(database, run, tmp_path / "out", benchmarks=(str(tmp_path / name),))
    assert not (tmp_path / "out").exists()


@SQLITE
def test_of_near_duplicates_the_first_stays(database: Database, run: MadeRun, tmp_path: Path) -> None:
    """One of 40 words differs: 35 of 41 word triples are shared, a similarity of 0.85."""
    text = " ".join(f"word{number}" for number in range(40))
    with database.write() as session:
        first = answered(session, run, text)
        other = answered(session, run, " ".join(f"other{number}" for number in range(40)))
        again = answered(session, run, text.upper().replace("WORD20", "changed"), teacher=1)
        turned = answered(session, run, " ".join(reversed(text.split())))
        short = answered(session, run, "Why?")
        shorter = answered(session, run, "why")
        others = [answered(session, run, text) for text in ("What?", "?!", "!")]

    manifest = write(database, run, tmp_path / "out", near_duplicates=0.7)

    assert prompts_in(tmp_path / "out") == [first, other, turned, short, *others]
    assert dropped(tmp_path / "out") == [
        (again, "near_duplicate", f"prompt {first}"),
        (shorter, "near_duplicate", f"prompt {short}"),
    ]
    assert manifest.dropped == {"near_duplicate": 2}
    write(database, run, tmp_path / "out", near_duplicates=0.97)
    assert again in prompts_in(tmp_path / "out")


def test_a_cap_draws_by_the_runs_seed(database: Database, run: MadeRun, tmp_path: Path) -> None:
    with database.write() as session:
        mine = [answered(session, run, f"a {number}") for number in range(40)]
        few = [answered(session, run, f"b {number}", teacher=1) for number in range(3)]
        cut = answered(session, run, "cut", finish_reason="length")

    manifest = write(database, run, tmp_path / "out", cap=10, finish_reasons=("stop",))
    drawn = set(prompts_in(tmp_path / "out"))

    assert set(few) < drawn
    assert len(drawn & set(mine)) == 10
    assert cut not in drawn
    assert manifest.dropped == {"finish_reason": 1, "cap": 30}
    assert not drawn >= set(mine[:10])  # not simply the first ones
    write(database, run, tmp_path / "out", cap=10, finish_reasons=("stop",))
    assert set(prompts_in(tmp_path / "out")) == drawn
    write(database, run, tmp_path / "out", cap=5, finish_reasons=("stop",))
    assert set(prompts_in(tmp_path / "out")) < drawn
    with database.write() as session:
        session.get_one(Run, run.id).seed = 1
    write(database, run, tmp_path / "out", cap=10, finish_reasons=("stop",))
    assert set(prompts_in(tmp_path / "out")) != drawn


def test_every_assignment_is_exported_or_accounted_for(database: Database, run: MadeRun, tmp_path: Path) -> None:
    """Including failed, missing and unrequested ones; a row matched by several filters counts once, for the first."""
    (tmp_path / "bench.jsonl").write_text(json.dumps({"question": FIFTEEN}))
    with database.write() as session:
        for number in range(4):
            answered(session, run, f"plain {number} {'abcd'[number] * 9}", quality=1.0)
        answered(session, run, "cut", FIFTEEN, finish_reason="length", quality=0.0)
        answered(session, run, "bad", FIFTEEN, quality=0.0)
        answered(session, run, FIFTEEN, quality=1.0)
        answered(session, run, f"Plain {0} AAAAAAAAA!", quality=1.0)
        failed = make_prompt(session, "failed")
        make_assignment(session, run.id, failed, run.teacher_ids[0])
        make_response(session, failed, run.teacher_ids[0], None, failure="refused")
        make_assignment(session, run.id, make_prompt(session, "missing"), run.teacher_ids[0])
    options = ExportOptions(
        formats=("messages",),
        finish_reasons=("stop",),
        min_quality=0.5,
        benchmarks=(str(tmp_path / "bench.jsonl"),),
        near_duplicates=0.9,
        cap=3,
    )

    manifest = export.write(database, run.id, tmp_path / "out", options)

    expected = {"finish_reason": 1, "quality": 1, "contaminated": 1, "near_duplicate": 1, "cap": 1}
    assert manifest.dropped == expected
    assert (manifest.failed, manifest.missing, manifest.exported) == ({"refused": 1}, 1, 3)
    assert manifest.assigned == 10 == 3 + sum(expected.values()) + 1 + 1
    assert Counter(why for _, why, _ in dropped(tmp_path / "out")) == Counter(expected)
    seen = export.preview(database, run.id, options)
    assert (seen.assigned, seen.exported, seen.dropped) == (10, 3, expected)


@SQLITE
def test_an_assignment_that_did_not_go_by_is_no_dataset(database: Database, run: MadeRun, tmp_path: Path) -> None:
    """A prompt was deleted by somebody who bypassed the foreign keys."""
    with database.write() as session:
        answered(session, run, "a")
        answered(session, run, "b")
    with sqlite3.connect(tmp_path / "persyn.db") as raw:
        raw.execute("DELETE FROM prompts WHERE text = 'b'")
    raw.close()

    with pytest.raises(PersynError, match="expected 2 assignments, found 1"):
        write(database, run, tmp_path / "out")

    assert not (tmp_path / "out").exists()


@SQLITE
def test_filters_that_leave_nothing_say_which(database: Database, run: MadeRun, tmp_path: Path) -> None:
    with database.write() as session:
        answered(session, run, "a", finish_reason="length")

    with pytest.raises(UsageError, match="dropped all answered ones: finish_reason 1"):
        write(database, run, tmp_path / "out", finish_reasons=("stop",))

    assert not (tmp_path / "out").exists()


def test_a_prompt_is_on_the_same_side_in_every_run_and_as_a_run_grows(
    database: Database, run: MadeRun, tmp_path: Path
) -> None:
    texts = [f"question {number}" for number in range(60)]
    with database.write() as session:
        for text in texts[:40]:
            answered(session, run, text)
        other = make_run(session, name="other", prompts=0, teachers=("c", "d"))
    splits = {"test": 0.25, "dev": 0.1}

    before = write(database, run, tmp_path / "out", splits=splits)
    test = set(prompts_in(tmp_path / "out", "messages-test.jsonl"))
    train = set(prompts_in(tmp_path / "out", "messages-train.jsonl"))
    with database.write() as session:
        more = [answered(session, run, text) for text in texts[40:]]
        for prompt_id in [*sorted(test)[:3], *sorted(train)[:3]]:
            make_assignment(session, other.id, prompt_id, other.teacher_ids[0])
            make_response(session, prompt_id, other.teacher_ids[0])
        session.get_one(Run, other.id).seed = 7
    write(database, run, tmp_path / "out", splits=splits)
    write(database, other, tmp_path / "other", splits=splits)

    assert before.splits["test"] == len(test) == 40 - len(train) - before.splits["dev"]
    assert 4 <= len(test) <= 16  # 10 expected
    assert 1 <= before.splits["dev"] <= 9  # 4 expected
    assert set(prompts_in(tmp_path / "out", "messages-test.jsonl")) - set(more) == test
    assert set(prompts_in(tmp_path / "other", "messages-test.jsonl")) == set(sorted(test)[:3])
    assert set(prompts_in(tmp_path / "other", "messages-train.jsonl")) == set(sorted(train)[:3])
    write(database, run, tmp_path / "out", splits={"test": 0.35})
    assert test < set(prompts_in(tmp_path / "out", "messages-test.jsonl"))


@SQLITE
def test_a_split_without_a_row_has_no_file(database: Database, run: MadeRun, tmp_path: Path) -> None:
    """JSONL readers reject an empty file."""
    with database.write() as session:
        answered(session, run, "a")

    manifest = write(database, run, tmp_path / "out", splits={"test": 1e-12})

    assert manifest.splits == {"train": 1, "test": 0}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md",
        "dataset_info.json",
        "manifest.json",
        "messages-train.jsonl",
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"splits": {"train": 0.5}}, "contains the remaining rows"),
        ({"splits": {"all": 0.1}}, "cannot be named all: dataset libraries use this name for"),
        ({"splits": {"a": 0.5, "b": 0.5}}, "nothing is left for train"),
        ({"splits": {"test": 0.0}}, "above 0"),
        ({"splits": {"../x": 0.1}}, "consists of lower-case letters"),
        ({"min_quality": float("nan")}, "must be a number"),
        ({"unscored": "drop"}, "only be given with a minimum quality"),
        ({"near_duplicates": 0.4}, "must be 0.5 to 1"),
        ({"cap": 0}, "1 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ExportOptions(**given)


def test_a_server_s_own_finish_reason_is_filtered_by_and_a_mistyped_one_refused(
    database: Database, run: MadeRun, tmp_path: Path
) -> None:
    with database.write() as session:
        kept = answered(session, run, "a", finish_reason="tool_calls")
        dropped_ = answered(session, run, "b", finish_reason="stop")

    write(database, run, tmp_path / "out", finish_reasons=("tool_calls",))

    assert dropped(tmp_path / "out") == [(dropped_, "finish_reason", "stop")]
    assert prompts_in(tmp_path / "out") == [kept]
    with pytest.raises(UsageError, match="unknown finish reason 'done'; known: length, stop, tool_calls, unknown"):
        write(database, run, tmp_path / "out", finish_reasons=("done",))


def test_quality_is_a_column_where_there_is_one(database: Database, run: MadeRun, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    with database.write() as session:
        answered(session, run, "a", quality=0.25)
        answered(session, run, "b")
        assert session.scalars(select(Score.value)).all() == [0.25]

    export.write(database, run.id, tmp_path / "out", ExportOptions(formats=("parquet",)))

    assert pq.read_table(tmp_path / "out" / "dataset.parquet").column("quality").to_pylist() == [0.25, None]
