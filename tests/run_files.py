"""Write run files for tests that work a whole run on fake models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROMPTS = 60
TEACHERS = ("ada", "bob", "cyd")


def write_run(
    folder: Path,
    *,
    prompts: int = PROMPTS,
    teachers: Sequence[str] = TEACHERS,
    engine: str = "fake",
    options: dict[str, Any] | None = None,
    strategy: str = "persyn",
    fit_seconds: float = 0.0,
    when_unsure: str = "route",
    **run: Any,
) -> Path:
    """Write a run file and its prompts; `engine` and `options` are the teachers', `run` goes into [run].

    fit_seconds: how long fitting the router takes.
    The teachers have 1, 2, 3, ... billion parameters; the first belongs to the student's family.
    """
    questions = [{"id": str(n), "prompt": f"What is {n} plus {n}?", "answer": str(2 * n)} for n in range(prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    table = {"name": "test", "setting": "math", "calibration": 12, "holdout": 0.25, "job_prompts": 8, **run}
    lines = [
        "[run]",
        *(f"{key} = {json.dumps(value)}" for key, value in table.items()),
        '[prompts]\nfile = "prompts.jsonl"',
        f'[student]\nname = "student"\nmodel = "student"\nengine = "fake"\nfamily = "{teachers[0]}"',
        '[quality]\nkind = "fake"',
        '[router]\nbackbone = "backbone"\nengine = "fake"',
        *([f"options = {{ latency_seconds = {fit_seconds} }}"] if fit_seconds else []),
        f'[strategy]\nkind = "{strategy}"\nwhen_unsure = "{when_unsure}"',
    ]
    for size, teacher in enumerate(teachers, 1):
        inline = ", ".join(f"{key} = {json.dumps(value)}" for key, value in (options or {}).items())
        lines.append(f'[[teachers]]\nname = "{teacher}"\nmodel = "{teacher}"\nengine = "{engine}"\ngpus = 0')
        lines.append(f'family = "{teacher}"\nparams_b = {size}')
        lines.append(f"options = {{ {inline} }}")
    file = folder / "run.toml"
    file.write_text("\n".join(lines) + "\n")
    return file
