"""Run the method end to end in a small controlled world: known teachers, one student, all strategies.

    python -m studies.controlled

All data is generated (studies/skills.py defines the world) and stored under --home; existing parts are reused. For each
seed new prompts are drawn; a run of each strategy generates its dataset, and the student is trained on it and evaluated
on prompts outside all runs. The tables go to studies/controlled.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from transformers.utils import logging

from persyn.config import Sampling
from persyn.db.catalog import Prompt, Run, Scorer, Teacher
from persyn.db.connect import Database
from persyn.db.results import Assignment, Response, Score
from persyn.db.trained import Evaluation, Outcome, Training
from persyn.errors import UsageError
from persyn.method.intervals import Interval
from persyn.settings import Settings
from persyn.student import outcomes, train, trainings
from persyn.student.evaluations import Evaluator, GenerationSettings
from persyn.student.outcomes import StudentFacts
from studies import skill_models, skills
from studies.common import persyn, put, table

REPORT = Path(__file__).with_suffix(".md")
_HEAD = 'tune = "head"'
#: Hyper-parameters for a model of 100,000 weights.
_FULL = 'tune = "full"\noptions = { learning_rate = 0.001, epochs = 30 }'
#: The case with tunable choices, which were made on the first seed.
_CHOSEN = "PerSyn, tuned in full"
#: A run's strategy, alpha and router. The oracle comes first: it has every response generated, and the others reuse
#: them.
CASES = {
    "oracle": ("oracle", 0.4, _HEAD),
    "PerSyn": ("persyn", 0.4, _HEAD),
    _CHOSEN: ("persyn", 0.4, _FULL),
    "PerSyn without learnability": ("persyn", 0.0, _HEAD),
    "PerSyn without quality": ("persyn", 1.0, _HEAD),
    "static": ("static", 0.4, _HEAD),
    "CAR": ("car", 0.4, _HEAD),
    "family-strong": ("family-strong", 0.4, _HEAD),
    "mix": ("mix", 0.4, _HEAD),
    "strong": ("strong", 0.4, _HEAD),
    "random": ("random", 0.4, _HEAD),
}
#: Which of two strategies trains the better student, according to the paper.
CLAIMS = (
    ("PerSyn", "CAR"),
    ("CAR", "mix"),
    ("mix", "strong"),
    ("PerSyn", "PerSyn without learnability"),
    ("PerSyn without learnability", "PerSyn without quality"),
    ("PerSyn", "static"),
    ("oracle", "PerSyn"),
    (_CHOSEN, "PerSyn"),
    (_CHOSEN, "CAR"),
    ("oracle", _CHOSEN),
)
_GREEDY = Sampling(max_tokens=40, temperature=0.0)
_BATCH = 256


def main() -> None:
    """Generate what is missing, train, evaluate, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("build/studies/controlled"))
    parser.add_argument("--prompts", type=int, default=2_400, help="prompts per run")
    parser.add_argument("--calibration", type=int, default=300, help="calibration prompts, including the hold-out")
    parser.add_argument("--asked", type=int, default=300, help="prompts to evaluate students on")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    started = time.monotonic()
    home: Path = options.home.resolve()
    _prepare(home, options)
    database = Database(f"sqlite:///{home / 'persyn.db'}")
    try:
        database.upgrade()
        for seed in range(options.seeds):
            for case in CASES:
                _close_the_loop(database, home, case, seed, options.calibration)
                print(f"seed {seed}, {case}: {time.monotonic() - started:,.0f} s", flush=True)
        put(REPORT, _tables(database, options.seeds))
    finally:
        database.close()


def _prepare(home: Path, options: argparse.Namespace) -> None:
    """Prepare models and prompts; the seeds' prompts and the evaluation prompts are disjoint."""
    home.mkdir(parents=True, exist_ok=True)
    for teacher in skills.TEACHERS:
        skill_models.teacher(teacher, home / "models")
    drawn = skills.prompts(options.asked + options.seeds * options.prompts, seed=0)
    files = {"asked": drawn[: options.asked]}
    for seed in range(options.seeds):
        begin = options.asked + seed * options.prompts
        files[f"seed-{seed}"] = drawn[begin : begin + options.prompts]
    for name, rows in files.items():
        lines = [
            json.dumps({"prompt": skills.text(*row), "answer": skills.answer(*row), "skill": row[0]}) for row in rows
        ]
        (home / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def _close_the_loop(database: Database, home: Path, case: str, seed: int, calibration: int) -> None:
    """Execute one run, train the student on its dataset, and evaluate that student."""
    name = _name(case, seed)
    file = home / f"{name}.toml"
    file.write_text(_run_file(name, case, seed, calibration, home / "models"))
    persyn(home, "run", "start", str(file))
    torch.set_num_threads(1)  # models this small do not benefit from more threads
    how = train.TrainingSettings(epochs=12, learning_rate=3e-3, batch_size=32, seed=seed)
    trainings.train(database, name, how, gpus=0, home=home, progress=lambda done, total, loss: None)
    settings = Settings(f"sqlite:///{home / 'persyn.db'}", home)
    asked = GenerationSettings(engine="transformers", options={"batch_size": _BATCH}, sampling=_GREEDY)
    Evaluator(database, settings, lambda what, total, done: None).evaluate(
        name, [home / "asked.jsonl"], by=None, how=asked
    )


def _run_file(name: str, case: str, seed: int, calibration: int, models: Path) -> str:
    strategy, alpha, router = CASES[case]
    student = json.dumps(str(models / "student" / "model"))
    lines = [
        f'[run]\nname = "{name}"\nsetting = "instruct"\nalpha = {alpha}\ncalibration = {calibration}',
        f"holdout = 0.2\nseed = {seed}\njob_prompts = 2400",
        f'[prompts]\nfile = "seed-{seed}.jsonl"',
        f'[student]\nname = "student"\nmodel = {student}\nfamily = "digits"',
        '[quality]\nkind = "python"\nmodel = "studies.skills:is_right"',
        f"[router]\nbackbone = {student}\n{router}",
        f'[strategy]\nkind = "{strategy}"',
    ]
    for teacher in skills.TEACHERS:
        family = "digits" if teacher.alphabet == skills.DIGITS else "letters"
        lines.append(
            f'[[teachers]]\nname = "{teacher.name}"\nmodel = {json.dumps(str(models / teacher.name / "model"))}\n'
            f'family = "{family}"\nparams_b = {teacher.params_b}\nengine = "transformers"\ngpus = 0\n'
            f"options = {{ batch_size = {_BATCH} }}\n"
            f"sampling = {{ temperature = {_GREEDY.temperature}, max_tokens = {_GREEDY.max_tokens} }}"
        )
    return "\n".join(lines) + "\n"


def _tables(database: Database, n_seeds: int) -> str:
    with database.read() as session:
        facts = {case: _facts(session, case, n_seeds) for case in CASES}
        accuracy = {case: _accuracies(session, case, n_seeds) for case in CASES}
        return (
            f"{n_seeds} seeds. * Its learning rate and epochs were chosen on the first seed.\n\n"
            + _teachers(session)
            + _became(facts, _datasets(session, n_seeds))
            + _order(accuracy)
        )


def _teachers(session: Session) -> str:
    """Each teacher's accuracy by skill, and the student's likelihood of its responses."""
    rows = []
    for facts in skills.TEACHERS:
        of_teacher = (
            select(func.avg(Score.value / Score.n_tokens if kind == "log_likelihood" else Score.value))
            .join(Response, Response.id == Score.response_id)
            .join(Teacher, Teacher.id == Response.teacher_id)
            .join(Scorer, Scorer.id == Score.scorer_id)
            .join(Prompt, Prompt.id == Response.prompt_id)
            .where(Teacher.name == facts.name, Scorer.kind == kind)
            for kind in ("python", "log_likelihood")
        )
        quality, learnability = of_teacher
        by_skill = [
            session.scalar(quality.where(Prompt.text.startswith(f"{skill} "))) or 0.0 for skill in skills.SKILLS
        ]
        rows.append((facts.name, f"{facts.params_b:g}", *map(_share, by_skill), f"{session.scalar(learnability):.2f}"))
    return "Teachers' accuracy by skill, and the student's mean log-likelihood of their responses:\n\n" + table(
        ("teacher", "size", *skills.SKILLS, "log-likelihood per token"), rows
    )


def _datasets(session: Session, n_seeds: int) -> dict[str, tuple[float, str]]:
    """For each case, the share of right responses in its datasets, and its most frequent teachers."""
    found = {}
    for case in CASES:
        asked = session.execute(
            select(Teacher.name, func.count(), func.sum(Score.value))
            .select_from(Assignment)
            .join(Run, Run.id == Assignment.run_id)
            .join(Teacher, Teacher.id == Assignment.teacher_id)
            .join(
                Response,
                (Response.prompt_id == Assignment.prompt_id) & (Response.teacher_id == Assignment.teacher_id),
            )
            .join(Score, Score.response_id == Response.id)
            .join(Scorer, (Scorer.id == Score.scorer_id) & (Scorer.kind == "python"))
            .where(Run.name.in_([_name(case, seed) for seed in range(n_seeds)]))
            .group_by(Teacher.name)
            .order_by(func.count().desc())
        ).all()
        total = sum(count for _, count, _ in asked)
        shares = ", ".join(f"{name} {count / total:.0%}" for name, count, _ in asked if count >= total / 20)
        found[case] = sum(float(right or 0) for _, _, right in asked) / total, shares
    return found


def _facts(session: Session, case: str, n_seeds: int) -> list[StudentFacts]:
    """The results of the case's students, and of the student before training."""
    names = [_name(case, seed) for seed in range(n_seeds)]
    return outcomes.compare(session, session.scalars(select(Run).where(Run.name.in_(names))).all())


def _became(facts: Mapping[str, Sequence[StudentFacts]], datasets: Mapping[str, tuple[float, str]]) -> str:
    found = {outcomes.UNTRAINED: next(fact for fact in facts["oracle"] if fact.alpha is None)}
    found |= {case: _trained(case, each) for case, each in facts.items()}
    accuracy = {case: _accuracy(case, fact) for case, fact in found.items()}
    rows = []
    for case, value in sorted(accuracy.items(), key=lambda item: -item[1].mean):
        right, shares = datasets.get(case, (None, ""))
        rows.append(
            (
                _marked(case),
                f"{value.mean:.1%}",
                f"{value.low:.1%} to {value.high:.1%}",
                "" if right is None else _share(right),
                shares,
            )
        )
    return "The student's accuracy on prompts that are in no run:\n\n" + table(
        ("trained on", "accuracy", "95%", "dataset's accuracy", "teachers chosen"), rows
    )


def _trained(case: str, facts: Sequence[StudentFacts]) -> StudentFacts:
    """The only result of a case; several training settings are an error, since picking the best would be unfair."""
    found = [fact for fact in facts if fact.alpha is not None]
    if len(found) != 1:
        raise UsageError(f"the students of {case} were trained or asked in {len(found)} ways; give another --home")
    return found[0]


def _accuracy(case: str, fact: StudentFacts) -> Interval:
    if fact.value is None:
        raise UsageError(f"no response of the student of {case} could be scored")
    return fact.value


def _marked(case: str) -> str:
    return f"{case} *" if case == _CHOSEN else case


def _order(accuracy: Mapping[str, Sequence[float]]) -> str:
    """Check the paper's claims, seed by seed."""
    rows = []
    for better, worse in CLAIMS:
        more = [a - b for a, b in zip(accuracy[better], accuracy[worse], strict=True)]
        holds = sum(each > 0 for each in more)
        spread = f"{min(more):+.1%} to {max(more):+.1%}"
        rows.append(
            (
                f"{_marked(better)} > {_marked(worse)}",
                f"{sum(more) / len(more):+.1%}",
                spread,
                f"{holds} of {len(more)}",
            )
        )
    return "The paper's claims, checked for each seed:\n\n" + table(
        ("claim", "mean difference", "range over seeds", "holds"), rows
    )


def _accuracies(session: Session, case: str, n_seeds: int) -> list[float]:
    """The accuracy of the student of each seed."""
    rows = session.execute(
        select(Run.name, func.avg(Outcome.value))
        .join(Training, Training.run_id == Run.id)
        .join(Evaluation, Evaluation.training_id == Training.id)
        .join(Outcome, Outcome.evaluation_id == Evaluation.id)
        .group_by(Run.name)
    )
    by_name = {name: float(mean) for name, mean in rows}
    return [by_name[_name(case, seed)] for seed in range(n_seeds)]


def _name(case: str, seed: int) -> str:
    return f"{case.replace(',', '').replace(' ', '-')}-{seed}"


def _share(value: float) -> str:
    return f"{value:.0%}"


if __name__ == "__main__":
    main()
