"""Training and evaluating a run's student on the command line."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import func, select

from persyn.cli.context import cell
from persyn.cli.main import persyn
from persyn.db.catalog import Prompt, Run, RunState, Student
from persyn.db.connect import Database
from persyn.db.trained import Evaluation, Outcome, Training
from persyn.errors import UsageError
from persyn.ingest.rows import parse
from persyn.llm.identity import identify
from persyn.llm.protocols import Failed, Judge
from persyn.operations.deletion import delete_run
from persyn.operations.renaming import rename
from persyn.student import evaluations, trainings
from persyn.student.training_settings import TrainingSettings
from tests.factories import make_assignment, make_response, make_run

TRAIN = ("student", "train", "run", "--learning-rate", "0.01", "--batch-size", "4")


@pytest.fixture
def store(home: Path, tiny: Path) -> Database:
    """A finished run of eight prompts whose student is a real model."""
    database = Database(f"sqlite:///{home / 'persyn.db'}")
    database.require_head()
    with database.write() as session:
        made = make_run(session, prompts=8)
        for number, prompt_id in enumerate(made.prompt_ids):
            teacher_id = made.teacher_ids[number % 2]
            make_response(session, prompt_id, teacher_id, f"The answer is \\boxed{{{number}}}.")
            make_assignment(session, made.id, prompt_id, teacher_id)
        session.get_one(Prompt, made.prompt_ids[0]).content_hash = parse({"prompt": "run: prompt 0?"}).content_hash
        run = session.get_one(Run, made.id)
        run.state = RunState.DONE
        student = session.get_one(Student, run.student_id)
        student.model, student.revision = str(tiny), identify(str(tiny)).revision
        run.config = {
            **run.config,
            "student": {"name": "student", "model": str(tiny)},
            "quality": {"kind": "math"},
        }
    return database


def typed(*arguments: str) -> Result:
    return CliRunner().invoke(persyn, arguments)


def test_from_a_run_to_what_its_student_became(store: Database, tmp_path: Path) -> None:
    trained = typed(*TRAIN, "--epochs", "2")
    assert trained.exit_code == 0, trained.output
    assert "training 1 of run run: 8 rows, 4 steps, loss " in trained.output

    # The last one is a prompt of the run, which the student is not evaluated on.
    asked = [*(f"How much is {n} and {n}?" for n in range(3)), "run: prompt 0?"]
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps({"prompt": text, "answer": "7"}) + "\n" for text in asked))
    evaluated = typed("student", "eval", "run", str(file), "--max-tokens", "4", "--option", "batch_size=2")
    assert evaluated.exit_code == 0, evaluated.output
    by_likelihood = typed("student", "eval", "run", str(file), "--by", "log_likelihood")
    assert by_likelihood.exit_code == 0, by_likelihood.output

    with store.read() as session:
        # Before and after training, with two measures.
        assert session.scalars(select(func.count()).select_from(Evaluation)).one() == 4
        outcomes = session.execute(
            select(Prompt.text, Outcome.response, Outcome.value, Outcome.failure, Outcome.n_tokens).join(Prompt)
        ).all()
        assert len(outcomes) == 12
        assert {row.text for row in outcomes} == set(asked[:3])
        assert all(row.value is not None and row.failure is None for row in outcomes)
        assert sum(row.response is None for row in outcomes) == 6  # likelihoods need no response
        assert {row.n_tokens for row in outcomes} == {None, 2}  # "7" and its end

    compared = typed("compare", "--students", "--json")
    facts = json.loads(compared.output)
    assert {(fact["by"], fact["strategy"]) for fact in facts} == {
        ("math", "persyn"),
        ("math", "untrained"),
        ("log_likelihood", "persyn"),
        ("log_likelihood", "untrained"),
    }
    perplexities = [(fact["perplexity"], fact["value"]["mean"]) for fact in facts if fact["by"] == "log_likelihood"]
    assert [given for given, _ in perplexities] == [pytest.approx(math.exp(loss)) for _, loss in perplexities]
    assert "perplexity" in by_likelihood.output
    assert cell(perplexities[0][0]) in by_likelihood.output
    listed = json.loads(typed("student", "list", "--json").output)
    assert [(row["run"], row["evaluations"]) for row in listed] == [("run", 2)]


def test_what_is_there_is_not_done_again(store: Database, tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text('{"prompt": "How much?", "answer": "7"}\n')
    once, again = (typed(*TRAIN, "--epochs", "1").output for _ in range(2))
    assert once.splitlines()[-2:] == again.splitlines()[-2:]
    command = "student", "eval", "run", str(file), "--by", "log_likelihood"
    assert typed(*command).exit_code == 0
    with store.write() as session:
        session.execute(Outcome.__table__.update().values(value=-99.0))  # type: ignore[attr-defined]

    assert typed(*command).exit_code == 0

    with store.read() as session:
        assert session.scalars(select(func.count()).select_from(Training)).one() == 1
        assert set(session.scalars(select(Outcome.value))) == {-99.0}


def test_another_answer_than_the_stored_one_is_refused_and_leaves_nothing(store: Database, tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text('{"prompt": "How much?", "answer": "7"}\n')
    assert typed("prompts", "import", str(file)).exit_code == 0
    file.write_text('{"prompt": "New?", "answer": "1"}\n{"prompt": "How much?", "answer": "8"}\n')

    refused = typed("student", "eval", "run", str(file), "--by", "math")
    file.write_text('{"q": "New?", "gold": "1"}\n{"q": "How much?", "gold": "8"}\n')
    mapped = typed("student", "eval", "run", str(file), "--by", "math", "--map", "prompt=q", "--map", "answer=gold")

    assert str(mapped.exception) == str(refused.exception)
    with store.read() as session:
        prompt_id = session.scalars(select(Prompt.id).where(Prompt.text == "How much?")).one()
        assert session.scalars(select(Prompt).where(Prompt.text == "New?")).all() == []
        assert session.scalars(select(Evaluation)).all() == []
    assert str(refused.exception) == (
        "test.jsonl: the prompt 'How much?' has answer '8', but '7' is stored with it "
        f"('persyn prompts show {prompt_id}'), which would be used to score its responses; "
        "give the row the same answer or none, or remove it"
    )


def test_a_scorer_that_says_nothing_leaves_the_answer(store: Database, tmp_path: Path) -> None:
    """A judge may return an empty reply; the student's response is then kept."""
    file = tmp_path / "test.jsonl"
    file.write_text('{"prompt": "How much?", "answer": "7"}\n')
    assert typed("student", "eval", "run", str(file), "--by", "log_likelihood").exit_code == 0
    with store.write() as session:
        outcome = session.scalars(select(Outcome)).one()
        outcome.response, outcome.value = "It is 7.", None
        asked = evaluations._Asked(outcome.evaluation_id, outcome.prompt_id, Judge(0, [], "It is 7."))
        session.flush()
        evaluations._store(session, asked, Failed(0, "empty: finished by length (first verdict)"))
        session.refresh(outcome)

        assert (outcome.response, outcome.value) == ("It is 7.", None)
        assert outcome.failure == "empty: finished by length (first verdict)"


def test_removed_weights_are_made_again(store: Database) -> None:
    assert typed(*TRAIN, "--epochs", "1").exit_code == 0
    with store.read() as session:
        path = Path(session.scalars(select(Training.path)).one())
    shutil.rmtree(path)

    assert typed(*TRAIN, "--epochs", "1").exit_code == 0

    assert (path / "config.json").is_file()
    with store.read() as session:
        assert session.scalars(select(func.count()).select_from(Training)).one() == 1


def test_a_student_learns_what_its_dataset_was_exported_with(store: Database, home: Path) -> None:
    whole = typed(*TRAIN, "--epochs", "1")
    assert typed("export", "run", "--cap", "3", "--split", "test=0.6").exit_code == 0
    learned, held_out = (
        (home / "datasets" / "run" / f"messages-{split}.jsonl").read_text().count("\n") for split in ("train", "test")
    )

    filtered = typed(*TRAIN, "--epochs", "1")
    again = typed(*TRAIN, "--epochs", "1")
    assert typed("export", "run").exit_code == 0
    unfiltered = typed(*TRAIN, "--epochs", "1")

    assert learned + held_out == 6  # three of each teacher
    assert held_out
    assert f"training 2 of run run: {learned} rows of the run's 8, 1 steps" in filtered.output
    assert filtered.output.startswith("on the dataset as it was exported: persyn export run --split test=0.6 --cap 3\n")
    assert again.output.splitlines()[-2:] == filtered.output.splitlines()[-2:]
    assert unfiltered.output.splitlines()[-2:] == whole.output.splitlines()[-2:]
    assert "training 1 of run run: 8 rows, 2 steps" in unfiltered.output


def test_a_dataset_whose_rows_cannot_be_found_again_is_not_trained_on(store: Database, tmp_path: Path) -> None:
    benchmark = tmp_path / "bench.jsonl"
    benchmark.write_text('{"question": "What is the sense of all this?"}\n')
    assert typed("export", "run", "--decontaminate", str(benchmark)).exit_code == 0
    assert "8 rows, 2 steps" in typed(*TRAIN, "--epochs", "1").output
    benchmark.unlink()

    assert str(typed(*TRAIN).exception) == (
        f"the dataset of run run cannot be recreated as it was exported: there is no file {benchmark}; "
        "'persyn export run' with other options writes a new one"
    )


def test_a_killed_training_is_done_once_when_it_is_begun_again(store: Database, home: Path) -> None:
    command = [sys.executable, "-m", "persyn.cli", *TRAIN, "--epochs", "30"]
    first = subprocess.Popen(command, env=os.environ, stderr=subprocess.PIPE, text=True)
    assert first.stderr is not None
    assert "train: " in next(line for line in first.stderr if line.startswith("train: "))
    refused = typed(*TRAIN, "--epochs", "30")
    first.send_signal(signal.SIGKILL)
    first.communicate()

    again = typed(*TRAIN, "--epochs", "30")

    assert "another process is training in" in str(refused.exception)
    assert again.exit_code == 0, again.output
    with store.read() as session:
        (training,) = session.scalars(select(Training))
    assert training.notes["steps"] == 60
    assert Path(training.path).parent.parent == home / "students"


def test_a_run_is_renamed_or_deleted_while_its_student_is_trained(store: Database, home: Path) -> None:
    settings = TrainingSettings(epochs=1, learning_rate=0.01, batch_size=4)
    with store.read() as session:
        run_id = session.scalars(select(Run.id)).one()

    def train(name: str, meanwhile: Callable[[], object]) -> Training:
        def step(done: int, steps: int, loss: float | None) -> None:
            if done == 1:
                meanwhile()

        return trainings.train(store, name, settings, gpus=0, home=home, progress=step)

    made = train("run", lambda: rename(store, run_id, "two", home, actor="me"))
    assert train("two", pytest.fail).id == made.id

    shutil.rmtree(made.path)
    with pytest.raises(UsageError, match=f"no longer in the store; the trained student is in {home}/students/two-"):
        train("two", lambda: delete_run(store, run_id, home, actor="me"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("student", "train", "none"), "there is no run named 'none'"),
        (("student", "train", "run", "--epochs", "0"), "--Expected `int` >= 1 - at `$.epochs`"),
        (("student", "eval", "run", "missing.jsonl"), "missing.jsonl"),
        (("student", "eval", "run", "x.jsonl", "--option", "batch"), "--option takes KEY=VALUE"),
        (("compare", "--students", "run"), "no student of these runs has been evaluated"),
        (("compare", "--students", "--alpha", "1"), "cannot be combined with other options"),
        (("compare",), "give the name of a run"),
    ],
)
def test_what_cannot_be_done_is_said(store: Database, arguments: tuple[str, ...], said: str) -> None:
    result = typed(*arguments)

    assert result.exception is not None
    assert said in str(result.exception)


def test_a_quality_that_cannot_judge_a_student_is_said_with_what_can(store: Database, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"prompt": "How much?", "answer": "7"}\n')
    with store.write() as session:
        run = session.scalars(select(Run)).one()
        run.config = {**run.config, "quality": {"kind": "imported", "model": "right"}}
    done = typed("student", "eval", "run", str(tmp_path / "test.jsonl"))
    assert "quality is imported, which cannot score a student's responses; choose a scorer, such as --by math" in str(
        done.exception
    )


def test_a_run_that_is_not_done_is_not_trained_on(store: Database) -> None:
    with store.write() as session:
        session.execute(Run.__table__.update().values(state=RunState.RUNNING))  # type: ignore[attr-defined]

    assert "'persyn run resume run' continues it" in str(typed(*TRAIN).exception)


def test_a_student_that_has_changed_is_not_trained(store: Database) -> None:
    with store.write() as session:
        session.execute(Student.__table__.update().values(revision="sha256:other"))  # type: ignore[attr-defined]

    assert "has changed" in str(typed(*TRAIN).exception)
