"""A run that cannot tell whether routing pays, from its start to its dataset."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Persyn
from tests.run_files import PROMPTS, write_run


def test_an_unsure_run_gives_the_rest_to_one_teacher_and_says_so_everywhere(persyn: Persyn, tmp_path: Path) -> None:
    file = write_run(tmp_path, when_unsure="static")
    started = persyn("run", "start", str(file))
    assert started.returncode == 0, started.stderr
    assert "\nverdict: cannot tell: the router's expected gain over the best single teacher, " in started.stdout
    assert "\n  decided on the verdict 'cannot tell': all remaining prompts are assigned to " in started.stdout

    found = json.loads(persyn("router", "verdict", "test", "--json").stdout)
    verdict = found["verdict"]
    assert (verdict["outcome"], verdict["n_measured"], verdict["n_prompts"]) == ("cannot tell", 12, PROMPTS - 12)
    assert [at["alpha"] for at in verdict["alphas"]] == [0, 0.2, 0.4, 0.6, 1]
    assert json.loads(persyn("run", "status", "test", "--json").stdout)["verdict"] == found

    shown = persyn("router", "verdict", "test").stdout
    assert shown.startswith(f"verdict: {found['says']}\n  {found['decided']}\n")
    assert "one teacher leads in every group" not in shown  # there are no groups
    asked = persyn("sql", "select reason, teacher, count(*) from v_dataset group by 1, 2 order by 3 desc").stdout
    assert f"verdict: cannot tell  {verdict['teacher']}" in asked

    dataset = tmp_path / "home" / "datasets" / "test"
    assert json.loads((dataset / "manifest.json").read_text())["router"] is None
    assert "did not show that a router would choose better" in (dataset / "README.md").read_text()
    assert persyn("report", "test", "-o", "report.md").returncode == 0
    report = (tmp_path / "report.md").read_text()
    assert "## Does routing pay?\n\nCannot tell" in report

    assert persyn("router", "verdict", "test", "--by", "topic").returncode == 2


def test_a_run_without_a_router_has_no_verdict_and_says_why(persyn: Persyn, tmp_path: Path) -> None:
    assert persyn("run", "start", str(write_run(tmp_path, prompts=12, strategy="random"))).returncode == 0
    asked = persyn("router", "verdict", "test")

    assert asked.returncode == 2
    assert "run 'test' has no verdict: its strategy is random" in asked.stderr
    assert "verdict" not in persyn("run", "status", "test").stdout
