"""`persyn run recalibrate`, alone and while prompts are added: what is said before and after."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Persyn
from tests.run_files import PROMPTS, write_run


def test_a_run_is_recalibrated_and_says_what_changed(persyn: Persyn, tmp_path: Path) -> None:
    done = persyn("run", "start", str(write_run(tmp_path)))
    assert done.returncode == 0, done.stderr
    rows = [{"prompt": f"What is {n} plus {n}?", "answer": str(2 * n)} for n in range(PROMPTS, PROMPTS + 10)]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    planned = persyn("run", "recalibrate", "test", "--prompts", "4", "--plan")
    assert planned.returncode == 0, planned.stderr
    assert f"{PROMPTS} prompts, 16 of them for all teachers" in planned.stdout
    status = json.loads(persyn("run", "status", "test", "--json").stdout)
    assert (status["state"], status["recalibrations"]) == ("done", [])

    added = persyn("run", "extend", "test", str(tmp_path / "more.jsonl"), "--recalibrate", "3")

    assert added.returncode == 0, added.stderr
    asked = (
        "all teachers are asked 3 more prompts, 2 of them from extensions; 0 prompts without a response are assigned"
    )
    assert asked in added.stdout
    said = "recalibration 1: all teachers were asked 3 more prompts, 2 of them from extensions; reward of the router"
    assert said in added.stdout
    status = json.loads(persyn("run", "status", "test", "--json").stdout)
    (made,) = status["recalibrations"]
    assert (made["prompts"], made["of_extensions"], made["change"]["number"]) == (3, 2, 1)
    manifest = json.loads((tmp_path / "home" / "datasets" / "test" / "manifest.json").read_text())
    assert (manifest["assigned"], manifest["recalibrations"][0]["prompts"]) == (PROMPTS + 10, 3)
    assert persyn("report", "test", "-o", "report.md").returncode == 0
    assert "all teachers were asked 3 more prompts" in (tmp_path / "report.md").read_text()


def test_what_cannot_be_recalibrated_is_refused(persyn: Persyn, tmp_path: Path) -> None:
    done = persyn("run", "start", str(write_run(tmp_path, prompts=20, strategy="static")))
    assert done.returncode == 0, done.stderr

    refused = persyn("run", "recalibrate", "test", "--prompts", "3")

    assert refused.returncode == 2
    assert "cannot be recalibrated: its strategy is static, which uses no router" in refused.stderr
    both = persyn("run", "extend", "test", "more.jsonl", "--plan", "--recalibrate", "3")
    assert (both.returncode, "exclude each other" in both.stderr) == (2, True)
