"""Engines, scorers, strategies and formats of another installed package, in every list that shows kinds."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

from tests import forked
from tests.test_howto import HOWTO, blocks

PAGE = HOWTO / "plugins.md"
#: Plug-ins that are left out.
FLAWED = """
[persyn.engines]
parrot = parrots:PARROT
lost = parrots:NOT_THERE

[persyn.strategies]
last = parrots:LAST
odd = parrots:LINES

[persyn.formats]
lines = parrots:LINES
alpaca = flawed:ALPACA

[persyn.stage]
more = parrots:LAST
"""
Persyn = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder on the path with the package of the how-to page, as pip installs it."""
    site = tmp_path / "site"
    written = {block.mark.removeprefix("file: "): block.text for block in blocks(PAGE) if block.mark}
    project = tomllib.loads(written.pop("pyproject.toml"))["project"]
    points = "".join(
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in of_group.items())
        for group, of_group in project["entry-points"].items()
    )
    written["parrots-1.0.dist-info/METADATA"] = "Metadata-Version: 2.1\nName: parrots\nVersion: 1.0\n"
    written["parrots-1.0.dist-info/entry_points.txt"] = points
    for name, text in written.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    return site


@pytest.fixture
def persyn(site: Path, tmp_path: Path) -> Iterator[Persyn]:
    """Runs commands where that package is installed, as it is at the first command."""
    path = os.pathsep.join([str(site), forked.MODULES])
    environment = {**os.environ, "PYTHONPATH": path, "PERSYN_HOME": str(tmp_path / "home")}
    told = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}

    with ExitStack() as stack:
        folder = cache(lambda: stack.enter_context(forked.running(path)))
        yield lambda *arguments: subprocess.run([folder() / "persyn", *arguments], **told, check=False)


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

    answered = "SELECT p.text AS prompt, r.text FROM responses r JOIN prompts p ON p.id = r.prompt_id"
    responses = json.loads(said("sql", "--json", f"{answered} WHERE r.engine = 'parrot 1' AND r.text IS NOT NULL"))
    assert responses
    assert all(row["text"] == f"{row['prompt']}?" for row in responses)
    comparison = {row["strategy"]: row for row in json.loads(said("compare", "fake", "--json"))[0]["strategies"]}
    assert comparison["last"]["shares"] == {"bob": 1.0}
    assert "lines" in said("export", "--help")
    said("export", "fake", "--format", "lines", "--output", "lines")
    assert len((tmp_path / "lines/lines.jsonl").read_text().splitlines()) == 40
    said("report", "fake", "--output", "report.md")
    report = (tmp_path / "report.md").read_text()
    assert "one over words" in report
    assert "last" in report
    assert said("audit", "fake")

    # A run of the strategy, and what an unknown name is told.
    file.write_text(text.replace('name = "fake"', 'name = "last"').replace("[strategy]", '[strategy]\nkind = "last"'))
    assert persyn("run", "start", "run/run.toml").returncode == 0
    shares = said("sql", "--json", "SELECT teacher, assigned FROM v_teacher_cost WHERE run = 'last' ORDER BY position")
    assert json.loads(shares) == [{"teacher": "ada", "assigned": 0}, {"teacher": "bob", "assigned": 40}]


def test_a_plug_in_with_a_flaw_is_named_and_left_out(persyn: Persyn, site: Path, tmp_path: Path) -> None:
    (site / "parrots-1.0.dist-info/entry_points.txt").write_text(FLAWED)
    (site / "flawed.py").write_text(
        "from parrots import Format, LINES\nALPACA = Format('alpaca', 'other.jsonl', LINES.open)\n"
    )
    done = persyn("doctor", "--json")
    assert done.returncode == 1
    found = {row["what"]: (row[""], row["found"]) for row in json.loads(done.stdout)}
    for what in ("engine parrot", "strategy last", "format lines"):
        assert found[what] == ("ok", "from package parrots")
    assert found["engine lost"][0] == "error"
    assert "NOT_THERE" in found["engine lost"][1]
    assert "is of type Format; expected Strategy" in found["strategy odd"][1]
    assert "the name 'alpaca' is taken" in found["format alpaca"][1]
    assert "no such group of plug-ins" in found["persyn.stage"][1]

    assert persyn("init", "--template", "fake", "run").returncode == 0
    file = tmp_path / "run/run.toml"
    file.write_text(file.read_text().replace('model = "bob"\nengine = "fake"', 'model = "bob"\nengine = "lost"'))
    refused = persyn("run", "start", "run/run.toml")
    assert refused.returncode == 2
    assert "teacher bob: `teachers.engine` is 'lost'; allowed: 'vllm'" in refused.stderr
    assert "'parrot'" in refused.stderr
    assert "its plug-in in package parrots was left out: parrots:NOT_THERE cannot be imported" in refused.stderr
