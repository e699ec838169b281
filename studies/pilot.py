"""Measure which definition of the reward predicts what a student becomes, in worlds with known truth.

    python -m studies.pilot

The worlds are those of studies/skills.py, with the teachers' ideal responses: in one, the teacher that is right about
everything writes letters that the student has never seen; in the other it writes digits as all do. For each seed new
prompts are drawn, the responses are imported and scored, and `persyn pilot` trains and asks its students. Everything
is stored under --home, and what is there is not repeated. The tables go to studies/pilot.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from sqlalchemy import select
from transformers.utils import logging

import persyn
from persyn.analysis import pilot as words
from persyn.db.catalog import Run
from persyn.db.connect import Database
from persyn.method import intervals, prediction
from persyn.method.intervals import Interval
from persyn.method.prediction import Trained
from persyn.method.rewards import Matrix
from persyn.settings import Settings
from persyn.student import become, pilot, pilot_plan
from persyn.student.pilot import Outcomes
from persyn.student.pilot_plan import PilotSettings, Plan
from persyn.student.training_settings import TrainingSettings
from studies import common, skill_models, skills
from studies.common import put, table
from studies.skills import DIGITS, TEACHERS, Teacher

REPORT = Path(__file__).with_suffix(".md")
WORLDS: dict[str, Sequence[Teacher]] = {
    "letters": TEACHERS,
    "digits": [replace(each, alphabet=DIGITS) for each in TEACHERS],
}
TITLES = {
    "letters": "The best teacher writes what the student cannot read",
    "digits": "The student can read every teacher",
}
#: Two skills, of which each specialist has one, so that a few hundred prompts teach them.
SKILLS = ("plus", "twice")
PILOT = PilotSettings(
    training=TrainingSettings(epochs=12, learning_rate=6e-3, batch_size=16), alphas=[0.0, 0.4, 1.0], max_tokens=40
)


@dataclass(frozen=True, slots=True, eq=False)
class Piloted:
    """One pilot: what was planned, what became of it, and what PerSyn says."""

    plan: Plan
    outcomes: Outcomes
    said: words.PilotFacts

    def trained(self, by: str) -> Trained:
        """The students as a measure judges them."""
        values = self.outcomes.quality if by == "quality" else self.outcomes.likelihood
        assert values is not None
        measured = words.over_seeds(values)
        known = ~np.isnan(measured).any(axis=0)
        units = np.array([choice.unit for choice in self.plan.choices])
        return Trained(self.plan.predicted(), measured[:, known], units, self.plan.own)


def main() -> None:
    """Do what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("build/studies/pilot"))
    parser.add_argument("--prompts", type=int, default=600, help="prompts that students learn from")
    parser.add_argument("--asked", type=int, default=200, help="prompts that they are asked")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=list(WORLDS))
    parser.add_argument("--trials", type=int, default=100, help="drawn pilots, to see how often a conclusion is right")
    parser.add_argument("--report", type=Path, default=REPORT, help="the page whose tables are replaced")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # models this small do not benefit from more threads
    started = time.monotonic()
    student = skill_models.student(options.home / "models").resolve()
    found: dict[str, list[Piloted]] = {}
    conclusions = options.home / f"conclusions-{options.trials}.md"
    if not conclusions.exists():
        conclusions.write_text(f"### How often the conclusion is right\n\n{_conclusions(options.trials)}")
    for seed in range(options.seeds):
        for world in options.worlds:
            home = (options.home / f"{world}-{seed}").resolve()
            found.setdefault(world, []).append(_piloted(home, WORLDS[world], student, seed, options))
            print(f"{world}, seed {seed}: {time.monotonic() - started:,.0f} s", flush=True)
            made = "".join(f"### {TITLES[name]}\n\n{_tables(each)}" for name, each in found.items())
            part = "" if seed + 1 == options.seeds else f"{seed + 1} of {options.seeds} seeds.\n\n"
            put(options.report, f"{part}{made}{conclusions.read_text()}")


def _piloted(home: Path, teachers: Sequence[Teacher], student: Path, seed: int, options: argparse.Namespace) -> Piloted:
    home.mkdir(parents=True, exist_ok=True)
    settings = Settings(f"sqlite:///{home / 'persyn.db'}", home)
    wanted = msgspec.structs.replace(PILOT, prompts=options.prompts, asked=options.asked)
    _score(home, teachers, student, _drawn(options.prompts + options.asked, seed), options.asked)
    database = Database(settings.database_url)
    try:
        with database.read() as session:
            plan = pilot_plan.read(session, session.scalars(select(Run)).one(), wanted)
        outcomes = pilot.run(database, plan, settings, _say, do=become.become)
    finally:
        database.close()
    return Piloted(plan, outcomes, words.facts(plan, outcomes))


def _drawn(n: int, seed: int) -> list[tuple[str, list[int]]]:
    """Prompts of the study's skills, others for each seed."""
    drawn = skills.prompts(5 * n, seed=100 + seed)
    return [prompt for prompt in drawn if prompt[0] in SKILLS][:n]


def _say(what: str, total: int, done: int, remark: str) -> None:
    if remark and not done % 100:
        print(f"{what}: {done} of {total}, {remark}", flush=True)


def _score(
    home: Path, teachers: Sequence[Teacher], student: Path, drawn: Sequence[tuple[str, list[int]]], n_asked: int
) -> None:
    """Import the teachers' ideal responses, and score them in a run."""
    rows = [
        {
            "prompt": skills.text(*prompt),
            "answer": skills.answer(*prompt),
            "teacher": teacher.name,
            "response": skills.conversation(teacher, *prompt).response,
        }
        for prompt in drawn
        for teacher in teachers
    ]
    (home / "grid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common.persyn(home, "responses", "import", str(home / "grid.jsonl"))
    config = {
        "run": {
            "name": "pilot",
            "setting": "instruct",
            "alpha": 0.4,
            "calibration": len(drawn),
            "holdout": n_asked / len(drawn),
        },
        "prompts": {"source": "grid.jsonl"},
        "student": {
            "name": "student",
            "model": str(student),
            "options": {"statistics": ["alone", "local"], "batch_tokens": 16_384},
        },
        "quality": {"kind": "python", "model": "studies.skills:is_right"},
        "strategy": {"kind": "static"},
        "teachers": [{"name": each.name, "model": each.name, "engine": "imported"} for each in teachers],
    }
    with persyn.open(home / "persyn.db", home=home) as store:
        store.start(config).work()


def _conclusions(n_trials: int) -> str:
    """How often the conclusion is right where the truth is drawn: scores of students and definitions are random."""
    rows = []
    for teachers, learnabilities in ((6, 7), (6, 3), (3, 3)):
        for truth in (0.0, 0.9):
            chance = np.random.default_rng(0)
            said = [prediction.judge(_drawn_students(chance, teachers, learnabilities, truth)) for _ in range(n_trials)]
            predicts = [each for each in said if each.outcome == "predicts"]
            none = sum(each.outcome == "no definition predicts" for each in said)
            rows.append(
                (
                    f"{teachers} + {2 * learnabilities}",
                    "none" if not truth else f"one, correlation {truth:g}",
                    f"{len(predicts) / n_trials:.0%}",
                    f"{none / n_trials:.0%}",
                    f"{1 - (len(predicts) + none) / n_trials:.0%}",
                    f"{sum(each.gain.low > 0 for each in predicts) / n_trials:.0%}",
                )
            )
    head = ("students of teachers + learnabilities", "what predicts", "predicts", "none predicts", "cannot tell")
    return table((*head, "another one is better than the own"), rows)


def _drawn_students(chance: np.random.Generator, teachers: int, learnabilities: int, truth: float) -> Trained:
    """Students of which two of a learnability resemble each other, and 15 definitions of four causes.

    truth: correlation of the first definition with what the students became; 0 means that it is like the others.
    """
    units = np.array([*range(teachers), *np.repeat(np.arange(learnabilities), 2) + teachers])
    of_unit = chance.normal(size=units.max() + 1)
    became = 0.8 * of_unit[units] + 0.6 * chance.normal(size=len(units))
    right = chance.random((len(units), 200)) < (1 / (1 + np.exp(-became)))[:, None]
    of_units = chance.normal(size=(4, units.max() + 1))
    causes = 0.8 * of_units[:, units] + 0.6 * chance.normal(size=(4, len(units)))
    predicted = chance.normal(size=(15, 4)) @ causes + 0.2 * chance.normal(size=(15, len(units)))
    if truth:
        predicted[0] = truth * became + np.sqrt(1 - truth**2) * chance.normal(size=len(units))
    return Trained(predicted, right.astype(np.float64), units, own=1)


def _tables(found: Sequence[Piloted]) -> str:
    plan = found[0].plan
    correlations = {by: _correlations(found, by) for by in ("quality", "likelihood")}
    definitions = list(plan.definitions)
    order = sorted(range(len(definitions)), key=lambda n: -correlations["quality"][n].mean)
    rows = [
        (
            str(definitions[n]),
            _signed(correlations["quality"][n]),
            _signed(correlations["likelihood"][n]),
            f"{_accuracy(found, str(definitions[n])):.1%}",
        )
        for n in order
    ]
    names = dict.fromkeys(name for each in found for choice in each.plan.choices for name in choice.names)
    teachers = [name for name in names if name not in {str(each) for each in definitions}]
    ranked = sorted(((name, _accuracy(found, name)) for name in teachers), key=lambda each: -each[1])
    said = [(str(seed), each.said.says, each.said.advice) for seed, each in enumerate(found)]
    agree = [_agreement(each) for each in found]
    head = ("definition", "rank correlation with accuracy (95%)", "with likelihood (95%)", "accuracy of its student")
    return (
        f"{len(plan.learn_ids):,} prompts to learn from, {len(plan.asked_ids):,} asked, "
        f"{min(len(each.plan.choices) for each in found)} or more different students per seed.\n\n"
        + table(head, rows)
        + "Accuracy of the students of single teachers: "
        + ", ".join(f"{name} {value:.1%}" for name, value in ranked)
        + f". Rank correlation of both measures: {np.mean(agree):+.2f}.\n\n"
        + table(("seed", "PerSyn says", "advice"), said)
    )


def _correlations(found: Sequence[Piloted], by: str) -> list[Interval]:
    """Mean correlation of each definition over the seeds; a resample has the same sources in every seed."""
    each = [one.trained(by) for one in found]
    values = [np.nan_to_num(prediction.spearman(one.predicted, prediction.means(one.measured))) for one in each]
    drawn: Matrix = np.mean([prediction.resampled(one)[0] for one in each], axis=0)
    mean = np.mean(values, axis=0)
    return [intervals.interval(float(mean[n]), drawn[:, n]) for n in range(len(mean))]


def _accuracy(found: Sequence[Piloted], name: str) -> float:
    """Mean accuracy over the seeds of the student of a teacher or a definition."""
    values = []
    for one in found:
        place = next(n for n, choice in enumerate(one.plan.choices) if name in choice.names)
        values.append(prediction.means(one.trained("quality").measured)[place])
    return float(np.mean(values))


def _agreement(one: Piloted) -> float:
    quality, likelihood = (prediction.means(one.trained(by).measured) for by in ("quality", "likelihood"))
    return float(prediction.spearman(quality[None], likelihood)[0])


def _signed(value: Interval) -> str:
    return f"{value.mean:+.2f} ({value.low:+.2f} to {value.high:+.2f})"


if __name__ == "__main__":
    main()
