"""The how-to page about custom strategies works as written."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from tests.cli.conftest import Persyn
from tests.router.test_strategy import KNOWN

PAGE = (Path(__file__).parents[2] / "docs/howto/own-strategy.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_example_runs_and_is_compared_with_the_other_strategies(persyn: Persyn, tmp_path: Path) -> None:
    (module,), (table,), (begin, following) = blocks("python"), blocks("toml"), blocks("sh")
    assert persyn(*begin.split()[1:]).returncode == 0
    (tmp_path / "trial" / "my_strategies.py").write_text(module)
    run_file = tmp_path / "trial" / "run.toml"
    without, count = re.subn(r"^\[strategy\]\n(?:.+\n)*", table, run_file.read_text(), flags=re.MULTILINE)
    assert count == 1
    run_file.write_text(without)
    path, started, compared, asked = following.splitlines()
    assert path == "export PYTHONPATH=$PWD/trial"
    there = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "trial"), os.environ.get("PYTHONPATH", "")])}

    done = persyn(*started.split()[1:], **there)
    assert done.returncode == 0, done.stderr
    counted = persyn("sql", asked.split('"')[1], "--json", **there)
    assert json.loads(counted.stdout) == [
        {"reason": "calibration", "prompts": 16},
        {"reason": "python: my_strategies:by_group", "prompts": 24},
    ]
    (found,) = json.loads(persyn(*compared.split()[1:], "--json", **there).stdout)
    by_name = {fact["strategy"]: fact for fact in found["strategies"]}
    assert {"my_strategies:by_group", "static", "random", "oracle"} <= by_name.keys()
    assert sum(by_name["my_strategies:by_group"]["shares"].values()) == 1.0
    card = (tmp_path / "home/datasets/fake/README.md").read_text().replace("\\", "")
    assert "my_strategies:by_group at sha256:" in card

    # Elsewhere the module does not exist, and the other strategies are still compared.
    elsewhere = persyn(*compared.split()[1:])
    assert elsewhere.returncode == 0
    assert "unavailable: my_strategies:by_group: cannot find the module 'my_strategies'" in elsewhere.stdout


def test_the_function_that_needs_no_grid_goes_by_size() -> None:
    (module,) = blocks("python")
    space: dict[str, Any] = {}
    exec(module, space)
    prompts = [{"messages": [{"role": "user", "content": "x" * length}], "meta": {}} for length in (200, 201)]
    found = space["by_length"](prompts, KNOWN)
    np.testing.assert_array_equal(found, np.array([[-1, np.nan, -70], [1, np.nan, 70]]))
