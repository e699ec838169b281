"""A teacher's reasoning is in a field, in the text, or nowhere, in every format, and nothing of it is lost silently."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from persyn.dataset import export, formats
from persyn.dataset.manifest import Manifest
from persyn.dataset.options import ExportOptions
from persyn.db.connect import Database
from tests.factories import MadeRun, make_assignment, make_response, make_run

TEXTS = ("messages", "prompt-completion", "sharegpt", "alpaca")
WHY = "17 * 3 is 51."
ANSWER = "51"
WHOLE = "<think>\n17 * 3 is 51.\n</think>\n\n51"

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
def run(database: Database) -> MadeRun:
    """Three prompts; b reasoned about the second one, and never finished its reasoning about the third."""
    with database.write() as session:
        made = make_run(session, prompts=3)
        first, second, third = made.prompt_ids
        a, b = made.teacher_ids
        for prompt, teacher in ((first, a), (second, b), (third, b)):
            make_assignment(session, made.id, prompt, teacher)
        make_response(session, first, a, "A.")
        make_response(session, second, b, ANSWER, reasoning=WHY, reasoning_tokens=9, response_tokens=10)
        make_response(session, third, b, None, failure="unfinished_reasoning", reasoning="So 17", reasoning_tokens=4)
    return made


def write(database: Database, run: MadeRun, folder: Path, **options: Any) -> Manifest:
    return export.write(database, run.id, folder, ExportOptions(**options))


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / f"{name.replace('-', '_')}.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def answers(folder: Path) -> dict[str, list[Any]]:
    """The part of each row that is learned, by format."""
    return {
        "messages": [row["messages"][-1] for row in rows(folder, "messages")],
        "prompt-completion": [row["completion"][0] for row in rows(folder, "prompt-completion")],
        "sharegpt": [row["conversations"][-1]["value"] for row in rows(folder, "sharegpt")],
        "alpaca": [row["output"] for row in rows(folder, "alpaca")],
    }


def test_reasoning_has_a_field_where_there_is_one_and_is_inlined_elsewhere(
    database: Database, run: MadeRun, tmp_path: Path
) -> None:
    """A row without reasoning has the same keys, since readers infer types from the first rows."""
    manifest = write(database, run, tmp_path / "out")

    field = [
        {"role": "assistant", "content": "A.", "reasoning_content": ""},
        {"role": "assistant", "content": ANSWER, "reasoning_content": WHY},
    ]
    expected = {"messages": field, "prompt-completion": field, "sharegpt": ["A.", WHOLE], "alpaca": ["A.", WHOLE]}
    assert answers(tmp_path / "out") == expected
    assert (manifest.exported, manifest.reasoning, manifest.failed) == (2, 1, {"unfinished_reasoning": 1})


def test_inline_reasoning_precedes_the_answer_in_every_format(database: Database, run: MadeRun, tmp_path: Path) -> None:
    write(database, run, tmp_path / "out", reasoning="inline")

    turns = [{"role": "assistant", "content": text} for text in ("A.", WHOLE)]
    expected = {"messages": turns, "prompt-completion": turns, "sharegpt": ["A.", WHOLE], "alpaca": ["A.", WHOLE]}
    assert answers(tmp_path / "out") == expected


def test_dropped_reasoning_is_nowhere(database: Database, run: MadeRun, tmp_path: Path) -> None:
    write(database, run, tmp_path / "out", reasoning="drop")

    turns = [{"role": "assistant", "content": text} for text in ("A.", ANSWER)]
    expected = {"messages": turns, "prompt-completion": turns, "sharegpt": ["A.", ANSWER], "alpaca": ["A.", ANSWER]}
    assert answers(tmp_path / "out") == expected
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert WHY.encode() not in written


@pytest.mark.parametrize(
    ("reasoning", "turn", "column"),
    [
        ("field", {"role": "assistant", "content": ANSWER, "reasoning_content": WHY}, WHY),
        ("inline", {"role": "assistant", "content": WHOLE}, WHY),
        ("drop", {"role": "assistant", "content": ANSWER}, None),
    ],
)
def test_parquet_has_columns_of_reasoning_besides(
    database: Database, run: MadeRun, tmp_path: Path, reasoning: str, turn: dict[str, str], column: str | None
) -> None:
    write(database, run, tmp_path / "out", formats=["parquet"], reasoning=reasoning)

    plain, row = pq.read_table(tmp_path / "out" / "dataset.parquet").to_pylist()
    assert row["messages"][-1] == turn
    assert (row["reasoning"], row["reasoning_tokens"], row["response_tokens"]) == (column, 9, 10)
    assert (plain["reasoning"], plain["reasoning_tokens"]) == (None, None)


@pytest.mark.parametrize("reasoning", ["field", "inline", "drop"])
def test_the_python_interface_has_the_rows_of_the_parquet_file(
    database: Database, run: MadeRun, tmp_path: Path, reasoning: Any
) -> None:
    options = ExportOptions(formats=("parquet",), reasoning=reasoning)
    export.write(database, run.id, tmp_path / "out", options)
    with database.read() as session:
        table = formats.COLUMNS.table(example for _, example in export.examples(session, run.id, options))

    assert table.equals(pq.read_table(tmp_path / "out" / "dataset.parquet"))


def test_a_run_without_reasoning_is_exported_as_before(database: Database, tmp_path: Path) -> None:
    """All three options give the same files, even for an answer that looks like reasoning."""
    with database.write() as session:
        made = make_run(session, prompts=1)
        make_assignment(session, made.id, made.prompt_ids[0], made.teacher_ids[0])
        make_response(session, made.prompt_ids[0], made.teacher_ids[0], WHOLE)

    for reasoning in ("field", "inline", "drop"):
        manifest = write(database, made, tmp_path / reasoning, reasoning=reasoning)
        assert (manifest.reasoning, manifest.ambiguous) == (None, 0)
        assert answers(tmp_path / reasoning)["messages"] == [{"role": "assistant", "content": WHOLE}]
        assert "run_messages" in json.loads((tmp_path / reasoning / "dataset_info.json").read_bytes())
        assert "reasoned" not in (tmp_path / reasoning / "README.md").read_text()


def test_whether_rows_have_the_field_does_not_depend_on_filters_and_splits(
    database: Database, run: MadeRun, tmp_path: Path
) -> None:
    """So that all files of a run's datasets have the same keys."""
    with database.write() as session:
        session.connection().exec_driver_sql(
            "UPDATE responses SET finish_reason = 'length' WHERE reasoning IS NOT NULL"
        )

    manifest = write(database, run, tmp_path / "out", finish_reasons=["stop"], splits={"test": 0.5})

    assert (manifest.exported, manifest.reasoning) == (1, 0)
    [file] = [file for file in manifest.files if file.format == "messages"]
    [row] = [json.loads(line) for line in (tmp_path / "out" / file.name).read_bytes().splitlines()]
    assert row["messages"][-1] == {"role": "assistant", "content": "A.", "reasoning_content": ""}


def test_a_text_with_markers_of_its_own_is_counted_where_it_could_be_misread(
    database: Database, run: MadeRun, tmp_path: Path
) -> None:
    """Readers split an inlined text at a marker; with a field of its own, nothing is ambiguous."""
    with database.write() as session:
        session.connection().exec_driver_sql("UPDATE responses SET text = '</think> is a tag' WHERE text = 'A.'")

    assert write(database, run, tmp_path / "out").ambiguous == 1
    assert write(database, run, tmp_path / "out", reasoning="inline", formats=["messages"]).ambiguous == 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**1 responses contain such a marker themselves**" in card
    assert write(database, run, tmp_path / "out", formats=["messages", "parquet"]).ambiguous == 0
    assert write(database, run, tmp_path / "out", reasoning="drop").ambiguous == 0


def test_llama_factory_is_offered_no_file_whose_reasoning_it_would_ignore(
    database: Database, run: MadeRun, tmp_path: Path
) -> None:
    """It reads `content` alone."""
    for reasoning, expected in (
        ("field", {"run_sharegpt", "run_alpaca"}),
        ("inline", {"run_messages", "run_sharegpt", "run_alpaca"}),
    ):
        write(database, run, tmp_path / "out", reasoning=reasoning)
        assert set(json.loads((tmp_path / "out" / "dataset_info.json").read_bytes())) == expected
        assert (
            f"dataset: {min(expected & {'run_messages', 'run_sharegpt'})}"
            in (tmp_path / "out" / "README.md").read_text()
        )


def test_reasoning_that_quotes_a_benchmark_is_contaminated_unless_it_is_dropped(
    database: Database, run: MadeRun, tmp_path: Path
) -> None:
    quoted = "one two three four five six seven eight nine ten eleven twelve thirteen"
    (tmp_path / "benchmark.jsonl").write_text(json.dumps({"question": quoted}))
    with database.write() as session:
        session.connection().exec_driver_sql(f"UPDATE responses SET reasoning = '{quoted}' WHERE text = '{ANSWER}'")

    benchmarks = [str(tmp_path / "benchmark.jsonl")]
    assert write(database, run, tmp_path / "out", benchmarks=benchmarks).dropped == {"contaminated": 1}
    assert write(database, run, tmp_path / "out", benchmarks=benchmarks, reasoning="drop").dropped == {
        "contaminated": 0
    }


def test_students_get_the_reasoning_with_the_rows(database: Database, run: MadeRun) -> None:
    with database.read() as session:
        found = list(export.training_rows(session, run.id, ExportOptions()))
    assert [(row.response, row.reasoning) for row in found] == [("A.", None), (ANSWER, WHY)]


LOAD = """
import json, sys
from datasets import load_dataset

found = {}
for name in sys.argv[3:]:
    rows = load_dataset(sys.argv[1], name, cache_dir=sys.argv[2], split="train")
    found[name] = rows[len(rows) - 1]
print(json.dumps(found))
"""


def test_datasets_loads_the_field_as_the_card_declares_it(database: Database, run: MadeRun, tmp_path: Path) -> None:
    write(database, run, tmp_path / "out")

    command = [sys.executable, "-c", LOAD, str(tmp_path / "out"), str(tmp_path / "cache"), *TEXTS]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_DATASETS_OFFLINE": "1"})

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    turn = {"role": "assistant", "content": ANSWER, "reasoning_content": WHY}
    assert (found["messages"]["messages"][-1], found["prompt-completion"]["completion"]) == (turn, [turn])
    assert found["prompt-completion"]["prompt"] == [{"role": "user", "content": "run: prompt 1?"}]
    card = (tmp_path / "out" / "README.md").read_text()
    info = {each["config_name"]: each for each in yaml.safe_load(card.split("---")[1])["dataset_info"]}
    keys = {"role", "content", "reasoning_content"}
    assert {each["name"] for each in info["messages"]["features"][0]["list"]} == keys
    assert "In 1 rows, the teacher reasoned before it answered." in card
