"""Dataset cards are accurate, readable by `datasets` and the hub, and safe for any names."""

from __future__ import annotations

import html.parser
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import DatasetCard
from sqlalchemy import update

from persyn.dataset import export, markdown
from persyn.dataset.options import ExportOptions
from persyn.db.catalog import Prompt, Run, RunState, Student, Teacher
from persyn.db.connect import Database
from tests.factories import MadeRun, make_assignment, make_prompt, make_response, make_run

# A card is rendered from a manifest alone, so one database suffices.
pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
EVIL = (
    "</script><img src=x onerror=alert(1)> [click](javascript:alert(1)) | a | `b` **c**\n# Big www.evil.example ![x](y)"
)


@pytest.fixture
def run(database: Database) -> MadeRun:
    """Thirty prompts: ten of b, twenty of a, one of which has several turns."""
    with database.write() as session:
        made = make_run(session, prompts=29)
        prompts = [*made.prompt_ids, make_prompt(session, "And now?", history=TURNS)]
        for number, prompt_id in enumerate(prompts):
            teacher_id = made.teacher_ids[number % 3 == 0]
            make_assignment(session, made.id, prompt_id, teacher_id)
            make_response(session, prompt_id, teacher_id, f"Answer {number}.")
    return made


def written(database: Database, run: MadeRun, folder: Path, **options: Any) -> str:
    export.write(database, run.id, folder, ExportOptions(**options))
    return (folder / "README.md").read_text()


LOAD = """
import json, sys
from datasets import load_dataset

found = {}
for name in sys.argv[3:]:
    sets = load_dataset(sys.argv[1], *([name] if name != "-" else []), cache_dir=sys.argv[2])
    found[name] = {split: [rows.num_rows, rows.column_names, rows[rows.num_rows - 1]] for split, rows in sets.items()}
print(json.dumps(found))
"""


def load(folder: Path, *names: str) -> dict[str, Any]:
    """What `datasets` loads from a folder, in a separate process; "-" stands for the default configuration."""
    command = [sys.executable, "-c", LOAD, str(folder), str(folder.parent / "cache"), *names]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_DATASETS_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_datasets_loads_the_folder_with_its_splits(database: Database, run: MadeRun, tmp_path: Path) -> None:
    manifest = export.write(database, run.id, tmp_path / "out", ExportOptions(splits={"test": 0.2}))
    n_train, n_test = manifest.splits["train"], manifest.splits["test"]
    assert n_test > 0

    texts = ("messages", "prompt-completion", "sharegpt", "alpaca")
    found = load(tmp_path / "out", "-", *texts)

    for name in ("-", *texts):
        assert {split: rows[0] for split, rows in found[name].items()} == {"train": n_train, "test": n_test}
    columns, last = found["-"]["train"][1:]
    assert columns[0] == "messages"
    assert last["messages"][-1]["role"] == "assistant"
    columns, last = found["prompt-completion"]["train"][1:]
    assert columns[:2] == ["prompt", "completion"]
    assert last["completion"][0]["content"].startswith("Answer")


def test_datasets_loads_parquet_alone_and_beside_texts(database: Database, run: MadeRun, tmp_path: Path) -> None:
    written(database, run, tmp_path / "out", formats=("parquet",), splits={"test": 0.2})
    text = written(database, run, tmp_path / "all")

    assert load(tmp_path / "out", "-")["-"]["train"][1][:2] == ["prompt_id", "messages"]
    assert 'load_dataset("parquet", data_files={"train": "dataset.parquet"})' in text
    assert "parquet" not in text.split("\n---\n")[0]


def test_ids_that_look_like_dates_are_texts(database: Database, run: MadeRun, tmp_path: Path) -> None:
    """A reader that infers timestamps from the first ids rejects a file with other ids later."""
    with database.write() as session:
        session.execute(update(Prompt).values(source_id="2020-01-31"))
    written(database, run, tmp_path / "out")

    found = load(tmp_path / "out", "messages", "prompt-completion")

    for sets in found.values():
        assert str(sets["train"][2]["source_id"]).startswith("2020-01-31")


def test_the_cards_own_lines_load_the_dataset_in_its_folder(database: Database, run: MadeRun, tmp_path: Path) -> None:
    text = written(database, run, tmp_path / "out", splits={"test": 0.2})
    lines = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)[0].splitlines()
    loads = [f"print(sorted({line}))" if line.startswith("load_dataset(") else line for line in lines]

    done = subprocess.run(
        [sys.executable, "-c", "\n".join(loads).replace("  # with all provenance", "")],
        cwd=tmp_path / "out",
        env={**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
    )

    assert done.stdout.splitlines() == ["['test', 'train']"] * 5, done.stderr


def test_datasets_loads_a_folder_without_splits(database: Database, run: MadeRun, tmp_path: Path) -> None:
    written(database, run, tmp_path / "out", formats=("alpaca", "sharegpt"), finish_reasons=("stop",))

    found = load(tmp_path / "out", "-", "alpaca")

    assert found["-"]["train"][0] == 30
    assert found["-"]["train"][1][:4] == ["conversations", "system", "prompt_id", "id"]
    assert found["alpaca"]["train"][2]["history"] == [["Hi", "Hello."]]


def test_the_front_matter_is_the_hubs(database: Database, run: MadeRun, tmp_path: Path) -> None:
    written(database, run, tmp_path / "out", formats=("messages", "sharegpt", "parquet"))

    data = DatasetCard.load(tmp_path / "out" / "README.md").data

    assert data.pretty_name == "run"
    assert data.size_categories == ["n<1K"]
    assert data.configs == [
        {"config_name": "messages", "default": True, "data_files": [{"split": "train", "path": "messages.jsonl"}]},
        {"config_name": "sharegpt", "data_files": [{"split": "train", "path": "sharegpt.jsonl"}]},
    ]


def test_teachers_stand_with_their_licences_and_shares(database: Database, run: MadeRun, tmp_path: Path) -> None:
    with database.write() as session:
        session.execute(update(Teacher).where(Teacher.name == "a").values(license="Apache-2.0", model="/data/a-7b"))

    text = written(database, run, tmp_path / "out")

    assert "| a | a-7b | Apache-2.0 | 20 | 66.7% |" in text
    assert "| b | b | not stated | 10 | 33.3% |" in text
    assert "**Warning:** no licence is stated for b." in text
    assert "/data" not in text
    with database.write() as session:
        session.execute(update(Teacher).where(Teacher.name == "b").values(license="MIT"))
    assert "Warning" not in written(database, run, tmp_path / "out")


def test_the_card_counts_what_was_left_out_and_has_the_command(
    database: Database, run: MadeRun, tmp_path: Path
) -> None:
    benchmark = tmp_path / "my\n```\nbench.jsonl"
    benchmark.write_text('{"q": "And now?"}')
    options = {"formats": ("messages",), "splits": {"test": 0.2}, "benchmarks": (str(benchmark),), "cap": 9}

    text = written(database, run, tmp_path / "out", **options)

    assert "| prompts assigned to a teacher | 30 |" in text
    assert "| left out: overlap with a benchmark (13 consecutive words, or the same prompt) | -1 |" in text
    assert "| left out: above the limit of 9 rows per teacher | -11 |" in text
    assert "| **rows** | 18 |" in text
    block = re.search(r"^(`{3,})sh\n(.*?)\n\1$", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    assert shlex.split(block[2]) == [
        *("persyn", "export", "run", "--format", "messages", "--split", "test=0.2"),
        *("--decontaminate", "my\n```\nbench.jsonl", "--cap", "9"),
    ]


def test_the_snippets_name_files_and_entries_that_are_there(database: Database, run: MadeRun, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    text = written(database, run, folder, splits={"test": 0.2})

    llama_factory, axolotl = (yaml.safe_load(each) for each in re.findall(r"```yaml\n(.*?)\n```", text, re.DOTALL))

    entries = json.loads((folder / "dataset_info.json").read_bytes())
    assert {llama_factory["dataset"], llama_factory["eval_dataset"]} == {"run_messages", "run_messages_test"}
    assert {"run_messages", "run_messages_test", "run_alpaca_test"} <= set(entries)
    for split, (dataset,) in (("train", axolotl["datasets"]), ("test", axolotl["test_datasets"])):
        assert dataset["path"] == f"messages-{split}.jsonl"
        assert (folder / dataset["path"]).exists()
        assert (dataset["type"], dataset["field_messages"]) == ("chat_template", "messages")


def test_a_run_that_is_not_done_says_so(database: Database, run: MadeRun, tmp_path: Path) -> None:
    assert "not finished" in written(database, run, tmp_path / "out")
    with database.write() as session:
        session.get_one(Run, run.id).state = RunState.DONE
        session.execute(update(Run).values(finished_at=session.get_one(Run, run.id).created_at))
    assert "not finished" not in written(database, run, tmp_path / "out")


class Tags(html.parser.HTMLParser):
    """Collects what a browser would parse as a tag."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)


def test_hostile_names_are_shown_and_do_nothing(database: Database, run: MadeRun, tmp_path: Path) -> None:
    with database.write() as session:
        session.execute(update(Teacher).values(license=EVIL, model=EVIL, revision=EVIL))
        session.execute(update(Student).values(name=EVIL, model=EVIL))
        for prompt_id in run.prompt_ids[:2]:
            make_response(session, prompt_id, run.teacher_ids[0], sample=9, engine=EVIL)

    text = written(database, run, tmp_path / "out")

    tags = Tags()
    tags.feed(text)
    assert tags.found == []
    assert not re.search(r"(?<!\\)[\[\]`*|]|[<>]", markdown.text(EVIL))
    assert "onerror" in text
    assert "\n# Big" not in text
    assert {
        line.replace(r"\|", "").count("|") for line in text.splitlines() if "onerror" in line and line[0] == "|"
    } == {
        6,  # five cells per teacher
        3,  # two of provenance
    }
    assert DatasetCard.load(tmp_path / "out" / "README.md").data.pretty_name == "run"
