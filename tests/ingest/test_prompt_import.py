"""Imports of prompts are counted exactly and atomic, and the draw of calibration prompts is seeded."""

from __future__ import annotations

import json
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from persyn.config import PromptsTable
from persyn.db.catalog import Prompt, Role, RunPrompt
from persyn.db.connect import Database
from persyn.errors import UsageError
from persyn.ingest import prompt_import
from persyn.ingest.imports import ImportReport
from tests.factories import MadeRun, make_run


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records))
    return path


def numbered(path: Path, n: int, *, start: int = 0) -> Path:
    return write(path, *({"prompt": f"{number} + 1?"} for number in range(start, start + n)))


def stored(database: Database) -> int:
    with database.read() as session:
        return session.scalars(select(func.count(Prompt.id))).one()


def roles(session: Session, run: MadeRun) -> dict[str, Role]:
    found = session.execute(select(Prompt.text, RunPrompt.role).join(RunPrompt).where(RunPrompt.run_id == run.id))
    return {text: role for text, role in found}


def test_a_prompt_is_stored_with_everything_its_row_said(database: Database, tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße\u2028?"}]
    path = write(tmp_path / "p.jsonl", {"messages": turns, "answer": 4, "id": 7, "level": {"of": [1, None]}})

    with database.write() as session:
        report = prompt_import.import_prompts(session, [path])

    assert report == ImportReport(
        rows=1, new=1, replaced=0, duplicates=0, conflicts=0, bad=0, new_scores=0, first_bad=()
    )
    with database.read() as session:
        prompt = session.scalars(select(Prompt)).one()
        assert (prompt.text, prompt.history) == ("Grüße\u2028?", turns[:1])
        assert (prompt.answer, prompt.source, prompt.source_id) == ("4", "p.jsonl", "7")
        assert prompt.meta == {"level": {"of": [1, None]}}


def test_duplicates_are_counted_within_files_across_files_and_in_the_store(database: Database, tmp_path: Path) -> None:
    first = numbered(tmp_path / "a.jsonl", 2_500)
    second = numbered(tmp_path / "b.jsonl", 1_500, start=2_000)
    again = write(tmp_path / "c.jsonl", *[{"prompt": "once?"}] * 3)

    with database.write() as session:
        one = prompt_import.import_prompts(session, [first])
    with database.write() as session:
        two = prompt_import.import_prompts(session, [second, again])
    with database.write() as session:
        three = prompt_import.import_prompts(session, [second, again])

    assert (one.rows, one.new, one.duplicates) == (2_500, 2_500, 0)
    assert (two.rows, two.new, two.duplicates) == (1_503, 1_001, 502)
    assert (three.rows, three.new, three.duplicates) == (1_503, 0, 1_503)
    assert stored(database) == 3_501


def test_two_imports_at_once_neither_deadlock_nor_count_a_prompt_twice(database: Database, tmp_path: Path) -> None:
    """In opposite orders, each would wait for rows inserted by the other."""
    forwards = [{"prompt": f"{number} + 1?"} for number in range(3_000)]
    paths = [write(tmp_path / "a.jsonl", *forwards), write(tmp_path / "b.jsonl", *reversed(forwards))]
    start = Barrier(2)

    def work(path: Path) -> int:
        start.wait()
        with database.write() as session:
            return prompt_import.import_prompts(session, [path]).new

    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(work, paths)) == 3_000
    assert stored(database) == 3_000


def test_an_answer_that_is_missing_is_added_and_one_that_differs_is_counted(database: Database, tmp_path: Path) -> None:
    without = write(tmp_path / "a.jsonl", {"prompt": "x?"}, {"prompt": "y?"}, {"prompt": "y?", "answer": "1"})
    later = write(tmp_path / "b.jsonl", {"prompt": "x?", "answer": "2"}, {"prompt": "y?", "answer": "3"})

    with database.write() as session:
        first = prompt_import.import_prompts(session, [without])
        second = prompt_import.import_prompts(session, [later])

    assert (first.duplicates, first.conflicts) == (1, 0)
    assert (second.duplicates, second.conflicts) == (2, 1)
    with database.read() as session:
        answers = {text: answer for text, answer in session.execute(select(Prompt.text, Prompt.answer))}
    assert answers == {"x?": "2", "y?": "1"}


def test_a_bad_row_stops_the_import_and_leaves_nothing(database: Database, tmp_path: Path) -> None:
    good = numbered(tmp_path / "a.jsonl", 2_000)
    mixed = write(tmp_path / "b.jsonl", {"prompt": "fine"}, "nonsense\n", {"prompt": ""}, {"prompt": "fine too"})

    with pytest.raises(UsageError) as caught, database.write() as session:
        prompt_import.import_prompts(session, [good, mixed])

    first, second = str(caught.value).split("; b.jsonl:3: ")
    assert first.startswith(
        "2 of 2,004 rows cannot be imported, so nothing was imported; correct them, or use --on-error skip: "
        "b.jsonl:2: not JSON"
    )
    assert second == "empty prompt"
    assert stored(database) == 0


def test_a_stopped_import_lists_at_most_twenty_bad_rows(database: Database, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *["nonsense\n"] * 2_500)

    with (
        pytest.raises(UsageError, match="at least 1,000 of the first 1,000 rows") as caught,
        database.write() as session,
    ):
        prompt_import.import_prompts(session, [path])

    lines = ", ".join(map(str, range(1, 21)))
    assert f"correct them: a.jsonl:{lines}: not JSON" in str(caught.value)


def test_bad_rows_that_are_skipped_are_counted(database: Database, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *["nonsense\n"] * 30, {"prompt": "fine"}, {"prompt": "fine"})

    with database.write() as session:
        report = prompt_import.import_prompts(session, [path], on_error="skip")

    assert (report.rows, report.new, report.duplicates, report.bad) == (32, 1, 1, 30)
    assert [bad.line for bad in report.first_bad] == list(range(1, 21))
    assert stored(database) == 1


def test_what_to_do_about_a_file_in_latin_1_is_said_once(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"prompt": "fine"}\n{"prompt": "café"}\n{"prompt": "Zoë"}\n{"prompt": "née"}\n'.encode("latin-1"))
    advice = "; convert Latin-1 or Windows-1252 text with iconv -f WINDOWS-1252 -t UTF-8"

    with pytest.raises(UsageError) as caught, database.write() as session:
        prompt_import.import_prompts(session, [path])
    assert str(caught.value).endswith(
        f"a.jsonl:2: not UTF-8 (byte 0xE9 at position 16 of the row){advice}; "
        "a.jsonl:3: not UTF-8 (byte 0xEB at position 15 of the row); "
        "a.jsonl:4: not UTF-8 (byte 0xE9 at position 14 of the row)"
    )

    with database.write() as session:
        report = prompt_import.import_prompts(session, [path], on_error="skip")
    assert [str(bad).endswith(advice) for bad in report.first_bad] == [True, False, False]


def refusal_of_run(database: Database, *paths: Path) -> str:
    prompts = PromptsTable(file=[str(path) for path in paths])
    with pytest.raises(UsageError) as caught, database.write() as session:
        prompt_import.add_to_run(session, make_run(session, prompts=0).id, prompts)
    return str(caught.value)


def test_a_run_names_the_import_that_takes_other_fields_and_the_source_to_set(
    database: Database, tmp_path: Path
) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "fine"}, {"question": "x?"}, {"question": "y?"})
    assert refusal_of_run(database, path) == (
        "[prompts] file: 2 of 3 rows cannot be imported, so nothing was imported; correct them, or import the file "
        "with 'persyn prompts import FILE --map prompt=question' (or --on-error skip) and set "
        'source = "p.jsonl" in [prompts] instead of file: '
        "p.jsonl:2, 3: neither 'prompt' nor 'messages'; the row has 'question'"
    )
    good = numbered(tmp_path / "a.jsonl", 1)
    assert 'and set source = ["a.jsonl", "p.jsonl"] in [prompts]' in refusal_of_run(database, good, path)

    broken = write(tmp_path / "b.jsonl", {"prompt": "fine"}, "nonsense\n")
    assert "'persyn prompts import FILE --on-error skip' and set" in refusal_of_run(database, broken)
    assert "; correct them: b.jsonl:1: not JSON" in refusal_of_run(database, write(broken, "nonsense\n"))


@pytest.mark.parametrize(
    ("name", "said"),
    [("none.jsonl", "there is no file"), ("", "is a folder"), ("p.txt", "cannot tell the"), ("e.csv", "e.csv has no")],
)
def test_a_prompts_file_that_cannot_be_read_is_named_with_its_key(
    database: Database, tmp_path: Path, name: str, said: str
) -> None:
    (tmp_path / "e.csv").write_text("prompt\n")
    refusal = refusal_of_run(database, tmp_path / name)
    assert refusal.startswith("[prompts] file: ")
    assert said in refusal


def test_rows_that_an_open_quote_swallows_are_counted(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('prompt,answer\na?,1\n"b?,2\n' + "c?,3\n" * 40)

    with database.write() as session:
        report = prompt_import.import_prompts(session, [path], on_error="skip")

    assert (report.rows, report.new, report.bad) == (42, 1, 41)
    assert "lines 3 to 43 (41 lines) cannot be read" in str(report.first_bad[0])


def test_prompts_that_share_an_id_are_kept_and_told_of(database: Database, tmp_path: Path) -> None:
    shared = [{"prompt": f"{number}?", "id": number % 3} for number in range(4)]
    path = write(tmp_path / "p.jsonl", *shared, shared[1])
    other = write(tmp_path / "other.jsonl", {"prompt": "x?", "id": 0}, {"prompt": "y?"}, {"prompt": "z?"})

    with database.write() as session:
        report = prompt_import.import_prompts(session, [path, other])

    assert (report.new, report.repeated_ids) == (7, (("p.jsonl", 1, "0"),))


def test_a_file_with_other_names_is_imported_by_them(database: Database, tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"question": "2+2?", "gold": 4})

    with database.write() as session:
        prompt_import.import_prompts(session, [path], names={"prompt": "question", "answer": "gold"})
        assert session.execute(select(Prompt.text, Prompt.answer)).one() == ("2+2?", "4")


@pytest.mark.parametrize(("content", "expected"), [("", "has no rows"), ("nonsense\n" * 2, "all 2 rows of")])
def test_a_file_without_a_prompt_is_refused(database: Database, tmp_path: Path, content: str, expected: str) -> None:
    good, path = numbered(tmp_path / "a.jsonl", 3), write(tmp_path / "b.jsonl", content)

    with pytest.raises(UsageError, match=expected), database.write() as session:
        prompt_import.import_prompts(session, [good, path], on_error="skip")

    assert stored(database) == 0


def test_progress_tells_the_rows_read(database: Database, tmp_path: Path) -> None:
    seen: list[int] = []

    with database.write() as session:
        prompt_import.import_prompts(session, [numbered(tmp_path / "a.jsonl", 2_300)], progress=seen.append)

    assert seen == [1_000, 2_000, 2_300]


def test_a_run_gets_every_prompt_of_its_files_once(database: Database, tmp_path: Path) -> None:
    known, path = numbered(tmp_path / "known.jsonl", 5), numbered(tmp_path / "p.jsonl", 5, start=3)
    seen: list[int] = []

    with database.write() as session:
        run, other = make_run(session, prompts=0), make_run(session, name="other", prompts=3)
        prompt_import.import_prompts(session, [known])
        for _ in range(2):
            prompt_import.add_to_run(session, run.id, PromptsTable(file=[str(path), str(path)]), progress=seen.append)
        found, others = roles(session, run), roles(session, other)

    assert found == {f"{number} + 1?": Role.TARGET for number in range(3, 8)}
    assert len(others) == 3
    assert seen == [5, 10, 5, 10]


def test_the_draw_depends_on_the_seed_and_the_prompts_alone(database: Database, tmp_path: Path) -> None:
    n = 200
    forwards = numbered(tmp_path / "a.jsonl", n)
    backwards = write(tmp_path / "b.jsonl", *({"prompt": f"{number} + 1?"} for number in reversed(range(n))))
    drawn = {}
    with database.write() as session:
        for name, path, seed in (("one", forwards, 1), ("two", backwards, 1), ("three", forwards, 2)):
            run = make_run(session, name=name, prompts=7)
            session.execute(delete(RunPrompt).where(RunPrompt.run_id == run.id))
            prompt_import.add_to_run(session, run.id, PromptsTable(file=str(path)))
            prompt_import.draw(session, run.id, calibration=40, holdout=0.25, seed=seed)
            drawn[name] = roles(session, run)

    counts = [list(drawn["one"].values()).count(role) for role in (Role.CALIBRATION, Role.HOLDOUT, Role.TARGET)]
    assert counts == [30, 10, 160]
    assert drawn["one"] == drawn["two"]
    assert drawn["one"] != drawn["three"]


def test_every_prompt_is_as_likely_to_be_drawn(database: Database) -> None:
    with database.write() as session:
        run = make_run(session, prompts=20)
        times = dict.fromkeys(roles(session, run), 0)
        for seed in range(100):
            session.execute(update(RunPrompt).values(role=Role.TARGET))
            prompt_import.draw(session, run.id, calibration=5, holdout=0, seed=seed)
            for prompt, role in roles(session, run).items():
                times[prompt] += role is Role.CALIBRATION

    # 100 draws of 5 from 20: mean 25, standard deviation 4.3.
    assert sum(times.values()) == 500
    assert all(8 <= count <= 42 for count in times.values())


def test_no_more_prompts_can_be_drawn_than_there_are(database: Database) -> None:
    with database.write() as session:
        run = make_run(session, prompts=10)
        prompt_import.draw(session, run.id, calibration=10, holdout=0.1, seed=0)
        with pytest.raises(UsageError, match="11 calibration prompts cannot be drawn from 10 prompts"):
            prompt_import.draw(session, run.id, calibration=11, holdout=0.1, seed=0)


def test_all_prompts_can_be_answered_by_all_teachers(database: Database) -> None:
    with database.write() as session:
        run = make_run(session, prompts=10)
        prompt_import.draw(session, run.id, calibration=None, holdout=0, seed=0)
        assert set(roles(session, run).values()) == {Role.CALIBRATION}


def test_a_run_takes_the_prompts_that_were_imported_from_a_file(database: Database, tmp_path: Path) -> None:
    mine, other = numbered(tmp_path / "mine.jsonl", 3), numbered(tmp_path / "other.jsonl", 3, start=3)
    with database.write() as session:
        prompt_import.import_prompts(session, [mine, other])
        run = make_run(session, prompts=0)
        prompt_import.add_to_run(session, run.id, PromptsTable(source="mine.jsonl"))
        assert roles(session, run) == {f"{number} + 1?": Role.TARGET for number in range(3)}
        with pytest.raises(UsageError, match=r"no prompt was imported from a file named 'mine'"):
            prompt_import.add_to_run(session, run.id, PromptsTable(source="mine"))


def test_the_memory_of_an_import_does_not_grow_with_the_file(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    with path.open("w") as file:
        file.writelines(json.dumps({"prompt": f"{number} {'x' * 2_000}"}) + "\n" for number in range(8_000))

    with database.write() as session:
        run = make_run(session, prompts=0)
        tracemalloc.start()
        prompt_import.add_to_run(session, run.id, PromptsTable(file=str(path)))
        prompt_import.draw(session, run.id, calibration=10, holdout=0.1, seed=0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

    assert peak < path.stat().st_size / 2
