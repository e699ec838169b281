"""`persyn student`: train and evaluate a run's student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec
from sqlalchemy import func, select

from persyn.cli.context import JSON, RUN, show, store
from persyn.cli.imports import NAMES, renamed
from persyn.cli.progress import Meter
from persyn.config import Sampling
from persyn.db.catalog import Run, Student
from persyn.db.trained import Evaluation, Training
from persyn.errors import UsageError
from persyn.ingest.layouts import PROMPT
from persyn.method.intervals import Interval
from persyn.settings import Settings
from persyn.student import outcomes

#: What a training takes, the first one first.
_TRAINING = (
    click.option("--tune", type=click.Choice(["full", "lora"]), default="full", help="What to train. Default: full."),
    click.option("--epochs", type=int, default=3, show_default=True, help="Passes over the dataset."),
    click.option("--learning-rate", type=float, help="Default: 1e-5 for full, 2e-4 for lora."),
    click.option("--batch-size", type=int, default=16, show_default=True, help="Conversations per step."),
    click.option("--micro-batch", type=int, help="Rows of a batch in memory at a time. Default: all."),
    click.option("--lora-rank", type=int, default=16, show_default=True),
)


def training_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a training to a command."""
    for option in reversed(_TRAINING):
        command = option(command)
    return command


@click.group()
def student() -> None:
    """Train students on the datasets of runs, and evaluate them."""


@student.command(short_help="Train a run's student on its dataset.")
@RUN
@training_options
@click.option("--max-tokens", type=int, help="Longer conversations are dropped. Default: the student's context length.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--gpus", type=click.IntRange(0, 1), default=0, show_default=True, help="0 trains on the CPU.")
def train(run: str, gpus: int, **given: Any) -> None:
    """Train the student of RUN on its dataset; the loss covers only the responses.

    The dataset is the one exported last to PERSYN_HOME/datasets/RUN: the rows that its filters keep,
    of the split train if it has splits. Without such an export it is every response.

    The trained weights are stored in PERSYN_HOME/students. An interrupted training continues from its last
    checkpoint when the same command is repeated; a finished one is not repeated.
    """
    from transformers.utils import logging

    from persyn.student import trainings
    from persyn.student.train import TrainingSettings as Training

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    try:
        settings = msgspec.convert(given, Training)
    except msgspec.ValidationError as error:
        raise UsageError(f"--{str(error).replace('_', '-')}") from error
    home = Settings.from_environment().home
    options = trainings.exported(run, home)
    if options.filters or options.splits:
        click.echo(f"on the dataset as it was exported: {options.command(run)}")
    with store() as database:
        with Meter() as meter:
            made = trainings.train(
                database,
                run,
                settings,
                gpus=gpus,
                home=home,
                progress=lambda done, total, loss: meter.show(
                    "train", total, done, "" if loss is None else f"loss {loss:.3f}"
                ),
            )
        with database.read() as session:
            n_responses = trainings.n_responses(session, made.run_id)
    notes = made.notes
    of_run = f" of the run's {n_responses:,}" if notes["n_rows"] + notes["n_left_out"] < n_responses else ""
    left_out = f", {notes['n_left_out']:,} too long" if notes["n_left_out"] else ""
    click.echo(
        f"training {made.id} of run {run}: {notes['n_rows']:,} rows{of_run}{left_out}, {notes['steps']:,} steps, "
        f"loss {notes['losses'][0][1]:.3f} to {notes['losses'][-1][1]:.3f} nats per token, {notes['seconds']:.0f} s"
    )
    click.echo(f"weights: {made.path}")


@student.command("eval", short_help="Evaluate a student: generate responses to prompts and score them.")
@RUN
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@NAMES
@click.option(
    "--by",
    type=click.Choice(["math", "instructions", "code", "log_likelihood"]),
    help="Scorer: math, instructions, code, or log_likelihood (the likelihood of the reference answers). "
    "Default: the run's quality.",
)
@click.option(
    "--engine", type=click.Choice(["vllm", "transformers"]), help="Default: vllm on a GPU, else transformers."
)
@click.option("--gpus", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--max-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Per response.")
@click.option("--retry-failed", is_flag=True, help="Retry earlier failures.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="An option of the engine.")
def evaluate(
    run: str,
    files: tuple[Path, ...],
    names: tuple[str, ...],
    by: str | None,
    engine: str | None,
    options: tuple[str, ...],
    **given: Any,
) -> None:
    """Evaluate the student of RUN on the prompts of FILES, before training and after each of its trainings.

    Prompts of the run itself are left out: a student must be evaluated on prompts it was not trained on.
    Responses are decoded greedily and stored; stored ones are not generated again.
    """
    from persyn.student.evaluations import Evaluator, GenerationSettings

    wanted = GenerationSettings(
        engine=engine or ("vllm" if given["gpus"] else "transformers"),
        gpus=given["gpus"],
        options=dict(_option(text) for text in options),
        sampling=Sampling(max_tokens=given["max_tokens"], temperature=0.0),
    )
    with store() as database:
        with Meter() as meter:
            evaluator = Evaluator(database, Settings.from_environment(), meter.show, renamed(names, PROMPT))
            evaluator.evaluate(run, files, by=by, how=wanted, retry_failed=given["retry_failed"])
        with database.read() as session:
            found = session.scalars(select(Run).where(Run.name == run)).all()
            show_students(outcomes.compare(session, found), as_json=False)


@student.command("list")
@JSON
def list_trainings(as_json: bool) -> None:
    """List the trainings, and how many evaluations each has."""
    evaluated = select(func.count()).where(Evaluation.training_id == Training.id).scalar_subquery()
    with store() as database, database.read() as session:
        rows = session.execute(
            select(Training.id, Run.name, Student.name, Training.settings, evaluated, Training.path)
            .join(Run, Run.id == Training.run_id)
            .join(Student, Student.id == Training.student_id)
            .order_by(Training.id)
        ).all()
    show(("training", "run", "student", "settings", "evaluations", "path"), rows, as_json=as_json)


def show_students(facts: list[outcomes.StudentFacts], *, as_json: bool) -> None:
    """Print the comparison of students."""
    if as_json:
        click.echo(msgspec.json.encode(facts).decode())
        return
    columns = ("student", "prompts", "by", "strategy", "alpha", "training", "n", "asked", "failed", "value", "95%")
    show((*columns, "gain", "95% ", "perplexity"), [_row(fact) for fact in facts], as_json=False)


def _row(fact: outcomes.StudentFacts) -> tuple[Any, ...]:
    return (
        fact.student,
        fact.prompts,
        fact.by,
        fact.strategy,
        None if fact.alpha is None else f"{fact.alpha:g}",
        fact.training,
        fact.n_trainings,
        fact.n_prompts,
        fact.n_failed,
        *_interval(fact.value, ""),
        *_interval(fact.gain, "+"),
        fact.perplexity,
    )


def _interval(value: Interval | None, sign: str) -> tuple[str | None, str | None]:
    if value is None:
        return None, None
    return f"{value.mean:{sign}.3f}", f"{value.low:{sign}.3f} to {value.high:{sign}.3f}"


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise UsageError(f"--option takes KEY=VALUE, such as batch_size=32; got {text!r}")
    try:
        return key, msgspec.json.decode(value)
    except msgspec.DecodeError:
        return key, value
