"""More preflight checks and warnings before a run starts, tested in one process."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from persyn.cli import doctor
from persyn.cli.main import persyn
from persyn.cli.run import _warn_of_change
from persyn.config import RunConfig, TeacherTable, fingerprint_of
from persyn.db.catalog import Prompt, Role, Run, RunPrompt
from persyn.db.connect import Database
from persyn.errors import UsageError
from persyn.ingest import prompt_import, versions
from persyn.llm import identity, needs
from persyn.llm.identity import UNKNOWN_IDENTITY, Identity
from persyn.runs import pipeline, run_file, start
from persyn.runs.checks import functions, servers
from tests.chat_server import Server
from tests.cli.test_beforehand import SERVER, rows_of, with_quality, with_teacher, write_rows
from tests.run_files import write_run

Say: TypeAlias = Callable[..., tuple[int, str]]


@pytest.fixture
def say(tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Run the command in this process; return its exit code and output."""
    (tmp_path / "home").mkdir()
    shutil.copy(migrated, tmp_path / "home" / "persyn.db")
    monkeypatch.setenv("PERSYN_HOME", str(tmp_path / "home"))

    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(persyn, arguments)
        is_said = done.exception is None or isinstance(done.exception, SystemExit)
        if not is_said and not isinstance(done.exception, UsageError):
            raise done.exception or AssertionError
        return (done.exit_code, done.output) if is_said else (2, f"{done.output}{done.exception}")

    return run


@pytest.fixture
def server() -> Iterator[Server]:
    with Server.running() as found:
        yield found


def begin(database: Database, file: Path) -> tuple[int, list[str]]:
    """Start a run without working it; return its id and the notices."""
    said: list[str] = []
    with database.write() as session:
        return pipeline.start_run(session, run_file.read(file), actor="me", say=said.append).id, said


def with_field(folder: Path, field: str, *values: Any) -> None:
    """Set a field in the prompts' rows, cycling through the values."""
    rows = rows_of(folder / "prompts.jsonl")
    write_rows(folder / "prompts.jsonl", [{**row, field: values[n % len(values)]} for n, row in enumerate(rows)])


@pytest.mark.parametrize(
    ("instructions", "flaw"),
    [
        ("punctuation:no_comma", "malformed_instructions: Expected `array`, got `str`"),
        (["punctuation:no_comma"], "1 in instruction_id_list, 0 in kwargs"),
    ],
)
def test_instructions_that_cannot_be_checked_are_refused_with_the_first_flaw(
    say: Say, tmp_path: Path, instructions: Any, flaw: str
) -> None:
    file = with_quality(write_run(tmp_path), 'kind = "instructions"')
    with_field(tmp_path, "instruction_id_list", instructions)
    code, said = say("plan", file)
    assert code == 2
    assert "none of the 60 prompts has a list of instructions that can be checked" in said
    assert flaw in said


def test_where_some_instructions_cannot_be_checked_calibration_is_drawn_from_the_others(
    database: Database, tmp_path: Path
) -> None:
    file = Path(with_quality(write_run(tmp_path), 'kind = "instructions"'))
    with_field(tmp_path, "instruction_id_list", ["punctuation:no_comma"], ["no:such_thing"])
    with_field(tmp_path, "kwargs", [{}])
    _, said = begin(database, file)
    assert len(said) == 1
    assert said[0].startswith("30 of 60 prompts have no list of instructions that can be checked")
    assert "unknown_instruction: 'no:such_thing'" in said[0]
    with database.read() as session:
        drawn = session.query(Prompt).join(RunPrompt).where(RunPrompt.role != Role.TARGET).all()
        assert {prompt.meta["instruction_id_list"][0] for prompt in drawn} == {"punctuation:no_comma"}


def test_answers_that_read_like_missing_ones_are_warned_of(database: Database, tmp_path: Path) -> None:
    file = Path(with_quality(write_run(tmp_path), 'kind = "math"'))
    with_field(tmp_path, "answer", "nan", "7", "N/A ", "8")
    _, said = begin(database, file)
    assert [each.partition(" (")[0] for each in said] == ["30 of 60 reference answers look like missing ones"]


def test_an_answer_under_another_name_is_named(database: Database, tmp_path: Path) -> None:
    file = Path(with_quality(write_run(tmp_path), 'kind = "math"'))
    rows = rows_of(tmp_path / "prompts.jsonl")
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"], "gold": row["answer"]} for row in rows])
    with pytest.raises(UsageError, match=r"give each row its 'answer' \(their rows have: gold\)"):
        begin(database, file)


@pytest.mark.parametrize(("kind", "field"), [("code", "tests"), ("instructions", "instruction_id_list")])
def test_how_imported_responses_bring_what_the_quality_needs_is_said(
    database: Database, tmp_path: Path, kind: str, field: str
) -> None:
    file = Path(with_quality(write_run(tmp_path), f'kind = "{kind}"'))
    with pytest.raises(UsageError, match=f"give each row its '{field}' .* import --prompt-field {field}"):
        begin(database, file)


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (
            ("math", "code", "instructions"),
            "its 'answer' and 'tests' and 'instruction_id_list' .of imported responses, "
            "with persyn responses import --prompt-field tests --prompt-field instruction_id_list. .their rows have",
        ),
        (("math", "against"), "'math and judge' compares each response with it: give each row its 'answer' .their"),
    ],
)
def test_what_several_scorers_need_is_said_once_each(kinds: tuple[str, ...], said: str) -> None:
    needed = {
        "math": needs.answer("math"),
        "against": needs.answer("judge"),
        "code": needs.tests(),
        "instructions": needs.instruction_list(),
    }
    lacking = prompt_import._Lacking(needs.all_of([needed[kind] for kind in kinds]), 60, 60, fields=("gold",))
    with pytest.raises(UsageError, match=said):
        lacking.require(12)


def test_a_holdout_that_leaves_nothing_to_learn_from_is_refused(database: Database, tmp_path: Path) -> None:
    file = write_run(tmp_path, holdout=0.97)
    with pytest.raises(UsageError, match=r"reserves all 12 calibration prompts .* lower 'holdout'"):
        begin(database, file)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("def other(): ...", "AttributeError: module 'mine' has no attribute 'score'"),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("import os\nos._exit(3)", "importing 'mine:score' ended the process"),
        ("score = 3", "'mine:score' is not a function"),
        ("def score(*_): return 1.0", None),
    ],
)
def test_a_function_is_imported_before_anything_is_paid_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, why: str | None
) -> None:
    (tmp_path / "mine.py").write_text(source)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    config = run_file.read(Path(with_quality(write_run(tmp_path), 'kind = "python"\nmodel = "mine:score"')))
    found = [(whose, finding.message) for whose, finding in functions.check(config)]
    if why is None:
        assert found == []
    else:
        ((whose, message),) = found
        assert whose == "the quality"
        assert why in message


def teacher_key(known: versions.Identities | None = None, **table: Any) -> str:
    whole = {"name": "x", "model": "m", "engine": "openai", "options": {"base_url": "http://127.0.0.1:80/v1"}, **table}
    return fingerprint_of(versions.teacher_identity(msgspec.convert(whole, TeacherTable), known or {}))


@pytest.mark.parametrize(
    "table",
    [
        {"options": {"base_url": "http://127.0.0.1/v1/"}},
        {"options": {"base_url": "HTTP://LocalHost:80/v1"}},
        {"options": {"base_url": "http://[::1]/v1", "concurrency": 3, "api_key_env": "OTHER"}},
        {"model": " m"},
        {"system": ""},
        {"gpus": 4},
        {"options": {"base_url": "http://127.0.0.1:81/v1"}},
        {"options": {"base_url": "http://127.0.0.1/v1", "extra": {}, "omit": []}},
        {"sampling": {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "stop": []}, "few_shot": []},
    ],
)
def test_one_teacher_is_known_however_it_is_spelled_or_reached(table: dict[str, Any]) -> None:
    assert teacher_key(**table) == teacher_key()


@pytest.mark.parametrize(
    "table",
    [
        {"options": {"base_url": "http://127.0.0.1/v1", "extra": {"min_p": 0.1}}},
        {"model": "M"},
        {"revision": "2026-11"},
        {"system": "Be brief."},
        {"sampling": {"temperature": 0.1}},
        {"few_shot": [{"user": "a", "assistant": "b"}]},
    ],
)
def test_teachers_that_may_write_otherwise_are_two(table: dict[str, Any]) -> None:
    assert teacher_key(**table) != teacher_key()


def test_copies_of_a_model_are_one_teacher_and_greedy_ones_whatever_top_p_says() -> None:
    one, other = Identity("sha256:1", None), Identity("sha256:2", None)
    known = {("/a", None): one, ("/b", None): one, ("/c", None): other}
    local: dict[str, Any] = {"engine": "vllm", "options": {"enforce_eager": True}, "sampling": {"temperature": 0.0}}
    copy = {**local, "options": {}, "sampling": {"temperature": 0.0, "top_p": 0.5}}
    assert teacher_key(known, model="/a", **local) == teacher_key(known, model="/b", **copy)
    assert teacher_key(known, model="/a", **local) != teacher_key(known, model="/c", **local)
    assert teacher_key({("m", None): UNKNOWN_IDENTITY}, engine="vllm", options={}) != teacher_key()


def test_two_spellings_of_one_server_are_refused(database: Database, tmp_path: Path) -> None:
    file = write_run(tmp_path, teachers=("ada", "bob"))
    text = file.read_text()
    for name, url in (("ada", "http://localhost:8000/v1"), ("bob", "http://127.0.0.1:8000/v1/")):
        text = text.replace(f'model = "{name}"\nengine = "fake"\ngpus = 0', SERVER.format(url=url, more=""))
    file.write_text(text.replace("options = {  }", ""))
    with pytest.raises(UsageError, match="'ada' and 'bob' are the same teacher: the same model 'm'"):
        begin(database, file)


def test_one_model_s_name_at_two_addresses_is_refused_with_what_to_do_and_a_revision_tells_them_apart(
    database: Database, tmp_path: Path
) -> None:
    file = write_run(tmp_path, teachers=("ada", "bob"))
    text = file.read_text().replace("options = {  }", "")
    for name, port in (("ada", 8000), ("bob", 8001)):
        server = SERVER.format(url=f"http://127.0.0.1:{port}/v1", more="")
        text = text.replace(f'model = "{name}"\nengine = "fake"\ngpus = 0', server)
    file.write_text(text)
    with pytest.raises(UsageError, match=r"different models .* give each teacher a revision .* list of both addresses"):
        begin(database, file)
    head, ada, bob = text.split('model = "m"')
    file.write_text(f'{head}model = "m"\nrevision = "8B q4"{ada}model = "m"\nrevision = "70B q4"{bob}')
    begin(database, file)


def served_by(tmp_path: Path, url: str, more: str = "") -> RunConfig:
    return run_file.read(Path(with_teacher(write_run(tmp_path), SERVER.format(url=url, more=more))))


def looked(config: RunConfig) -> list[str]:
    return [finding.message for _, finding in servers.check(config)]


def test_https_to_a_server_that_speaks_http_is_told_of(tmp_path: Path, server: Server) -> None:
    (message,) = looked(served_by(tmp_path, server.base_url.replace("http:", "https:")))
    assert "does not use TLS" in message
    assert "is it an http:// URL?" in message
    assert server.bodies == []


@pytest.mark.parametrize("key", ['"abc"', "'abc'"])
def test_a_key_in_quotation_marks_is_told_of(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("SOME_KEY", key)
    (message,) = looked(served_by(tmp_path, server.base_url, ', api_key_env = "SOME_KEY"'))
    assert "SOME_KEY contains a key in quotation marks" in message
    assert "abc" not in message


def test_a_proxy_of_no_use_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1")
    (message,) = looked(served_by(tmp_path, "http://teacher.invalid/v1"))
    assert "socks5 proxy" in message


def test_a_judge_s_server_is_looked_at_as_a_teacher_s(say: Say, tmp_path: Path, server: Server) -> None:
    judge = 'kind = "judge"\nmodel = "j"\noptions = {{ engine = "openai", options = {{ base_url = "{}" }} }}'
    file = with_quality(write_run(tmp_path), judge.format(server.base_url))
    code, said = say("teachers", "check", file, "--json")
    found = {row["model"]: (row[""], row["found"]) for row in json.loads(said)}
    level, message = found["the judge"]
    assert (code, level) == (0, "ok")
    assert f"{server.base_url}/chat/completions will receive requests for 'j'" in message


def test_other_answers_than_the_stored_ones_are_said(say: Say, tmp_path: Path) -> None:
    file = write_run(tmp_path)
    database = Database(f"sqlite:///{tmp_path / 'home' / 'persyn.db'}")
    assert begin(database, file)[1] == []
    with_field(tmp_path, "answer", "another")
    said = "prompts.jsonl: 60 rows have a reference answer"
    for _ in range(2):  # the notice is repeated
        assert [each.startswith(said) for each in begin(database, file)[1]] == [True]
    code, told = say("plan", str(file))
    assert (code, said in told) == (0, True)
    file.write_text(file.read_text().replace('name = "test"', 'name = "next"'))
    assert any(each.startswith(said) for each in begin(database, file)[1])
    with database.read() as session:
        assert session.query(Prompt).where(Prompt.answer == "another").all() == []
    database.close()


def test_a_prompts_file_that_is_gone_is_said(database: Database, tmp_path: Path) -> None:
    file = write_run(tmp_path)
    begin(database, file)
    (tmp_path / "prompts.jsonl").unlink()
    assert begin(database, file)[1] == ["file not found: prompts.jsonl; the run keeps its prompts"]


@pytest.mark.parametrize(("content", "why"), [("", "has no rows"), ('{"prompt": "What', "cannot be imported")])
def test_a_prompts_file_that_cannot_be_read_any_more_does_not_stop_a_run(
    say: Say, tmp_path: Path, content: str, why: str
) -> None:
    file = write_run(tmp_path)
    database = Database(f"sqlite:///{tmp_path / 'home' / 'persyn.db'}")
    run_id, _ = begin(database, file)
    (tmp_path / "prompts.jsonl").write_text(content)
    with CliRunner().isolation() as (_, told, _), database.read() as session:
        _warn_of_change(session, session.get_one(Run, run_id))
    database.close()
    assert why in told.getvalue().decode()
    assert "the run keeps its prompts" in told.getvalue().decode()
    code, said = say("plan", str(file))
    assert (code, why in said) == (2, True)


def test_a_broken_row_is_not_taken_for_prompts_that_are_gone(say: Say, tmp_path: Path) -> None:
    file = write_run(tmp_path)
    database = Database(f"sqlite:///{tmp_path / 'home' / 'persyn.db'}")
    begin(database, file)
    database.close()
    with (tmp_path / "prompts.jsonl").open("a") as prompts:
        prompts.write('{"prompt": \n')
    code, said = say("plan", str(file))
    assert code == 2
    assert "prompts.jsonl:61: not JSON" in said
    assert "prompts are missing" not in said


def test_teachers_in_single_brackets_are_told_how_to_write_them(say: Say, tmp_path: Path) -> None:
    file = write_run(tmp_path)
    file.write_text(file.read_text().replace("[[teachers]]", "[teachers]"))
    assert "write [[teachers]], with two brackets" in say("plan", str(file))[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["select 1", "-p", "run=test"], "the query has no parameter :run"),
        (["select :run", "-p", "run=a", "-p", "run=b"], "-p was given twice"),
        (["select name from runs where name = :run", "-p", "run=nope"], "(no rows)"),
    ],
)
def test_a_question_is_not_passed_over_in_silence(say: Say, arguments: list[str], said: str) -> None:
    assert said in say("sql", *arguments)[1]


def test_a_store_without_runs_is_named(say: Say, tmp_path: Path) -> None:
    assert f"no runs in the store sqlite:///{tmp_path}/home/persyn.db" in say("run", "list")[1]


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub that accepts connections and never responds, with a timeout of a fraction of a second."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)  # restored afterwards
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(identity, "_HUB_SECONDS", 0.2)
        identity.hub_silence.cache_clear()
        yield url
        identity.hub_silence.cache_clear()


def test_a_silent_hub_is_named_by_doctor_and_where_a_model_is_looked_up(
    say: Say, tmp_path: Path, silent_hub: str
) -> None:
    ((level, _, message),) = doctor._hub()
    assert level == "warning"
    assert f"{silent_hub} does not answer: ReadTimeout" in message
    teacher = 'model = "nobody/first"\nengine = "transformers"\ngpus = 0'
    code, said = say("teachers", "check", with_teacher(write_run(tmp_path), teacher))
    assert code == 1
    assert f"{silent_hub} does not answer" in " ".join(said.split())


def test_a_model_s_folder_that_moved_is_the_same_run_and_a_changed_one_is_not(
    database: Database, tmp_path: Path
) -> None:
    (was := tmp_path / "was").mkdir()
    (was / "config.json").write_text("{}")
    file = Path(with_teacher(write_run(tmp_path), f'model = "{was}"\nengine = "transformers"\ngpus = 0'))
    run_id, _ = begin(database, file)
    is_now = was.rename(tmp_path / "is_now")
    file.write_text(file.read_text().replace(str(was), str(is_now)))
    assert begin(database, file) == (run_id, [])
    with database.read() as session:
        assert session.get_one(Run, run_id).config["teachers"][0]["model"] == str(is_now)

    changed = shutil.copytree(is_now, tmp_path / "changed")
    (changed / "config.json").write_text('{"a": 1}')
    file.write_text(file.read_text().replace(str(is_now), str(changed)))
    with database.read() as session, pytest.raises(UsageError, match=r"teachers\[0\].model was .*is_now.*changed"):
        start.find(session, run_file.read(file))


def test_the_doctor_reads_the_prompts_of_a_run_file(say: Say, tmp_path: Path) -> None:
    file = write_run(tmp_path, prompts=20)
    prompts = tmp_path / "prompts.jsonl"

    def found() -> tuple[int, list[str]]:
        code, said = say("doctor", str(file), "--json")
        return code, next([row[""], row["found"]] for row in json.loads(said) if row["what"] == "prompts")

    assert found() == (0, ["ok", "20 rows in prompts.jsonl"])
    prompts.write_text(prompts.read_text() + "{not JSON\n")
    code, (level, reason) = found()
    assert (code, level) == (1, "error")
    assert reason.startswith("1 of 21 rows cannot be imported, the first: prompts.jsonl:21: ")
    prompts.unlink()
    assert found()[0] == 1
