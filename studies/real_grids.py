"""Compare strategies on grids of real responses: the value of choosing a teacher per prompt.

    python -m studies.real_grids GRID.jsonl.gz ... --teachers teachers.toml --student NAME=FOLDER=FAMILY ...
    python -m studies.real_grids ... --subject FIELD --pool NAME=TEACHER,TEACHER ...

A grid is a file for `persyn responses import` whose rows have a `label`: right or wrong. Every response is scored under
each student; then, for each seed, a run draws its calibration and hold-out prompts, and all strategies are compared on
the hold-out. The tables go to studies/real_grids.md, replacing earlier ones of the same grid and student. Scoring is
most of the work and is not repeated: the stores are kept under --home. No row of a grid is stored in this repository.

With --subject, a field of the rows that names the prompt's subject, all kinds of routers are cross-fitted instead, with
and without the subject; see studies/subjects.py.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
from sqlalchemy import select

from persyn.analysis import compare, refits
from persyn.analysis.compare import Comparison
from persyn.analysis.refits import Frozen
from persyn.db.catalog import Prompt, Run, Teacher
from persyn.db.connect import Database
from persyn.db.results import Response
from persyn.errors import UsageError
from persyn.method import rewards
from persyn.method.rewards import Matrix
from persyn.router import refit
from persyn.router.kinds.base import Prompts
from persyn.router.kinds.registry import ROUTERS
from persyn.runs import run_file
from studies import subjects
from studies.common import persyn, put, table, tables

REPORT = Path(__file__).with_suffix(".md")
ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
ALPHA = 0.4


@dataclass(frozen=True, slots=True)
class Case:
    """One grid with one student, in its own store."""

    grid: Path
    student: str
    model: Path
    #: The student's family among the teachers' families, or empty.
    family: str
    home: Path
    #: Some of the grid's teachers, with a name; empty for all.
    pool: str = ""
    of_pool: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name in headings."""
        return ", ".join(filter(None, (_short(self.grid), self.student, self.pool)))


def _short(grid: Path) -> str:
    return grid.name.split(".")[0].removesuffix("_parallel")


def main() -> None:
    """Compute missing scores, compare, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grids", nargs="+", type=Path)
    parser.add_argument("--teachers", type=Path, required=True, help="file with each teacher's family and params_b")
    parser.add_argument(
        "--student",
        action="append",
        required=True,
        metavar="NAME=FOLDER[=FAMILY]",
        help="FAMILY: the student's, if a teacher has the same",
    )
    parser.add_argument("--backbone", type=Path, required=True, help="folder of the router's backbone")
    parser.add_argument("--home", type=Path, default=Path("build/studies/real_grids"))
    parser.add_argument("--prompts", type=int, help="prompts to draw from each grid, once; default: all")
    parser.add_argument("--second-label", metavar="FIELD", help="field of `meta`; rows whose label differs lose it")
    parser.add_argument("--subject", metavar="FIELD", help="field of a row that names the prompt's subject")
    parser.add_argument(
        "--pool",
        action="append",
        metavar="NAME=TEACHER,...",
        default=[],
        help="study only these teachers, by themselves",
    )
    parser.add_argument("--calibration", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--alphas", type=float, nargs="+", default=ALPHAS, help=f"besides {ALPHA}")
    parser.add_argument("--response-tokens", type=int, default=256, help="leading tokens of a response to score")
    parser.add_argument("--dtype", default="bfloat16", help="the student's data type")
    parser.add_argument("--report", type=Path, default=REPORT, help="the page whose tables are replaced")
    options = parser.parse_args()
    for grid in options.grids:
        for student in options.student:
            name, model, *family = student.split("=")
            home = options.home / f"{_short(grid)}-{name}"
            for given in options.pool or [""]:
                pool, _, of_pool = given.partition("=")
                model_folder = Path(model).resolve()
                case = Case(grid, name, model_folder, "".join(family), home, pool, tuple(of_pool.split(",")))
                found = f"### {case.name}\n\n" + (_subjects if options.subject else _study)(case, options)
                put(options.report, "".join((_sections(tables(options.report)) | {case.name: found}).values()))


def _sections(text: str) -> dict[str, str]:
    """Existing tables with their headings, by the name of their case."""
    return {part.partition("\n")[0]: f"### {part}" for part in text.split("### ")[1:]}


def _study(case: Case, options: argparse.Namespace) -> str:
    with _store(case, options) as database:
        names = [_run_name(case, seed) for seed in range(options.seeds)]
        for seed, name in enumerate(names):
            _work(database, case, options, name, seed)
        frozen = [_frozen(database, name, case.home) for name in names]
        found = {
            alpha: [_compared(database, name, each, alpha) for name, each in zip(names, frozen, strict=True)]
            for alpha in sorted({*options.alphas, ALPHA})
        }
        curves = [refits.curve(name, each) for name, each in zip(names, frozen, strict=True)]
    some = found[ALPHA][0]
    head = (
        f"{some.n_calibration} calibration prompts, {some.n_holdout} hold-out prompts, "
        f"{len(frozen[0].cells.teacher_ids)} teachers, {options.seeds} seeds.\n\n"
    )
    return head + _strategies(found[ALPHA]) + _sweep(found) + _curve(curves)


def _subjects(case: Case, options: argparse.Namespace) -> str:
    """Every kind of router, with and without the subject; one run holds the pool's grid."""
    with _store(case, options) as database:
        name = _run_name(case, 0)
        _work(database, case, options, name, 0)
        return subjects.report(subjects.read(database, name, options.subject, case.home), options.seeds)


def _run_name(case: Case, seed: int) -> str:
    return f"{case.pool.replace(' ', '-') or 'seed'}-{seed}"


@contextmanager
def _store(case: Case, options: argparse.Namespace) -> Iterator[Database]:
    """The case's store, with its grid or a part of it."""
    case.home.mkdir(parents=True, exist_ok=True)
    database = Database(f"sqlite:///{(case.home / 'persyn.db').resolve()}")
    try:
        if not (case.home / "persyn.db").exists():
            database.require_head()
            grid = _taken(case, options)
            of_prompt = ["--prompt-field", options.subject] if options.subject else []
            how = ["--teachers", str(options.teachers), "--score", "label", *of_prompt]
            persyn(case.home, "responses", "import", str(grid), *how)
        database.upgrade()
        yield database
    finally:
        database.close()


def _taken(case: Case, options: argparse.Namespace) -> Path:
    """Write the part of the grid to study to the case's home: a limited number of prompts, without doubtful labels."""
    with gzip.open(case.grid, "rt", encoding="utf-8") as whole:
        rows = [json.loads(line) for line in whole]
    prompts = sorted({row["prompt"] for row in rows})
    if options.prompts is not None:
        prompts = random.Random(0).sample(prompts, min(options.prompts, len(prompts)))
    wanted, taken = set(prompts), case.home / case.grid.name
    with gzip.open(taken, "wt", encoding="utf-8") as file:
        for row in rows:
            if row["prompt"] in wanted:
                is_doubtful = row["label"] != row.get("meta", {}).get(options.second_label, row["label"])
                file.write(json.dumps(row | ({"label": None} if is_doubtful else {})) + "\n")
    return taken


def _work(database: Database, case: Case, options: argparse.Namespace, name: str, seed: int) -> None:
    """Start or continue the seed's run; scores of other seeds' runs are reused."""
    with database.read() as session:
        n_prompts = len(session.scalars(select(Prompt.id)).all())
        teachers = session.scalars(
            select(Teacher).where(Teacher.id.in_(select(Response.teacher_id))).order_by(Teacher.id)
        ).all()
        there = session.scalars(select(Run).where(Run.name == name)).one_or_none()
    if case.pool:
        teachers = [teacher for teacher in teachers if teacher.name in case.of_pool]
        if len(teachers) < len(case.of_pool):
            raise UsageError(f"the grid does not have all teachers of the pool {case.pool}: {', '.join(case.of_pool)}")
    if there is not None:
        persyn(case.home, "run", "resume", name)
        return
    known = {table.name: table for table in run_file.read_teachers(options.teachers)}
    holdout = 1 - min(options.calibration, n_prompts * 3 / 4) / n_prompts
    lines = [
        f'[run]\nname = "{name}"\nsetting = "instruct"\nalpha = {ALPHA}\ncalibration = {n_prompts}',
        f"holdout = {holdout:.4f}\nseed = {seed}",
        f"[prompts]\nsource = {json.dumps(case.grid.name)}",
        f"[student]\nname = {json.dumps(case.student)}\nmodel = {json.dumps(str(case.model))}",
        f'family = "{case.family}"' if case.family else "",
        f'options = {{ dtype = "{options.dtype}", response_tokens = {options.response_tokens} }}',
        '[quality]\nkind = "imported"\nmodel = "label"',
        f'[router]\nbackbone = {json.dumps(str(options.backbone.resolve()))}\nkind = "head"\ntune = "head"',
    ]
    for teacher in teachers:
        lines.append(f'[[teachers]]\nname = "{teacher.name}"\nmodel = "{teacher.name}"\nengine = "imported"')
        lines.append(f'params_b = {known[teacher.name].params_b}\nfamily = "{known[teacher.name].family}"')
    file = case.home / f"{name}.toml"
    file.write_text("\n".join(lines) + "\n")
    persyn(case.home, "run", "start", str(file))


def _frozen(database: Database, name: str, home: Path) -> Frozen:
    with database.read() as session:
        grid = refits.read(session, session.scalars(select(Run).where(Run.name == name)).one())
    return refits.freeze(grid, home.resolve())


def _compared(database: Database, name: str, frozen: Frozen, alpha: float) -> Comparison:
    scores = {**frozen.scores(alpha), **_hypothetical(frozen, alpha)}
    with database.read() as session:
        run = session.scalars(select(Run).where(Run.name == name)).one()
        found = compare.compare(session, run, compare.Reward(alpha), scores=scores)
    # At the run's alpha, the run's own router is the same as the head; at other alphas it has no counterpart.
    return msgspec.structs.replace(found, strategies=[each for each in found.strategies if each.strategy != "persyn"])


def _hypothetical(frozen: Frozen, alpha: float) -> dict[str, Matrix]:
    """Results of hypothetical routers that know more than the prompt, and of one with the paper's loss."""
    rewarded = frozen.rewards(alpha)
    learn = np.flatnonzero(~frozen.cells.is_holdout & ~np.isnan(rewarded).all(axis=1))
    quality = np.nan_to_num(frozen.cells.quality)
    share = np.nanmean(frozen.cells.quality, axis=1, keepdims=True)
    difficulty = np.hstack([share, share**2, share == 0.0, share == 1.0]).astype(np.float64)
    head, examples = ROUTERS["head"], frozen.examples(alpha)
    known = refit.scores(head, Prompts({"difficulty": difficulty}), examples, learn)
    equal = refit.scores(head, frozen.prompts, replace(examples, preferences="equal"), learn)
    static = np.nan_to_num(rewards.static_ranking(rewarded[learn]))
    return {
        "head, equal preferences": equal,
        "head, number of right teachers known": known,
        "right teachers known": quality + 1e-3 * static,
    }


def _strategies(found: Sequence[Comparison]) -> str:
    """A table of each strategy's results, averaged over seeds."""
    names = list(dict.fromkeys(fact.strategy for one in found for fact in one.strategies))
    rows = []
    for name in names:
        facts = [fact for one in found for fact in one.strategies if fact.strategy == name]
        closed = [fact.gap_closed for fact in facts if fact.gap_closed is not None]
        asked = max(facts[0].shares, key=facts[0].shares.__getitem__)
        rows.append(
            (
                float(np.mean([fact.reward.mean for fact in facts])),
                name,
                _mean([fact.reward.mean for fact in facts]),
                _mean([fact.reward.low for fact in facts]) + " to " + _mean([fact.reward.high for fact in facts]),
                _percent([each.mean for each in closed]),
                f"{_percent([each.low for each in closed])} to {_percent([each.high for each in closed])}"
                if closed
                else "",
                _mean([fact.quality.mean for fact in facts]),
                _mean([fact.learnability.mean for fact in facts if fact.learnability]),
                f"{asked} {facts[0].shares[asked]:.0%}",
            )
        )
    rows.sort(key=lambda row: -row[0])
    head = ("strategy", "reward", "95%", "gap closed", "95%", "quality", "learnability", "most chosen (seed 0)")
    return f"At alpha {ALPHA:g}:\n\n" + table(head, [row[1:] for row in rows])


def _sweep(found: Mapping[float, Sequence[Comparison]]) -> str:
    rows = []
    for name in ("oracle", "static", "head", "head, equal preferences", "neighbours", "random"):
        cells = []
        for comparisons in found.values():
            facts = [fact for one in comparisons for fact in one.strategies if fact.strategy == name]
            closed = [fact.gap_closed.mean for fact in facts if fact.gap_closed is not None]
            cells.append(_mean([fact.reward.mean for fact in facts]) + (f" ({_percent(closed)})" if closed else ""))
        rows.append((name, *cells))
    return "Reward (and gap closed) by alpha:\n\n" + table(("strategy", *(f"{alpha:g}" for alpha in found)), rows)


def _curve(curves: Sequence[refits.Curve]) -> str:
    rows = []
    for points in zip(*(curve.points for curve in curves), strict=True):
        closed = [point.gap_closed for point in points if point.gap_closed is not None]
        spread = f"{np.std(closed):.0%}" if closed else ""
        reward, static = ([getattr(point, each) for point in points] for each in ("reward", "static"))
        better = [a - b for a, b in zip(reward, static, strict=True)]
        rows.append(
            (
                str(points[0].n_calibration),
                _mean(reward),
                _mean(static),
                f"{np.mean(better):+.3f} +- {np.std(better):.3f}",
                _percent(closed),
                spread,
            )
        )
    head = ("calibration", "head", "static, same prompts", "difference", "gap closed", "std over seeds")
    return "The head by calibration size, compared with the best single teacher on the same prompts:\n\n" + table(
        head, rows
    )


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f}"


def _percent(values: Sequence[float]) -> str:
    return f"{np.mean(values):+.0%}" if len(values) else ""


if __name__ == "__main__":
    main()
