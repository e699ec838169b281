"""Engines, scorers, strategies and formats of another installed package, in every list that shows kinds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

KINDS = '''
from contextlib import contextmanager

import msgspec
from msgspec import Struct

from persyn.dataset.formats import Format, jsonl
from persyn.llm.engines import EngineKind
from persyn.llm.options import Options
from persyn.method import strategies
from persyn.method.strategies import Strategy


class Echo(Options, frozen=True):
    """The options of a parrot."""

    #: Text after each response.
    ending: str = "!"


PARROT = EngineKind(
    name="parrot", summary="repeats the prompt", module="parrots.engine", roles=frozenset({"teacher"}), options=Echo
)
BREVITY = EngineKind(
    name="brevity", summary="1 / words", module="parrots.scorer", roles=frozenset({"quality"}), unit="one over words"
)


def _last(inputs, present, arguments):
    return strategies.by_ranking(range(present.shape[1]), present)


LAST = Strategy(name="last", summary="the last teacher", policy=_last, grid="none", style=("red", "x", ":"))
LINES = Format("lines", "lines.jsonl", lambda path: jsonl(path, lambda row: {"text": row.messages[-1]["content"]}))
TAKEN = Format("alpaca", "other.jsonl", LINES.open)
'''
ENGINE = """
from persyn.llm import options
from persyn.llm.batched import Batched
from persyn.llm.protocols import Generated
from parrots import Echo


def load(spec, tick):
    ending = options.decode(spec, Echo).ending

    def compute(requests):
        yield [Generated(r.id, r.messages[-1]["content"] + ending, "stop", 3, 4, 0.1) for r in requests]

    return Batched(compute, version="parrot 1", chunk=8)
"""
SCORER = """
from persyn.llm.batched import Batched
from persyn.llm.protocols import Judged


def load(spec, tick):
    def compute(requests):
        yield [Judged(request.id, 1 / len(request.response.split())) for request in requests]

    return Batched(compute, version="brevity 1", chunk=8)
"""
ENTRY_POINTS = """
[persyn.engines]
parrot = parrots:PARROT
lost = parrots:NOT_THERE

[persyn.scorers]
brevity = parrots:BREVITY

[persyn.strategies]
last = parrots:LAST
odd = parrots:LINES

[persyn.formats]
lines = parrots:LINES
alpaca = parrots:TAKEN

[persyn.stage]
more = parrots:LAST
"""
Persyn = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def persyn(tmp_path: Path) -> Persyn:
    """Runs commands where the package `parrots` is installed."""
    site = tmp_path / "site"
    for name, text in {
        "parrots/__init__.py": KINDS,
        "parrots/engine.py": ENGINE,
        "parrots/scorer.py": SCORER,
        "parrots-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: parrots\nVersion: 1.0\n",
        "parrots-1.0.dist-info/entry_points.txt": ENTRY_POINTS,
    }.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    path = os.pathsep.join([str(site), os.getcwd()])
    environment = {**os.environ, "PYTHONPATH": path, "PERSYN_HOME": str(tmp_path / "home")}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "persyn.cli", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run


def test_kinds_of_another_package_run_and_appear_in_every_list(persyn: Persyn, tmp_path: Path) -> None:
    assert persyn("init", "--template", "fake", "run").returncode == 0
    file = tmp_path / "run/run.toml"
    text = file.read_text().replace('kind = "fake"', 'kind = "brevity"')
    text = text.replace('model = "bob"\nengine = "fake"', 'model = "bob"\nengine = "parrot"')
    text = text.replace("latency_seconds = 0.1, fail_every = 10", 'ending = "?"')
    file.write_text(text)
    assert tomllib.loads(text)["teachers"][1]["options"] == {"ending": "?"}
    started = persyn("run", "start", "run/run.toml")
    assert started.returncode == 0, started.stderr

    def said(*arguments: str) -> str:
        done = persyn(*arguments)
        assert done.returncode == 0, (arguments, done.stderr)
        return done.stdout

    prompts = json.loads(said("sql", "--json", "SELECT text FROM prompts ORDER BY id LIMIT 1"))[0]["text"]
    responses = json.loads(
        said("sql", "--json", "SELECT text, engine FROM responses WHERE engine = 'parrot 1' ORDER BY prompt_id LIMIT 1")
    )
    assert responses == [{"text": f"{prompts}?", "engine": "parrot 1"}]
    comparison = {row["strategy"]: row for row in json.loads(said("compare", "fake", "--json"))}
    assert comparison["last"]["shares"] == {"bob": 1.0}
    assert "lines" in said("export", "--help")
    said("export", "fake", "--format", "lines", "--output", "lines")
    assert len((tmp_path / "lines/lines.jsonl").read_text().splitlines()) == 40
    said("report", "fake", "--output", "report")
    report = (tmp_path / "report/report.md").read_text()
    assert "one over words" in report
    assert "last" in report
    assert said("audit", "fake")

    # A run of the strategy, and what an unknown name is told.
    file.write_text(text.replace('name = "fake"', 'name = "last"') + '\n[strategy]\nkind = "last"\n')
    assert persyn("run", "start", "run/run.toml").returncode == 0
    shares = said("sql", "--json", "SELECT teacher, assigned FROM v_teacher_cost WHERE run = 'last' ORDER BY position")
    assert json.loads(shares) == [{"teacher": "ada", "assigned": 0}, {"teacher": "bob", "assigned": 40}]
    file.write_text(text.replace('engine = "parrot"', 'engine = "lost"').replace('name = "fake"', 'name = "lost"'))
    refused = persyn("run", "start", "run/run.toml")
    assert refused.returncode == 2
    assert "`teachers[1].engine` is 'lost'; it takes 'vllm'" in refused.stderr
    assert "'parrot'" in refused.stderr
    assert "its plug-in in package parrots was left out: parrots:NOT_THERE cannot be imported" in refused.stderr


def test_doctor_names_plug_ins_and_why_some_were_left_out(persyn: Persyn) -> None:
    done = persyn("doctor", "--json")
    assert done.returncode == 1
    found = {row["what"]: (row[""], row["found"]) for row in json.loads(done.stdout)}
    for what in ("engine parrot", "engine brevity", "strategy last", "format lines"):
        assert found[what] == ("ok", "from package parrots")
    assert found["engine lost"][0] == "error"
    assert "NOT_THERE" in found["engine lost"][1]
    assert "is of type Format; expected Strategy" in found["strategy odd"][1]
    assert "the name 'alpaca' is taken" in found["format alpaca"][1]
    assert "no such group of plug-ins" in found["persyn.stage"][1]
