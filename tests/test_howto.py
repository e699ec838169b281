"""Every command and file on the how-to pages works, with the results that the pages show.

A block after `<!-- file: NAME -->` is written to a file, one after `<!-- try -->` is run in a shell, with fake models
instead of real ones.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from persyn.llm.scorers import judge
from persyn.runs import run_file
from persyn.sql import saved
from tests import forked
from tests.chat_server import Server, completion
from tests.test_deploy import DEPLOY, problem

ROOT = Path(__file__).parents[1]
HOWTO = ROOT / "docs" / "howto"
PAGES = [*sorted(HOWTO.glob("*.md")), ROOT / "docs" / "faq.md", ROOT / "docs" / "comparison.md"]
Config = dict[str, Any]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@dataclass(frozen=True)
class Block:
    mark: str
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^(?:<!-- ([^>]+) -->\n)?```(\w+)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(*each) for each in found]


def commands(page: Path) -> Iterator[list[str]]:
    """The words after `persyn` of every command shown on a page, inline or in a block."""
    shown = re.findall(r"`(persyn [^`\n]+)`", page.read_text())
    shown += [block.text for block in blocks(page) if block.language == "sh"]
    for text in shown:
        without_comments = re.sub(r"(?<!\S)#.*$", "", text.replace("\\\n", " "), flags=re.MULTILINE)
        lexer = shlex.shlex(without_comments, posix=True, punctuation_chars="&|><\n")
        lexer.whitespace, lexer.commenters, lexer.whitespace_split = " \t", "", True
        for is_end, words in itertools.groupby(lexer, lambda word: set(word) <= set("&|><\n")):
            if not is_end and (found := list(words))[0] == "persyn":
                yield found[1:]


def template() -> Config:
    """A run of fake models without failures."""
    found = tomllib.loads((files("persyn.cli") / "templates" / "fake.toml").read_text())
    found["run"]["name"] = "first"  # the name used on the pages
    for teacher in found["teachers"]:
        teacher.pop("options", None)
    return found


def changed(base: Config, part: Config) -> Config:
    """A run file with some tables replaced, and teachers added."""
    return {**base, **part, "teachers": [*base["teachers"], *part.get("teachers", [])]}


def faked(run: Config, server: str = "") -> Config:
    """The run with models that need no weights, and with servers that exist."""
    made = json.loads(json.dumps(run))
    made["student"] = {key: made["student"][key] for key in ("name", "model")} | {"engine": "fake"}
    made["router"] = {"backbone": "router", "engine": "fake"}
    if made["quality"]["kind"] in ("reward_model", "judge"):
        made["quality"] = {"kind": "fake"}
    for teacher in made["teachers"]:
        if teacher.get("engine", "vllm") in ("vllm", "transformers"):
            teacher |= {"engine": "fake", "gpus": 0, "options": {}}
        if teacher["engine"] == "openai":
            teacher["options"]["base_url"] = server
    return made


def toml(run: Config) -> str:
    lines = []
    for name, tables in run.items():
        for table in tables if isinstance(tables, list) else [tables]:
            lines.append(f"[[{name}]]" if isinstance(tables, list) else f"[{name}]")
            lines += [f"{key} = {_inline(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_inline(each)}" for key, each in value.items()) + " }"
    return json.dumps(value)


@dataclass(frozen=True)
class Desk:
    """A folder for a page's files, in which its commands are run."""

    folder: Path
    #: Where the command is.
    commands: Path

    def write(self, page: Path, *, server: str = "") -> None:
        for block in blocks(page):
            if block.mark.startswith("file: "):
                name = block.mark.removeprefix("file: ")
                is_run = name.endswith(".toml") and "run" in tomllib.loads(block.text)
                text = toml(faked(tomllib.loads(block.text), server)) if is_run else block.text
                (self.folder / name).write_text(text)

    def type(self, script: str, **variables: str) -> str:
        """The output of a script; `persyn` is this version, and exit code 3 (missing rows) counts as success."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PERSYN_")}
        environment |= {"PERSYN_HOME": str(self.folder / "home"), "PYTHONPATH": forked.MODULES, **variables}
        environment["PATH"] = f"{self.commands}{os.pathsep}{environment['PATH']}"
        ours = 'persyn() { command persyn "$@" || [ $? = 3 ]; }'
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"{ours}\n{script}"],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def try_out(self, page: Path, **variables: str) -> str:
        return self.type("".join(block.text for block in blocks(page) if block.mark == "try"), **variables)


@pytest.fixture
def desk(tmp_path: Path, commands_folder: Path) -> Desk:
    return Desk(tmp_path, commands_folder)


@each_page
def test_every_command_exists_with_its_options(page: Path) -> None:
    assert [(words, wrong) for words in commands(page) if (wrong := problem(words))] == []


def test_the_commands_of_all_pages_are_looked_at() -> None:
    found = [words for page in PAGES for words in commands(page)]
    assert len(found) > 70
    asked = {words[words.index("--ask") + 1] for words in found if "--ask" in words}
    assert asked <= saved.queries().keys()


@each_page
def test_every_run_file_is_accepted_and_so_is_every_part_of_one(page: Path, tmp_path: Path) -> None:
    for block in blocks(page):
        if block.language != "toml" or block.mark == "file: pyproject.toml":
            continue
        shown, file = tomllib.loads(block.text), tmp_path / "shown.toml"
        if all("model" not in teacher for teacher in shown.get("teachers", [{"model": ""}])):
            file.write_text(block.text)
            assert run_file.read_teachers(file)
            continue
        file.write_text(toml(shown if shown.keys() >= {"run", "prompts"} else changed(template(), shown)))
        read = run_file.read(file)
        if read.quality.kind == "judge":
            judge.wording(read.quality.options)


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text()):
        if target.startswith("https://"):
            continue
        found = (page.parent / target).resolve() if target else page
        assert found.exists(), target
        if anchor:
            assert anchor in {_anchor(heading) for heading in re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)}


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_file_of_deploy_that_is_named_is_there() -> None:
    named = re.findall(r"`((?:systemd|slurm|kubernetes|compose)[\w./@-]*)`", (HOWTO / "cluster.md").read_text())
    assert len(named) > 3
    assert [name for name in named if not (DEPLOY / name).exists()] == []


def test_a_grid_is_imported_compared_and_exported(desk: Desk) -> None:
    page = HOWTO / "import-a-grid.md"
    desk.write(page)
    said = desk.try_out(page)
    assert "8 rows: 8 new, 0 already there, 0 bad" in said
    assert "run grid, alpha 0.4, minmax: 1 hold-out prompts, 2 calibration prompts" in said
    rows = (desk.folder / "home/datasets/grid/messages.jsonl").read_text().splitlines()
    assert {json.loads(row)["messages"][-1]["content"] for row in rows} <= {
        f"{sum} is {result}." for sum, result in [("2 + 2", 4), ("3 * 7", 21), ("9 - 4", 5), ("6 * 8", 48)]
    } | {"4", "24", "46"}


def test_a_grid_goes_on_here(desk: Desk) -> None:
    run = changed(template(), {"prompts": {"source": "grid.jsonl"}})
    (desk.folder / "run.toml").write_text(toml(run))
    grid = [
        {"prompt": f"{n}?", "teacher": name, "response": f"{name}: {n}"} for n in range(20) for name in ("ada", "bob")
    ]
    (desk.folder / "grid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in grid[:-5]))
    (last,) = [block.text for block in blocks(HOWTO / "import-a-grid.md")][-1:]
    desk.type(last)
    counted = desk.type('persyn sql "select origin, count(*) as n from responses group by 1" --json')
    assert {row["origin"]: row["n"] for row in json.loads(counted)}["imported"] == 35


def test_a_function_of_ones_own_is_the_quality(desk: Desk) -> None:
    page = HOWTO / "own-scorer.md"
    desk.write(page)
    (part,) = [
        tomllib.loads(block.text) for block in blocks(page) if "my_scorers:" in block.text and block.language == "toml"
    ]
    run = changed(template(), part)
    run["run"] |= {"calibration": 2, "holdout": 0}
    (desk.folder / "run.toml").write_text(toml(run))
    examples = "".join(block.text for block in blocks(page) if block.mark == "python")
    (desk.folder / "examples.py").write_text(examples)

    (script,) = [block.text for block in blocks(page) if block.language == "sh"]
    said = desk.type(f"{script.replace('PYTHONPATH=', 'PYTHONPATH=$PYTHONPATH:')}\n{sys.executable} examples.py")
    assert "run first: done, 2 prompts" in said
    values = desk.type('persyn sql "select distinct value from scores where value = 0" --json')
    assert json.loads(values) == [{"value": 0}]


def test_teachers_behind_servers_are_asked_and_counted(desk: Desk) -> None:
    page = HOWTO / "api-teachers.md"
    rows = [json.dumps({"prompt": f"What is {n}?"}) + "\n" for n in range(110)]
    (desk.folder / "prompts.jsonl").write_text("".join(rows))
    with Server.running() as server:
        server.reply = lambda n: completion(f"It is {n}.", usage={"prompt_tokens": 1000, "completion_tokens": 500})
        desk.write(page, server=server.base_url)
        said = desk.try_out(page, LARGE_API_KEY="a-key")
    assert "run few: done, 110 prompts" in said
    keys = {headers.get("Authorization") for headers in server.headers}
    assert keys == {"Bearer a-key", None}
    costs = {row["teacher"]: row for row in json.loads(desk.type("persyn sql --ask cost -p run=few --json"))}
    # 1,000 tokens at 2 dollars a million, 500 at 8.
    assert costs["large"]["dollars"] == pytest.approx(0.006 * costs["large"]["responses"])
    assert re.search(r"^strategy.*cost", said, re.MULTILINE)


def test_another_run_does_only_what_its_change_asks_for(desk: Desk) -> None:
    first = template()
    parts = [tomllib.loads(block.text) for block in blocks(HOWTO / "second-student.md") if block.language == "toml"]
    second, third, static = (changed(first, part) for part in parts)
    second["run"]["seed"] = first["run"]["seed"]
    third["run"], static["run"] = {**first["run"], "name": "third"}, {**first["run"], "name": "static"}
    lower = changed(first, {"run": {**first["run"], "name": "lower", "alpha": 0.2}})
    prompts = (files("persyn.cli") / "templates" / "prompts.jsonl").read_text()
    (desk.folder / "prompts.jsonl").write_text(prompts)

    done = {}
    for run in (first, second, third, static, lower):
        name = run["run"]["name"]
        (desk.folder / f"{name}.toml").write_text(toml(faked(run)))
        desk.type(f"persyn run start {name}.toml")
        jobs = json.loads(desk.type(f"persyn sql --ask jobs -p run={name} --json"))
        done[name] = {row["stage"]: row["n_prompts"] for row in jobs}
    assert done["first"] == done["first"] | {"calibrate": 2 * 16, "score": 2 * 2 * 16}
    assert "calibrate" not in done["second"]
    assert done["second"]["score"] == 2 * 16  # only the learnability
    assert done["third"]["calibrate"] == 16
    assert done["third"]["score"] == 2 * 16
    assert not {"calibrate", "score", "fit_router"} & done["static"].keys()
    assert not {"calibrate", "score"} & done["lower"].keys()
    assert "fit_router" in done["lower"]


def test_a_run_is_deleted_and_what_is_shared_stays(desk: Desk) -> None:
    (command,) = [block.text for block in blocks(ROOT / "docs" / "faq.md") if block.mark == "try"]
    (desk.folder / "run.toml").write_text(toml(template()))
    (desk.folder / "prompts.jsonl").write_text((files("persyn.cli") / "templates" / "prompts.jsonl").read_text())
    desk.type("persyn run start run.toml")
    with closing(sqlite3.connect(desk.folder / "home/persyn.db")) as connection:
        responses = connection.execute("SELECT count(*) FROM responses").fetchone()
        assert "run first is deleted" in desk.type(command)
        counted = {
            table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()
            for table in ("runs", "jobs", "events", "assignments", "run_prompts", "responses")
        }
    assert counted == dict.fromkeys(("runs", "jobs", "events", "assignments", "run_prompts"), (0,)) | {
        "responses": responses
    }
