"""A budget is checked when a run file is read, and is no part of what identifies a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from persyn.config import RunConfig, load_config
from persyn.errors import UsageError
from persyn.runs import run_file
from tests.run_files import write_run


def read(folder: Path, budget: str, *, engine: str = "fake") -> RunConfig:
    options = {"base_url": "http://127.0.0.1:1/v1"} if engine == "openai" else {}
    file = write_run(folder, engine=engine, options=options)
    file.write_text(file.read_text() + budget)
    return run_file.read(file)


def test_a_budget_changes_neither_the_digest_nor_a_stored_configuration_without_one(tmp_path: Path) -> None:
    plain, limited = read(tmp_path, ""), read(tmp_path, "[budget]\nusd = 5\ndeadline = 2026-12-24T18:00:00+01:00\n")
    assert "budget" not in plain.frozen()
    assert limited.digest() == plain.digest()
    assert load_config(limited.frozen()) == limited
    assert limited.budget is not None
    assert limited.budget.deadline is not None
    assert limited.budget.deadline.isoformat() == "2026-12-24T18:00:00+01:00"


@pytest.mark.parametrize(
    ("budget", "engine", "said"),
    [
        ("[budget.stages.calibration]\nusd = 1\n", "fake", r"\[budget.stages.calibration\]: the run's stages are cal"),
        (
            "[budget.teachers.eve]\ntokens = 1\n",
            "fake",
            r"\[budget.teachers.eve\]: the run's teachers are ada, bob, cyd",
        ),
        ("[budget.teachers.ada]\ntokens = 0\n", "fake", r"`budget.teachers.ada.tokens` must be an integer >= 1, got 0"),
        ("[budget.stages.score]\neuro = 1\n", "fake", r"unknown key 'euro' in \[budget.stages.score\]"),
        ("[budget]\nusd = 1\n", "openai", r"usd needs price_in and price_out of teacher ada, teacher bob, teacher cyd"),
        (
            "[budget]\ndeadline = 2026-12-24T18:00:00\n",
            "fake",
            r"`budget.deadline` must be a date and time with its time",
        ),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(tmp_path: Path, budget: str, engine: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read(tmp_path, budget, engine=engine)
