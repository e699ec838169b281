"""Preflight checks of chat templates."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from tests.cli.conftest import Persyn
from tests.cli.test_commands import require_refused
from tests.llm.families import FAULTY, SOUND, tokenizer
from tests.run_files import write_run


def with_student(folder: Path, template: str) -> str:
    """A run file whose student has this chat template and no weights."""
    model = folder / "student"
    tokenizer(template).save_pretrained(model)
    LlamaConfig().save_pretrained(model)
    file = write_run(folder)
    given = f'model = "{model}"\nengine = "log_likelihood"\ngpus = 0'
    file.write_text(file.read_text().replace('model = "student"\nengine = "fake"', given))
    return str(file)


@pytest.mark.parametrize("command", ["run start", "teachers check"])
def test_a_student_whose_template_loses_text_is_refused_before_calibration(
    persyn: Persyn, tmp_path: Path, command: str
) -> None:
    template, said = FAULTY["drops user turns"]
    file = with_student(tmp_path, template)

    done = persyn(*command.split(), file)

    assert done.returncode != 0
    assert "the student" in done.stdout + done.stderr
    assert said in " ".join((done.stdout + done.stderr).split())
    if command == "run start":
        require_refused(done, "correct the chat template")


@pytest.mark.parametrize(
    ("opened", "is_named"),
    [
        pytest.param("<think>", False, id="known, so that the reasoning is told from the answer"),
        pytest.param("<my_thoughts>", True, id="unknown, so that the reasoning would stay in responses"),
    ],
)
def test_a_template_that_opens_the_reasoning_is_named_at_the_start_if_its_marker_is_unknown(
    persyn: Persyn, tmp_path: Path, opened: str, is_named: bool
) -> None:
    template, _ = SOUND["deepseek r1"]
    done = persyn("teachers", "check", with_student(tmp_path, template.replace("><think>", f">{opened}")))

    of_student = [" ".join(line.split()) for line in done.stdout.splitlines() if "the student" in line]
    named = f"warning the student reasoning the generation prompt opens {opened}, which PerSyn does not know"
    assert [line.startswith(named) for line in of_student] == [True] * is_named
    assert done.returncode == 0, done.stdout + done.stderr
