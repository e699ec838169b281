"""`persyn pilot`: train small students, and see which definition of the reward predicts what they become."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import msgspec

from persyn.cli.context import JSON, RUN, find_run, plain, show, store
from persyn.cli.progress import Meter
from persyn.cli.student import training_options
from persyn.errors import UsageError
from persyn.method.intervals import Interval
from persyn.method.learnability import LEARNABILITIES
from persyn.settings import Settings

if TYPE_CHECKING:
    from persyn.analysis.pilot import PilotFacts
    from persyn.student.pilot_plan import PilotSettings, Plan


@click.command(short_help="Train small students to see which reward predicts what a student becomes.")
@RUN
@click.option(
    "--prompts",
    type=click.IntRange(1),
    default=500,
    show_default=True,
    help="Prompts that students learn from, at most.",
)
@click.option(
    "--asked",
    type=click.IntRange(1),
    default=200,
    show_default=True,
    help="Other prompts that they are asked, at most.",
)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Students per choice of responses.")
@click.option("--alpha", "alphas", metavar="A,B,...", default="0,0.4,1", show_default=True, help="Weights to compare.")
@click.option(
    "--learnability",
    "learnabilities",
    multiple=True,
    type=click.Choice(list(LEARNABILITIES)),
    help="A definition to compare; may be repeated. Default: all that the store has the statistics for.",
)
@click.option(
    "--by",
    type=click.Choice(["quality", "likelihood"]),
    help="What students are judged by. Default: the run's quality, unless that is a judge or cannot be computed.",
)
@training_options
@click.option("--gpus", type=click.IntRange(0, 1), default=0, show_default=True, help="0 trains on the CPU.")
@click.option("--max-tokens", type=click.IntRange(1), default=512, show_default=True, help="Per response of a student.")
@click.option("--plan", "is_plan", is_flag=True, help="Show what would be trained, and stop.")
@JSON
def pilot(run: str, alphas: str, is_plan: bool, as_json: bool, **given: Any) -> None:
    """Ask the student which definition of the reward is right for it.

    One small student is trained on each teacher's responses to some calibration prompts of RUN, and one on
    the responses that each definition of the reward (a learnability and its weight alpha) would choose. Each
    student is asked other prompts of the calibration grid. A definition predicts if students became better where
    it rewards their responses more: its rank correlation with their scores is shown with a 95% interval. The run's
    own definition is always compared.

    Scores are the run's quality of the students' responses, or with --by likelihood the mean log-likelihood of
    the best responses of the grid, in nats per token: less noisy, but it says how well a student knows these
    responses, not whether its own are right.

    What each student became is kept in PERSYN_HOME/pilots; its weights are not. A pilot that was killed or is
    repeated, perhaps with other options, trains only students that are not there.
    """
    wanted = _settings(given, alphas)
    from persyn.analysis import pilot as words
    from persyn.student import pilot as pilots
    from persyn.student import pilot_plan

    settings = Settings.from_environment()
    with store() as database:
        with database.read() as session:
            plan = pilot_plan.read(session, find_run(session, run), wanted)
        total, done = pilots.count_done(database, plan, settings.home)
        click.echo(_planned(plan, total, done), err=True)
        if is_plan:
            return
        with Meter() as meter:
            outcomes = pilots.run(database, plan, settings, meter.show)
    found = words.facts(plan, outcomes)
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
    else:
        _show(found)


def _settings(given: dict[str, Any], alphas: str) -> PilotSettings:
    from persyn.student.pilot_plan import PilotSettings
    from persyn.student.training_settings import TrainingSettings

    training = {
        name: given.pop(name) for name in TrainingSettings.__struct_fields__ if name in given and name != "max_tokens"
    }
    given["learnabilities"] = list(given["learnabilities"])
    try:
        given["alphas"] = [float(part) for part in alphas.split(",")]
        return msgspec.convert({**given, "training": training}, PilotSettings)
    except msgspec.ValidationError as error:
        raise UsageError(f"persyn pilot: {error}") from error
    except ValueError:
        raise UsageError(f"--alpha takes numbers from 0 to 1, such as 0,0.2,0.4; got {alphas!r}") from None


def _planned(plan: Plan, total: int, done: int) -> str:
    how, n_asked = plan.settings, len(plan.asked_ids)
    scored = f"{n_asked:,} prompts are asked" if plan.is_scored else "no prompt is asked"
    judged = f"; at most {total * n_asked:,} requests to the judge, outside [budget]" if plan.is_judged else ""
    return (
        f"{total} students, the untrained one included, x {len(plan.learn_ids):,} responses, "
        f"{how.training.epochs} epochs; {scored}, and {plan.best.sum():,} responses shown to each; {done} are there"
        f"{judged}"
    )


def _show(found: PilotFacts) -> None:
    click.echo(
        f"run {plain(found.run)}: students learned from {found.n_learned:,} prompts and are judged on "
        f"{found.n_asked:,} others by {found.by} ({found.unit}); untrained {_between(found.untrained, '')}"
    )
    click.echo()
    rows: list[tuple[Any, ...]] = [
        (
            each.learnability if each.alpha else "-",
            f"{each.alpha:g}",
            f"{each.predicted:.3f}",
            _between(each.score, ""),
            "-" if each.correlation is None else _between(each.correlation, "+"),
            "yours" if each.is_own else None,
        )
        for each in found.definitions
    ]
    show(("learnability", "alpha", "predicted", "student (95%)", "rank correlation (95%)", ""), rows, as_json=False)
    click.echo()
    students = [(", ".join(each.trained_on), _between(each.score, "")) for each in found.students]
    show(("student of", "score (95%)"), students, as_json=False)
    click.echo()
    for name, reason in found.left_out.items():
        click.echo(f"left out: {plain(name)}: {plain(reason)}")
    click.echo(plain(found.says))
    click.echo(f"advice: {plain(found.advice)}")
    if found.run_file:
        click.echo(f"in a copy of the run file, with another name, which reuses all responses:\n{found.run_file}")


def _between(interval: Interval, sign: str) -> str:
    return f"{interval.mean:{sign}.3f} ({interval.low:{sign}.3f} to {interval.high:{sign}.3f})"
