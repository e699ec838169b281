"""Exports have exact texts in every format, consistent counts, and replace a folder atomically."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from persyn.dataset import export, parquet_file
from persyn.dataset.manifest import Manifest
from persyn.dataset.options import ExportOptions
from persyn.db import bulk
from persyn.db.catalog import Prompt
from persyn.db.connect import Database
from persyn.db.results import Assignment, Origin, Response
from persyn.errors import UsageError
from tests.factories import MadeRun, digest, make_assignment, make_prompt, make_response, make_run

ALL = ("messages", "prompt-completion", "sharegpt", "alpaca", "parquet")
HOSTILE = 'line\u2028sep\u2029 \x01\x1f\x7f "quoted" \\u0000 \\ \t\r\n </s> 😀 \ufeff{"a": [1]}\n'
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
]


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def answer(session: Session, run: MadeRun, prompt_id: int, teacher: int, text: str | None, **columns: Any) -> None:
    """Assign a prompt to the run's teacher in that position, with a response."""
    make_assignment(session, run.id, prompt_id, run.teacher_ids[teacher], margin=0.5)
    make_response(session, prompt_id, run.teacher_ids[teacher], text, **columns)


@pytest.fixture
def run(database: Database) -> MadeRun:
    """Two plain prompts answered by a and b, and one of several turns with hostile texts, answered by a."""
    with database.write() as session:
        made = make_run(session, prompts=2)
        first, second = made.prompt_ids
        third = make_prompt(
            session, HOSTILE, history=TURNS, answer="4", source_id="q3", meta={"z": 1, "a": [HOSTILE, None]}
        )
        answer(session, made, second, 1, "B.", finish_reason="length")
        answer(session, made, third, 0, HOSTILE)
        answer(session, made, first, 0, "A.")
        # Responses of other teachers and other samples are not part of it.
        make_response(session, first, made.teacher_ids[1], "not assigned")
        make_response(session, first, made.teacher_ids[0], "second sample", sample=1)
    return MadeRun(made.id, made.teacher_ids, [first, second, third])


def origin(run: MadeRun) -> dict[str, Any]:
    """The origin of the first row."""
    return {
        "id": digest("run: prompt 0?"),
        "domain": "",
        "prompt_id": run.prompt_ids[0],
        "sample": 0,
        "source": "prompts.jsonl",
        "source_id": "",
        "teacher": "a",
        "teacher_fingerprint": digest("teacher a"),
        "finish_reason": "stop",
        "reason": "router",
    }


def write(database: Database, run: MadeRun, folder: Path, *formats: str) -> Manifest:
    return export.write(database, run.id, folder, ExportOptions(formats=formats))


def test_messages_are_the_conversation_and_its_origin(database: Database, run: MadeRun, tmp_path: Path) -> None:
    write(database, run, tmp_path / "out", "messages")

    first, second, third = lines(tmp_path / "out" / "messages.jsonl")
    assert first == {
        "messages": [{"role": "user", "content": "run: prompt 0?"}, {"role": "assistant", "content": "A."}],
        **origin(run),
    }
    assert (second["teacher"], second["finish_reason"]) == ("b", "length")
    hostile = [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE}]
    assert third["messages"] == [*TURNS, *hostile]
    assert third["source_id"] == "q3"


def test_prompt_and_completion_are_what_trl_trains_on_the_response_alone(
    database: Database, run: MadeRun, tmp_path: Path
) -> None:
    write(database, run, tmp_path / "out", "prompt-completion")

    first, _, third = lines(tmp_path / "out" / "prompt_completion.jsonl")
    assert first["prompt"] == [{"role": "user", "content": "run: prompt 0?"}]
    assert first["completion"] == [{"role": "assistant", "content": "A."}]
    assert first["teacher"] == "a"
    assert third["prompt"] == [*TURNS, {"role": "user", "content": HOSTILE}]
    assert third["completion"] == [{"role": "assistant", "content": HOSTILE}]


def test_sharegpt_has_the_system_turn_apart(database: Database, run: MadeRun, tmp_path: Path) -> None:
    write(database, run, tmp_path / "out", "sharegpt")

    first, _, third = lines(tmp_path / "out" / "sharegpt.jsonl")
    assert first == {
        "conversations": [{"from": "human", "value": "run: prompt 0?"}, {"from": "gpt", "value": "A."}],
        "system": "",
        **origin(run),
    }
    assert third["system"] == "Be brief."
    assert third["conversations"] == [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello."},
        {"from": "human", "value": HOSTILE},
        {"from": "gpt", "value": HOSTILE},
    ]


def test_alpaca_has_earlier_turns_as_pairs(database: Database, run: MadeRun, tmp_path: Path) -> None:
    write(database, run, tmp_path / "out", "alpaca")

    first, _, third = lines(tmp_path / "out" / "alpaca.jsonl")
    plain = {"instruction": "run: prompt 0?", "input": "", "output": "A.", "system": "", "history": []}
    assert first == plain | origin(run)
    assert third | origin(run) == {
        "instruction": HOSTILE,
        "input": "",
        "output": HOSTILE,
        "system": "Be brief.",
        "history": [["Hi", "Hello."]],
        **origin(run),
    }


@pytest.mark.parametrize("name", ALL)
def test_every_format_has_the_rows_id_and_its_domain(
    database: Database, run: MadeRun, tmp_path: Path, name: str
) -> None:
    """A prompt without an id in its file has its content hash as id."""
    with database.write() as session:
        answer(session, run, make_prompt(session, "sum?", source_id="q9", meta={"domain": "sums"}), 0, "9")
        answer(session, run, make_prompt(session, "odd?", meta={"domain": ["a", 1]}), 0, "yes")

    manifest = write(database, run, tmp_path / "out", name)

    [file] = manifest.files
    path = tmp_path / "out" / file.name
    found = pq.read_table(path).to_pylist() if name == "parquet" else lines(path)
    by_id = {row["id"]: row["domain"] for row in found}
    assert by_id == {
        digest("run: prompt 0?"): "",
        digest("run: prompt 1?"): "",
        "q3": "",
        "q9": "sums",
        digest("odd?"): '["a",1]',
    }
    assert manifest.domains == {"": 3, "sums": 1, '["a",1]': 1}


def test_parquet_has_all_provenance(database: Database, run: MadeRun, tmp_path: Path) -> None:
    write(database, run, tmp_path / "out", "parquet")

    table = pq.read_table(tmp_path / "out" / "dataset.parquet")
    third = table.to_pylist()[2]
    assert str(table.schema.field("messages").type) == "list<element: struct<role: string, content: string>>"
    assert third.pop("messages")[-1] == {"role": "assistant", "content": HOSTILE}
    assert third == {
        "id": "q3",
        "domain": "",
        "prompt_id": run.prompt_ids[2],
        "sample": 0,
        "answer": "4",
        "source": "prompts.jsonl",
        "source_id": "q3",
        "meta": json.dumps({"a": [HOSTILE, None], "z": 1}, ensure_ascii=False, separators=(",", ":")),
        "teacher": "a",
        "teacher_fingerprint": digest("teacher a"),
        "finish_reason": "stop",
        "reason": "router",
        "margin": 0.5,
        "reasoning": None,
        "response_tokens": len(HOSTILE.split()),
        "reasoning_tokens": None,
        "quality": None,
    }


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_long_answers_are_not_kept_in_memory(
    database: Database, run: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parquet is written in row groups; the only long text of these rows is their reference answer."""
    monkeypatch.setattr(parquet_file, "_GROUP_BYTES", 1_000)
    with database.write() as session:
        for number in range(4):
            answer(session, run, make_prompt(session, f"long {number}?", answer="x" * 1_000), 0, "x")

    write(database, run, tmp_path / "out", "parquet")

    assert pq.ParquetFile(tmp_path / "out" / "dataset.parquet").metadata.num_row_groups >= 4


def test_the_manifest_accounts_for_every_assignment(database: Database, run: MadeRun, tmp_path: Path) -> None:
    with database.write() as session:
        more = [make_prompt(session, f"more {number}") for number in range(4)]
        answer(session, run, more[0], 1, None, failure="too_long: 9,213 tokens, the model takes 8,192")
        answer(session, run, more[1], 1, None, failure="too_long: 8,193 tokens, the model takes 8,192")
        answer(session, run, more[2], 0, None, failure="refused")
        make_assignment(session, run.id, more[3], run.teacher_ids[0])

    manifest = write(database, run, tmp_path / "out", *ALL)

    assert (manifest.assigned, manifest.exported, manifest.truncated, manifest.missing) == (7, 3, 1, 1)
    assert manifest.failed == {"refused": 1, "too_long": 2}
    assert [(teacher.name, teacher.exported) for teacher in manifest.teachers] == [("a", 2), ("b", 1)]
    assert manifest.engines == {"fake 1": 3}
    assert [(file.format, file.rows) for file in manifest.files] == [(name, 3) for name in ALL]
    for file in manifest.files:
        content = (tmp_path / "out" / file.name).read_bytes()
        assert (file.bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    written = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert (written["run"], written["config"]["run"]["name"]) == ("run", "run")
    assert written["config_hash"] == manifest.config_hash
    assert written["finished_at"] is None
    assert set(written["others"]) == {"README.md", "dataset_info.json"}
    assert written["student"]["name"] == "student"


def test_llama_factory_is_told_how_to_read_each_text_file(database: Database, run: MadeRun, tmp_path: Path) -> None:
    write(database, run, tmp_path / "out", *ALL)

    info = json.loads((tmp_path / "out" / "dataset_info.json").read_bytes())
    assert {name: entry["file_name"] for name, entry in info.items()} == {
        "run_messages": "messages.jsonl",
        "run_sharegpt": "sharegpt.jsonl",
        "run_alpaca": "alpaca.jsonl",
    }
    for entry in info.values():
        row = lines(tmp_path / "out" / entry["file_name"])[2]
        assert set(entry["columns"].values()) <= set(row)
    tags = info["run_messages"]["tags"]
    turn = lines(tmp_path / "out" / "messages.jsonl")[0]["messages"][0]
    assert turn == {tags["role_tag"]: tags["user_tag"], tags["content_tag"]: "run: prompt 0?"}


def test_every_row_of_a_text_file_has_the_same_keys_and_no_null(
    database: Database, run: MadeRun, tmp_path: Path
) -> None:
    """Readers that infer types from the first rows reject types that appear later."""
    with database.write() as session:
        prompt = make_prompt(session, "imported?", meta={"z": "text"})
        answer(session, run, prompt, 0, "Yes.", finish_reason=None, engine=None, origin=Origin.IMPORTED)

    manifest = write(database, run, tmp_path / "out", "messages", "prompt-completion", "sharegpt", "alpaca")

    assert manifest.engines == {"": 1, "fake 1": 3}
    for file in manifest.files:
        rows = lines(tmp_path / "out" / file.name)
        assert len(rows) == 4
        assert {tuple((key, type(value)) for key, value in row.items()) for row in rows} == {
            tuple((key, type(value)) for key, value in rows[0].items())
        }
        assert None not in rows[-1].values()


def test_the_same_data_gives_the_same_bytes(database: Database, run: MadeRun, tmp_path: Path) -> None:
    """Including the manifest and the card, which is why neither contains a date of writing."""
    write(database, run, tmp_path / "one", *ALL)
    write(database, run, tmp_path / "two", *ALL)

    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert len(one) == 8
    assert one == two


def test_an_earlier_dataset_is_replaced_as_a_whole(database: Database, run: MadeRun, tmp_path: Path) -> None:
    write(database, run, tmp_path / "out", "messages", "parquet")
    write(database, run, tmp_path / "out", "alpaca")

    assert names(tmp_path) == {"out"} | stores(tmp_path)
    assert names(tmp_path / "out") == {"README.md", "alpaca.jsonl", "dataset_info.json", "manifest.json"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def stores(folder: Path) -> set[str]:
    return {name for name in names(folder) if name.startswith("persyn.db")}


def test_a_folder_made_for_the_dataset_is_used(database: Database, run: MadeRun, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    write(database, run, tmp_path / "out", "messages")

    assert (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("manifest", [None, "{}", '{"kind": "other", "files": []}', "no JSON"])
def test_a_folder_that_is_no_dataset_is_refused(
    database: Database, run: MadeRun, tmp_path: Path, manifest: str | None
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "manifest.json" if manifest else folder / "thesis.tex").write_text(manifest or "years of work")

    with pytest.raises(UsageError, match=r"contains '(manifest.json|thesis.tex)', which is not part"):
        write(database, run, folder, "messages")

    assert len(names(folder)) == 1


def test_a_dataset_with_something_added_is_refused(database: Database, run: MadeRun, tmp_path: Path) -> None:
    write(database, run, tmp_path / "out", "messages")
    (tmp_path / "out" / "notes.txt").write_text("mine")

    with pytest.raises(UsageError, match=r"contains 'notes.txt'"):
        write(database, run, tmp_path / "out", "messages")

    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


OLDER = {"kind": "persyn-dataset/1", "run": "run", "files": [{"name": "messages.jsonl", "rows": 3}]}


def older(folder: Path, *strangers: str) -> None:
    """A dataset in the format of the previous version, with files that a user added."""
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(OLDER))
    for name in ("messages.jsonl", "dataset_info.json", *strangers):
        (folder / name).write_text("{}")


def test_a_dataset_of_an_older_version_is_replaced(database: Database, run: MadeRun, tmp_path: Path) -> None:
    older(tmp_path / "out")

    write(database, run, tmp_path / "out", "parquet")

    assert names(tmp_path / "out") == {"README.md", "dataset.parquet", "manifest.json"}


def test_a_readme_that_an_older_version_did_not_write_is_kept(database: Database, run: MadeRun, tmp_path: Path) -> None:
    older(tmp_path / "out", "README.md")

    with pytest.raises(UsageError, match=r"contains 'README.md'"):
        write(database, run, tmp_path / "out", "parquet")

    assert (tmp_path / "out" / "README.md").read_text() == "{}"


@pytest.mark.parametrize(("formats", "expected"), [((), "no format"), (("messages", "xml"), "no format named 'xml'")])
def test_formats_are_checked_first(formats: tuple[str, ...], expected: str) -> None:
    with pytest.raises(UsageError, match=f"{expected}.*messages, prompt-completion, sharegpt, alpaca, parquet"):
        ExportOptions(formats=formats)


def test_a_run_without_a_response_leaves_the_earlier_dataset(database: Database, run: MadeRun, tmp_path: Path) -> None:
    before = write(database, run, tmp_path / "out", "messages")
    with database.write() as session:
        empty = make_run(session, name="empty", prompts=1)
        make_assignment(session, empty.id, empty.prompt_ids[0], empty.teacher_ids[0])

    with pytest.raises(UsageError, match="run empty has no responses to export: 1 assignments"):
        write(database, empty, tmp_path / "out", "messages")
    with pytest.raises(UsageError, match="there is no run 99"):
        export.write(database, 99, tmp_path / "out")

    assert names(tmp_path) == {"out"} | stores(tmp_path)
    assert json.loads((tmp_path / "out" / "manifest.json").read_bytes())["files"][0]["sha256"] == before.files[0].sha256


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("form", ALL)
def test_a_full_disk_is_one_line_and_leaves_the_earlier_dataset(
    database: Database, database_url: str, run: MadeRun, tmp_path: Path, form: str
) -> None:
    """A child process with a file size limit of 100 kB exports random text of 300 kB."""
    folder = tmp_path / "out"
    write(database, run, folder, *ALL)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    noise = "".join(digest(str(number)) for number in range(4_800))
    with database.write() as session:
        answer(session, run, make_prompt(session, "long?"), 0, noise)
    script = """
import resource, sys
from pathlib import Path
from persyn.db.connect import Database
from persyn.errors import PersynError
from persyn.dataset import export, parquet_file
from persyn.dataset.options import ExportOptions

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
database = Database(sys.argv[1])
try:
    export.write(database, int(sys.argv[2]), Path(sys.argv[3]), ExportOptions(formats=(sys.argv[4],)))
except PersynError as error:
    print(error)
database.close()
"""
    command = [sys.executable, "-W", "error", "-c", script, database_url, str(run.id), str(folder), form]

    child = subprocess.run(command, capture_output=True, text=True)

    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout == f"cannot write the dataset {folder}: File too large; nothing was changed\n"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert names(tmp_path) == {"out"} | stores(tmp_path)


def test_the_memory_of_an_export_does_not_grow_with_the_run(database: Database, tmp_path: Path) -> None:
    n, size = 4_000, 2_000
    with database.write() as session:
        run = make_run(session, prompts=0)
        texts = [f"{number} {'x' * size}" for number in range(n)]
        prompts = [{"content_hash": digest(text), "text": text, "source": "p", "meta": {}} for text in texts]
        bulk.insert_new(session, Prompt, prompts)
        first = session.scalars(select(func.min(Prompt.id))).one()
        shared = {"teacher_id": run.teacher_ids[0]}
        rows = [{"prompt_id": first + number, **shared} for number in range(n)]
        bulk.insert_new(session, Response, [{"text": "x" * size, "sample": 0, **row} for row in rows])
        bulk.insert_new(session, Assignment, [{"run_id": run.id, "reason": "router", **row} for row in rows])

    tracemalloc.start()
    manifest = write(database, run, tmp_path / "out", "messages", "alpaca")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert manifest.exported == n
    assert peak < sum(file.bytes for file in manifest.files) / 2
