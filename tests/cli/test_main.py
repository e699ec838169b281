"""General properties of the command line: names, ids, pipes, completion, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import TypeAlias

import click
import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner, Result
from sqlalchemy import select, update

from persyn.cli.main import persyn as command
from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.work import Job
from persyn.errors import UsageError
from persyn.runs import run_file
from tests.cli.conftest import Persyn
from tests.factories import MadeRun, make_job, make_prompt, make_run
from tests.run_files import write_run
from tests.test_architecture import commands

Typed: TypeAlias = Callable[..., Result]


@pytest.fixture
def typed(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Typed:
    """Run the command in this process, on each kind of store."""
    monkeypatch.setenv("PERSYN_DATABASE_URL", database_url)
    monkeypatch.setenv("PERSYN_HOME", str(tmp_path))
    monkeypatch.delenv("COLUMNS", raising=False)
    return lambda *arguments: CliRunner().invoke(command, arguments)


@pytest.fixture
def made(database: Database) -> MadeRun:
    with database.write() as session:
        return make_run(session, name="first")


def test_whatever_is_listed_or_shown_can_be_had_as_json() -> None:
    for name, found in commands(command):
        if name.split()[-1] in ("list", "show", "status", "stats", "doctor", "check", "curve", "trace", "sql"):
            has_json = any("--json" in option.opts for option in found.params)
            assert has_json or name == "persyn db check", name


def test_no_help_of_a_command_is_cut_off_in_its_groups_list() -> None:
    for name, found in commands(command):
        if isinstance(found, click.Group):
            for inner in found.commands.values():
                assert not inner.get_short_help_str(60).endswith("..."), f"{name} {inner.name}"


def test_a_mistyped_command_is_told_the_nearest() -> None:
    done = CliRunner().invoke(command, ["rnu", "list"])
    assert done.exit_code == 2
    assert "Did you mean" in done.output
    assert "run" in done.output.rpartition("Did you mean")[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ("prompts", "show", "9" * 20),
        ("jobs", "cancel", "first", "9" * 20),
        ("prompts", "list", "--after", "9" * 20),
        ("prompts", "list", "--limit", "9" * 20),
        ("jobs", "list", "first", "--limit", "0"),
    ],
)
def test_a_number_that_no_database_takes_is_wrong_usage(arguments: tuple[str, ...]) -> None:
    done = CliRunner().invoke(command, arguments)
    assert (done.exit_code, "is not in the range" in done.output) == (2, True), done.output


def test_a_run_that_is_done_cannot_be_cancelled_and_one_that_is_cancelled_can_be_again(
    typed: Typed, database: Database, made: MadeRun
) -> None:
    assert typed("run", "cancel", "first").exit_code == 0
    assert typed("run", "cancel", "first").exit_code == 0
    with database.write() as session:
        session.execute(update(Run).values(state=RunState.DONE))
    refused = typed("run", "cancel", "first")
    assert isinstance(refused.exception, UsageError)
    assert str(refused.exception) == "run first is done already and cannot be cancelled"
    with database.read() as session:
        assert session.get_one(Run, made.id).state is RunState.DONE


def test_a_job_of_no_run_or_another_is_named_and_none_is_cancelled(
    typed: Typed, database: Database, made: MadeRun
) -> None:
    with database.write() as session:
        mine, other = make_job(session, made.id), make_job(session, make_run(session, name="second").id)
    refused = typed("jobs", "cancel", "first", str(mine), str(other), "777")
    assert isinstance(refused.exception, UsageError)
    assert str(refused.exception).startswith(f"run first has no job {other}, 777; 'persyn jobs list first'")
    with database.read() as session:
        assert set(session.scalars(select(Job.state))) == {"queued"}


def test_a_table_that_is_piped_has_a_row_on_a_line_and_json_has_all_of_it(typed: Typed, database: Database) -> None:
    text = "word " * 100
    with database.write() as session:
        prompt_id = make_prompt(session, text, source_id="x" * 200)
    lines = typed("prompts", "list").stdout.splitlines()
    assert len(lines) == 2
    assert "x" * 200 in lines[1]
    assert "word…" in lines[1]
    assert json.loads(typed("prompts", "list", "--json").stdout)[0]["text"] == text
    shown = json.loads(typed("prompts", "show", str(prompt_id), "--json").stdout)
    assert shown["messages"] == [{"role": "user", "content": text}]


def test_a_worker_is_shortly_named_in_a_table_and_wholly_in_json(
    typed: Typed, database: Database, made: MadeRun
) -> None:
    owner = "host.1234.5678/417/99/abcdef12"
    with database.write() as session:
        make_job(session, made.id, state="done", owner=owner)
        make_job(session, made.id)
    table = typed("jobs", "list", "first").stdout
    assert "host:417" in table
    assert owner not in table
    assert [job["owner"] for job in json.loads(typed("jobs", "list", "first", "--json").stdout)] == [None, owner]
    assert typed("run", "list").stdout.splitlines()[1].split()[4:6][1].endswith("Z")


def test_runs_are_completed_by_how_they_begin(typed: Typed, database: Database, made: MadeRun) -> None:
    with database.write() as session:
        make_run(session, name="second")
        make_run(session, name="fir_t")
    complete = BashComplete(command, {}, "persyn", "_PERSYN_COMPLETE").get_completions
    assert [item.value for item in complete(["run", "watch"], "")] == ["fir_t", "second", "first"]
    assert [item.value for item in complete(["compare", "second"], "fir_")] == ["fir_t"]
    assert [item.value for item in complete([], "ru")] == ["run"]


def test_completion_makes_no_store_and_says_nothing_when_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERSYN_HOME", str(tmp_path / "none"))
    monkeypatch.delenv("PERSYN_DATABASE_URL", raising=False)
    complete = BashComplete(command, {}, "persyn", "_PERSYN_COMPLETE").get_completions
    assert complete(["run", "watch"], "") == []
    assert not (tmp_path / "none").exists()
    monkeypatch.setenv("PERSYN_DATABASE_URL", "nonsense")
    assert complete(["run", "watch"], "") == []


def test_each_shell_has_a_script_for_persyn() -> None:
    for shell in ("bash", "zsh", "fish"):
        script = CliRunner().invoke(command, ["completion", shell]).output
        assert f"_PERSYN_COMPLETE={shell}_complete" in script


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "[run] is missing; 'persyn init' writes a complete file"),
        ('[run]\nsetting = "math"', "'name' is missing in [run]"),
        ('{"run": 1}', "run.toml: not TOML: Invalid statement (at line 1, column 1)"),
        ('[run]\nname = "a b"', "beginning with a letter or a digit, got the text 'a b'"),
        ('[run]\nname = "a"\nsetting = "maths"', "`run.setting` is 'maths'; allowed: 'instruct', 'math'"),
        ('[run]\nname = "a"\nsetting = "math"\nholdout = 2', "`run.holdout` must be a number >= 0 and < 1, got 2"),
    ],
)
def test_what_a_run_file_lacks_is_named_as_the_file_writes_it(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "run.toml").write_text(content)
    with pytest.raises(UsageError) as refused:
        run_file.read(tmp_path / "run.toml")
    assert str(refused.value).endswith(said)


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        (
            'model = "ada"\nengine = "fake"',
            'model = "ada"\nengine = "vlm"',
            "teacher ada: `teachers.engine` is 'vlm'; allowed: 'vllm', 'transformers', 'openai', ",
        ),
        ('kind = "fake"', 'kind = "maths"', "`quality.kind` is 'maths'; allowed: 'math', 'instructions', "),
        ("[strategy]", '[strategy]\nkind = "best"', "`strategy.kind` is 'best'; allowed: 'persyn', 'static', "),
    ],
)
def test_an_unknown_kind_is_answered_with_those_that_exist(tmp_path: Path, right: str, wrong: str, said: str) -> None:
    text = (files("persyn.cli") / "templates/fake.toml").read_text()
    assert right in text
    (tmp_path / "run.toml").write_text(text.replace(right, wrong, 1))
    with pytest.raises(UsageError) as refused:
        run_file.read(tmp_path / "run.toml")
    assert said in str(refused.value)


def test_a_reader_that_has_seen_enough_ends_the_command_quietly(tmp_path: Path) -> None:
    store = Database(f"sqlite:///{tmp_path / 'home' / 'persyn.db'}")
    store.require_head()
    with store.write() as session:
        for number in range(2000):
            make_prompt(session, f"prompt {number}")
    store.close()
    for more in ([], ["--json"]):
        line = " ".join(
            [sys.executable, "-m", "persyn.cli", "prompts", "list", "--limit", "2000", *more, "| head -c 5"]
        )
        environment = {"PERSYN_HOME": str(tmp_path / "home"), "PATH": "/bin:/usr/bin", "PYTHONPATH": ":".join(sys.path)}
        done = subprocess.run(line, shell=True, env=environment, capture_output=True, text=True, check=True)
        assert (len(done.stdout), done.stderr) == (5, "")


def test_a_worker_without_a_broker_says_that_and_nothing_else(persyn: Persyn) -> None:
    for name in ("worker", "dispatch"):
        done = persyn(name)
        assert done.returncode == 2
        assert (
            done.stderr == "error: PERSYN_BROKER_URL is not set; give redis://host:port/0, the same to every worker\n"
        )


@pytest.mark.parametrize("command", [["dispatch"], ["run", "start", "run.toml"]])
def test_a_package_that_is_not_installed_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, command: list[str]
) -> None:
    write_run(tmp_path)
    missing = f"import sys; sys.modules['kombu'] = None; sys.argv = ['persyn', *{command}]"
    code = f"{missing}; from persyn.cli.main import main; main()"
    environment = {
        "PERSYN_HOME": str(tmp_path),
        "PERSYN_BROKER_URL": "redis://127.0.0.1:1/0",
        "PYTHONPATH": ":".join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    # A run whose output cannot be written is not started.
    assert not (tmp_path / "persyn.db").exists() or command == ["dispatch"]
    assert done.stderr == "error: the package 'kombu' is not installed; it comes with: pip install 'persyn[celery]'\n"


def test_the_doctor_says_what_is_wrong_with_a_store_that_cannot_be_opened(persyn: Persyn, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for home in ("/proc", str(tmp_path / "file")):
        done = persyn("doctor", PERSYN_HOME=home)
        assert done.returncode == 1, done.stderr
        assert f"{home}/persyn.db cannot be opened: " in done.stdout


def test_a_run_that_is_not_there_is_missed_in_a_store_that_is_named(persyn: Persyn, tmp_path: Path) -> None:
    named = f"in the store sqlite:///{tmp_path / 'home' / 'persyn.db'}, which has no runs; "
    assert named in persyn("run", "status", "none").stderr


def test_a_home_that_is_no_folder_is_named(persyn: Persyn, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = persyn("run", "list", PERSYN_HOME=str(tmp_path / "file"))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'file'}: ")
    assert "PERSYN_HOME" in done.stderr
