"""The files written by `persyn init` work unchanged, or after filling in an address."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from persyn.cli.init import init
from persyn.errors import UsageError
from persyn.runs import run_file
from persyn.runs.start import identities
from tests.cli.conftest import Persyn

TEMPLATES = init.params[1].type.choices  # type: ignore[attr-defined]


def write(folder: Path, *options: str) -> str:
    return CliRunner().invoke(init, [str(folder), *options], catch_exceptions=False).output


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_is_a_run_file_with_rows_beside_it(tmp_path: Path, template: str) -> None:
    said = write(tmp_path, "--template", template)
    read = run_file.read(tmp_path / "run.toml")
    assert read.run.name == template  # names do not clash in one store
    rows = (tmp_path / ("grid.jsonl" if template == "imported" else "prompts.jsonl")).read_text().splitlines()
    # The cluster's prompts are to be supplied by the user.
    assert template == "cluster" or read.run.calibration < len(rows)
    assert re.search(r"^next: .*run.toml$", said, re.MULTILINE)


def test_the_next_command_can_be_copied_whatever_the_folder_is_called(tmp_path: Path) -> None:
    folder = tmp_path / "my run's"

    (command,) = re.findall(r"next: (.*)", write(folder))

    assert shlex.split(command) == ["persyn", "run", "start", str(folder / "run.toml")]


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("mine")
    with pytest.raises(UsageError, match=r"prompts.jsonl exists already"):
        write(tmp_path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("prompts.jsonl", "mine")]


def test_without_a_model_and_without_a_hub_the_next_command_makes_a_dataset(persyn: Persyn, tmp_path: Path) -> None:
    write(tmp_path / "new", "--template", "fake")
    done = persyn("run", "start", "new/run.toml")
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "home/datasets/fake/messages.jsonl").read_text().splitlines()) >= 30


def test_where_a_model_cannot_be_had_it_is_said_what_needs_none(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(UsageError, match=r"SmolLM2-360M.*persyn init --template fake"):
        identities(run_file.read(tmp_path / "run.toml"))


def test_the_imported_rows_and_their_scores_are_taken_as_the_next_command_says(persyn: Persyn, tmp_path: Path) -> None:
    said = write(tmp_path / "new", "--template", "imported").replace(str(tmp_path), ".")
    (command,) = re.findall(r"persyn (responses import .*) &&", said)
    done = persyn(*command.split())
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("80 rows: 80 new")
