"""Show when routing pays, with two small real models, generated tasks of several kinds, and a student.

    python -m studies.many_domains

Seven teachers are made of SmolLM2-135M-Instruct and Gemma 3 270M, each with worked examples of some kinds of tasks
(studies/tasks.py). All of them answer all prompts in one run. Then, for each seed, prompts of one fold become each
strategy's dataset, chosen by what the other folds teach, and the student is trained on it and asked. As a control, each
kind of task is judged alone. Everything is stored under --home, and what is there is not repeated. The tables go to
studies/many_domains.md, and are written again with each seed.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import select
from transformers.utils import logging

from demo import models, prompts
from persyn.db.catalog import Prompt, Run
from persyn.db.connect import Database
from persyn.db.results import Response
from persyn.llm.template import Conversation
from persyn.method import strategies, verdict
from persyn.method.intervals import Vector, interval, weights
from persyn.method.rewards import Indices, Matrix
from persyn.method.strategies import STRATEGIES, StrategyInputs
from persyn.method.verdict import Evidence
from persyn.router.kinds import choice
from persyn.router.kinds.base import Examples
from persyn.router.kinds.crossfit import FOLDS, folds
from persyn.router.kinds.registry import ROUTERS
from persyn.stages.strategy_inputs import strategy_inputs
from persyn.student.train import TrainingSettings
from studies import subjects, tasks
from studies.common import persyn, put, table
from studies.students import Students

REPORT = Path(__file__).with_suffix(".md")
ALPHA = 0.4
STATIC, ORACLE = "static", "oracle"
#: Engines of the teachers, with their options. To compile a model takes longer than its responses.
_OPTIONS: Mapping[str, Mapping[str, Any]] = {"vllm": {"enforce_eager": True}, "transformers": {"batch_size": 64}}
#: What the strategies that read prompts read.
ROUTED = {"PerSyn": "prompt", "PerSyn, kind known": "prompt and subject", "best teacher of the kind": "subject"}


@dataclass(frozen=True, slots=True)
class World:
    """A run in which all T teachers have answered all P prompts.

    inputs: of strategies that read no prompt, with all P prompts to learn from.
    rewards: (P, T). texts: {(prompt, teacher): response} by row and column.
    """

    pool: subjects.Pool
    inputs: StrategyInputs
    rewards: Matrix
    prompts: Sequence[str]
    texts: Mapping[tuple[int, int], str]


def main() -> None:
    """Do what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("build/studies/many_domains"))
    parser.add_argument("--prompts", type=int, default=1_000, help="of all kinds")
    parser.add_argument("--rows", type=int, default=150, help="prompts of a dataset, at most a fold")
    parser.add_argument("--asked", type=int, default=104, help="prompts to ask students")
    parser.add_argument("--seeds", type=int, default=FOLDS, help=f"folds that become datasets, at most {FOLDS}")
    parser.add_argument("--epochs", type=int, default=1, help="of a student's training")
    parser.add_argument("--engine", choices=_OPTIONS, default="vllm", help="of the teachers")
    parser.add_argument("--report", type=Path, default=REPORT, help="the page whose tables are replaced")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options.home.mkdir(parents=True, exist_ok=True)
    home, student = options.home.resolve(), models.smollm2().resolve()
    drawn = tasks.draw(list(tasks.KINDS), options.asked + options.prompts, seed=0)
    many = _world(home, "many", drawn[options.asked :], options.engine)
    students = Students(home / "students", student, drawn[: options.asked])
    together, alone = _grid(many), _alone(many)
    for of_students in _students(many, students, options):
        put(options.report, f"### All kinds\n\n{together}{of_students}### Each kind alone\n\n{alone}")


def _world(home: Path, name: str, drawn: Sequence[tasks.Task], engine: str) -> World:
    """Have the teachers answer these prompts, score the responses, and read the grid."""
    tasks.write(home / f"{name}.jsonl", drawn)
    (home / f"{name}.json").write_text(json.dumps(_run_file(name, len(drawn), engine)))
    database = Database(f"sqlite:///{home / 'persyn.db'}")
    try:
        database.require_head()
        with database.read() as session:
            is_there = session.scalars(select(Run.id).where(Run.name == name)).one_or_none() is not None
        persyn(home, "run", *(("resume", name) if is_there else ("start", str(home / f"{name}.json"))))
        pool = subjects.read(database, name, "kind", home)
        place = {prompt_id: row for row, prompt_id in enumerate(pool.cells.prompt_ids.tolist())}
        column = {teacher_id: k for k, teacher_id in enumerate(pool.cells.teacher_ids.tolist())}
        rewarded = pool.cells.rewards(alpha=ALPHA)
        with database.read() as session:
            run = session.scalars(select(Run).where(Run.name == name)).one()
            every = np.ones(len(place), dtype=np.bool_)
            found = session.execute(
                select(Response.prompt_id, Response.teacher_id, Response.text)
                .where(Response.text.is_not(None), Response.prompt_id.in_(place), Response.teacher_id.in_(column))
                .order_by(Response.id)
            )
            texts = {(place[prompt_id], column[teacher_id]): text for prompt_id, teacher_id, text in found if text}
            asked = dict(session.execute(select(Prompt.id, Prompt.text).where(Prompt.id.in_(place))).all())
            inputs = strategy_inputs(session, run, pool.cells, rewarded, every)
    finally:
        database.close()
    return World(pool, inputs, rewarded, [asked[prompt_id] for prompt_id in place], texts)


def _run_file(name: str, n_prompts: int, engine: str) -> dict[str, Any]:
    folders = {folder.name: str(folder.resolve()) for folder in (models.smollm2(), models.gemma())}
    student = folders["smollm2-135m-instruct"]
    of_demo = tomllib.loads(prompts.RUN_FILE.read_text())["teachers"]
    first = of_demo[0]
    own = [
        {**first, "name": name, "system": "Answer in one line.", "few_shot": shots}
        for name, shots in tasks.WORKED.items()
    ]
    sampling = {"temperature": 0.0, "max_tokens": 28, "stop": ["\n"]}
    changed = {"engine": engine, "options": _OPTIONS[engine], "sampling": sampling}
    return {
        "run": {"name": name, "setting": "instruct", "alpha": ALPHA, "calibration": n_prompts, "holdout": 0.2},
        "prompts": {"file": f"{name}.jsonl"},
        "student": {"name": "student", "model": student, "family": "smollm2"},
        "quality": {"kind": "python", "model": "studies.tasks:is_right"},
        "router": {"backbone": student, "tune": "head"},
        "teachers": [{**each, **changed, "model": folders[Path(each["model"]).name]} for each in (*of_demo, *own)],
    }


def _grid(world: World) -> str:
    """Who is good at what, the verdict, and what every kind of router gains."""
    pool, kinds = world.pool, [kind or "" for kind in world.pool.subjects]
    of_kind = {kind: [k for k, each in enumerate(kinds) if each == kind] for kind in sorted(set(kinds))}
    rows = [
        (name, *(f"{np.nanmean(pool.cells.quality[rows, k]):.0%}" for rows in of_kind.values()))
        for k, name in enumerate(pool.teachers)
    ]
    found = choice.choose(list(ROUTERS.values()), pool.reads()["prompt and subject"], Examples(world.rewards))
    said = verdict.judge(Evidence(pool.teachers, world.rewards, found.scores, len(kinds), groups=kinds))
    gain, by_kind = said.gain, said.by_group
    line = (
        f"{len(pool.subjects):,} prompts. Verdict at alpha {ALPHA:g}: **{said.outcome}**. The router that "
        f"cross-validation chose ({found.kind}) gains {gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f}) over "
        f"{said.teacher}"
    )
    line += f", the best teacher of each kind {by_kind.mean:+.3f}.\n\n" if by_kind else ".\n\n"
    measured = subjects.measure(pool, ALPHA, range(1))
    return "Right responses:\n\n" + table(("teacher", *of_kind), rows) + line + subjects.gains(measured)


def _alone(world: World) -> str:
    """The verdict on each kind of prompts alone, and by how much its best teacher leads."""
    kinds, prompts_ = np.array([kind or "" for kind in world.pool.subjects]), world.pool.reads()["prompt"]
    rows = []
    for kind in sorted(set(kinds.tolist())):
        of_kind = np.flatnonzero(kinds == kind)
        rewarded = world.rewards[of_kind]
        found = choice.choose(list(ROUTERS.values()), prompts_.take(of_kind), Examples(rewarded))
        said = verdict.judge(Evidence(world.pool.teachers, rewarded, found.scores, len(of_kind)))
        lead, gain = said.lead, said.gain
        rows.append(
            (
                kind,
                said.teacher,
                f"{lead.mean:+.3f} ({lead.low:+.3f} to {lead.high:+.3f})",
                found.kind,
                f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})",
                said.outcome,
            )
        )
    return table(("kind", "best teacher", "its lead (95%)", "router", "gain of routing (95%)", "verdict"), rows)


def _students(world: World, students: Students, options: argparse.Namespace) -> Iterator[str]:
    """The students of every strategy, with the same rows and with the same tokens; after each seed."""
    untrained = students.right((), TrainingSettings()).mean()
    said = f"The untrained student is right about {untrained:.1%} of {len(students.asked)} prompts.\n\n"
    fold = folds(len(world.prompts), seed=0)
    found: dict[str, dict[str, list[_Became]]] = {"rows": {}, "tokens": {}}
    for seed in range(options.seeds):
        drawn = np.random.default_rng(seed).permutation(len(fold))
        own, rest = drawn[fold[drawn] == seed][: options.rows], drawn[fold[drawn] != seed]
        for equal, datasets in (("rows", _same_rows), ("tokens", _same_tokens)):
            for name, (rows, teachers) in datasets(world, own, rest).items():
                settings = TrainingSettings(epochs=options.epochs, learning_rate=1e-4, seed=seed)
                became = _Became(world, rows, teachers, students.right(_conversations(world, rows, teachers), settings))
                found[equal].setdefault(name, []).append(became)
                print(f"seed {seed}, same {equal}, {name}: {became.right.mean():.1%}", flush=True)
        part = "" if seed + 1 == options.seeds else f", {seed + 1} of {options.seeds} seeds"
        yield said + "".join(
            f"Students, with the same {equal} for every strategy{part}:\n\n{_table(of_strategies)}"
            for equal, of_strategies in found.items()
        )


@dataclass(frozen=True, slots=True)
class _Became:
    """A dataset, by row and column of the world's grid, and whether its student was right, (A,)."""

    world: World
    rows: Indices
    teachers: Indices
    right: Vector


_Dataset = tuple[Indices, Indices]
"""Prompts, and the teacher of each."""


def _same_rows(world: World, own: Indices, rest: Indices) -> dict[str, _Dataset]:
    """Every strategy chooses a teacher for the fold's prompts; those that calibrate learn from all others."""
    return {name: (own, teachers) for name, teachers in _choices(world, rest, own).items()}


def _same_tokens(world: World, own: Indices, rest: Indices) -> dict[str, _Dataset]:
    """Every strategy has the tokens of one response to each of the fold's prompts.

    Those that calibrate spend half of them on other prompts that all teachers answer. Others may go on to more prompts.
    """
    tokens = np.nan_to_num(world.pool.cells.response_tokens)
    budget = tokens[own].mean(axis=1).sum()
    learn = _affordable(rest, tokens.sum(axis=1)[rest], budget / 2)
    left = budget - tokens[learn].sum()
    more = np.concatenate([own, np.setdiff1d(rest, learn)])
    found = {}
    for name, teachers in _choices(world, learn, more).items():
        if name != ORACLE:
            is_free = name in STRATEGIES and STRATEGIES[name].grid == "none"
            rows = _affordable(more, tokens[more, teachers], budget if is_free else left)
            found[name] = rows, teachers[: len(rows)]
    return found


def _affordable(order: Indices, tokens: Matrix, budget: float) -> Indices:
    """The first prompts whose tokens are within the budget."""
    return order[np.cumsum(tokens) <= budget]


def _choices(world: World, learn: Indices, asked: Indices) -> dict[str, Indices]:
    """{strategy: (A,) teacher of each asked prompt}, from what the calibration prompts `learn` teach."""
    rewarded = world.rewards
    present = ~np.isnan(rewarded[asked])
    inputs = replace(
        world.inputs,
        rewards=rewarded[learn],
        quality=world.inputs.quality[learn],
        learnability=world.inputs.learnability[learn],
    )
    lots = np.random.default_rng(0).random(len(asked))
    found = {ORACLE: strategies.by_ranking(rewarded[asked], present).argmax(axis=1)}
    for name, kind in STRATEGIES.items():
        if kind.policy is not None:
            arguments = {"ratio": 0.2, "beta": 3.0}
            found[name] = strategies.draw(strategies.policy(name, inputs, present, **arguments), lots)
    for name, reads in ROUTED.items():
        prompts_ = world.pool.reads()[reads]
        fitted = choice.choose(list(ROUTERS.values()), prompts_.take(learn), Examples(rewarded[learn])).predictor
        found[name] = strategies.by_ranking(fitted.scores(prompts_.take(asked)), present).argmax(axis=1)
    return found


def _conversations(world: World, rows: Indices, teachers: Indices) -> list[Conversation]:
    pairs = zip(rows.tolist(), teachers.tolist(), strict=True)
    return [
        Conversation([{"role": "user", "content": world.prompts[row]}], world.texts[row, teacher])
        for row, teacher in pairs
        if (row, teacher) in world.texts
    ]


def _table(found: Mapping[str, Sequence[_Became]]) -> str:
    right = {name: np.stack([each.right for each in became]) for name, became in found.items()}  # (S, A)
    rows = []
    for name in sorted(found, key=lambda each: -right[each].mean()):
        became = found[name]
        quality = np.concatenate([each.world.pool.cells.quality[each.rows, each.teachers] for each in became])
        rewarded = np.concatenate([each.world.rewards[each.rows, each.teachers] for each in became])
        gain = _mean(right[name] - right[STATIC])
        rows.append(
            (
                name,
                f"{len(quality) / len(became):.0f}",
                f"{np.nanmean(rewarded):.3f}",
                f"{np.nanmean(quality):.0%}",
                "{:.1%} ({:.1%} to {:.1%})".format(*_mean(right[name])),
                "{:+.1%} ({:+.1%} to {:+.1%})".format(*gain) if name != STATIC else "",
            )
        )
    return table(("strategy", "rows", "reward", "right rows", "student (95%)", "more than static's (95%)"), rows)


def _mean(values: Matrix) -> tuple[float, float, float]:
    """The mean of (S, A) values with a bootstrap interval over students and prompts."""
    of_students, of_prompts = (np.concatenate(list(weights(n, seed=k))) for k, n in enumerate(values.shape))
    found = interval(float(values.mean()), ((of_students @ values) * of_prompts).sum(axis=1) / values.size)
    return found.mean, found.low, found.high


if __name__ == "__main__":
    main()
