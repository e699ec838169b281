"""`persyn run extend`: what is said before money is spent, and what is written at the end."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Persyn
from tests.run_files import PROMPTS, write_run

FRUITS = ("apple", "pear", "plum", "fig", "lime", "mango")


def test_prompts_of_another_kind_are_refused_before_anything_is_spent_and_added_anyway_if_asked(
    persyn: Persyn, tmp_path: Path
) -> None:
    done = persyn("run", "start", str(write_run(tmp_path, calibration=30, holdout=0.1)))
    assert done.returncode == 0, done.stderr
    strange = [f"Translate the poem about the {one} and the {other}." for one in FRUITS for other in FRUITS[:2]]
    strange += ["What is 7 plus 7?"]  # it is in the run
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in strange))
    more = str(tmp_path / "more.jsonl")

    refused = persyn("run", "extend", "test", more)
    planned = persyn("run", "extend", "test", more, "--plan")

    assert refused.returncode == 2
    assert (
        "12 of 12 new prompts (100%) are far from all 27 calibration prompts, judged by their words" in refused.stderr
    )
    assert "such as 'Translate the poem about the" in refused.stderr
    assert "--recalibrate N (or add them with --anyway, then: persyn run recalibrate test --prompts N" in refused.stderr
    assert planned.returncode == 0, planned.stderr
    assert f"{PROMPTS + 12} prompts" in planned.stdout
    status = json.loads(persyn("run", "status", "test", "--json").stdout)
    assert (status["prompts"], status["state"], status["extensions"]) == (PROMPTS, "done", [])

    added = persyn("run", "extend", "test", more, "--anyway")

    assert added.returncode == 0, added.stderr
    assert "12 prompts were added to run test\n" in added.stdout
    assert "extension 1: 12 prompts were added from more.jsonl" in added.stdout
    folder = tmp_path / "home" / "datasets" / "test"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["assigned"] == PROMPTS + 12
    assert [(each["number"], each["prompts"], each["far"]) for each in manifest["extensions"]] == [(1, 12, 1.0)]
    again = persyn("run", "extend", "test", more)
    assert again.returncode == 0
    assert "run test has all of these prompts already; nothing was added" in again.stdout
