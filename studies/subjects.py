"""Measure every kind of router on a grid of many subjects: what it gains over the best single teacher.

Routers are cross-fitted: each prompt is routed by routers fitted to the other folds, so that every prompt is measured,
and the folds differ between seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from sqlalchemy import select

from persyn.analysis import refits
from persyn.db import lookup
from persyn.db.catalog import Prompt, Run, RunPrompt
from persyn.db.connect import Database
from persyn.db.grid import Grid
from persyn.method import rewards
from persyn.method.intervals import Vector, interval, weights
from persyn.method.rewards import Indices, Matrix, Normalisation
from persyn.router.kinds import choice
from persyn.router.kinds.base import Examples, Prompts
from persyn.router.kinds.crossfit import FOLDS, Bench, one_thread
from persyn.router.kinds.registry import ROUTERS
from studies.common import table

ALPHAS = (0.0, 0.2, 0.4, 0.6)
STATIC, ORACLE = "static", "oracle"


@dataclass(frozen=True, slots=True)
class Pool:
    """A grid with what routers read of its P prompts.

    states: (P, H) of the backbone. subjects: (P,). teachers: (T,) names in head order.
    """

    cells: Grid
    states: Matrix
    subjects: Sequence[str | None]
    teachers: Sequence[str]

    def reads(self) -> dict[str, Prompts]:
        """The prompts by what routers read of them."""
        states, fields = {"backbone": self.states}, {"subject": self.subjects}
        return {
            "prompt": Prompts(states),
            "subject": Prompts(fields=fields),
            "prompt and subject": Prompts(states, fields=fields),
        }


def read(database: Database, run_name: str, field: str, home: Path) -> Pool:
    """Read a finished run's grid; `field` of a prompt's row names its subject."""
    with database.read() as session:
        run = session.scalars(select(Run).where(Run.name == run_name)).one()
        inputs = refits.read(session, run)
        teachers = [teacher.name for teacher in lookup.teachers(session, run.id)]
        of_run = select(Prompt.id, Prompt.meta).join(RunPrompt).where(RunPrompt.run_id == run.id)
        subject_of = {prompt_id: meta.get(field) for prompt_id, meta in session.execute(of_run)}
    frozen = refits.freeze(inputs, home.resolve())
    labels = [subject_of[prompt_id] for prompt_id in frozen.cells.prompt_ids.tolist()]
    return Pool(frozen.cells, frozen.prompts.states["backbone"], labels, teachers)


def report(pool: Pool, n_seeds: int) -> str:
    """All tables of a pool."""
    found = {alpha: measure(pool, alpha, range(n_seeds)) for alpha in ALPHAS}
    head = (
        f"{len(pool.subjects):,} prompts of {len(set(pool.subjects))} subjects, {len(pool.teachers)} teachers, "
        f"{n_seeds} seeds of {FOLDS} folds.\n\n"
    )
    by_alpha = [f"At alpha {alpha:g}:\n\n{gains(each)}" for alpha, each in found.items()]
    return head + "".join(by_alpha) + _leaders(pool) + _scores(pool)


def measure(pool: Pool, alpha: float, seeds: Iterable[int]) -> dict[str, Matrix]:
    """{router: (S, P) reward of the response it chooses, by seed}: every kind on everything that it can read."""
    rewarded = pool.cells.rewards(alpha=alpha)
    known = np.flatnonzero(~np.isnan(rewarded).all(axis=1))
    reads = {name: prompts.take(known) for name, prompts in pool.reads().items()}
    by_seed = [_routed(reads, Examples(rewarded[known], seed=seed)) for seed in seeds]
    return {name: np.stack([each[name] for each in by_seed]) for name in by_seed[0]}


def _routed(reads: Mapping[str, Prompts], examples: Examples) -> dict[str, Vector]:
    found = {ORACLE: np.nanmax(examples.rewards, axis=1)}
    for name, prompts in reads.items():
        bench = Bench(prompts, examples)
        for kind in ROUTERS.values():
            if kind.can_read(prompts):
                with one_thread():
                    _, scores = bench.fitted(kind)
                router = f"{kind.name}: {name}" if kind.reads else kind.name
                found[router] = choice.routed(scores, examples.rewards)
    return found


def gains(found: Mapping[str, Matrix]) -> str:
    """Each router next to the best single teacher, best first; intervals are over prompts, the spread over seeds."""
    names = sorted(found, key=lambda name: -found[name].mean())
    drawn = _drawn(np.column_stack([found[name].mean(axis=0) for name in names]))  # (D, N)
    static, oracle = names.index(STATIC), names.index(ORACLE)
    way = found[ORACLE].mean() - found[STATIC].mean()
    ways = drawn[:, oracle] - drawn[:, static]
    rows = []
    for place, name in enumerate(names):
        by_seed = found[name].mean(axis=1) - found[STATIC].mean(axis=1)
        gained = drawn[:, place] - drawn[:, static]
        gain = interval(float(by_seed.mean()), gained)
        closed = interval(gain.mean / way, gained / ways)
        figures = ("", "", "", "", "")
        if name != STATIC:
            shown = (f"{gain.mean:+.3f}", f"{gain.low:+.3f} to {gain.high:+.3f}", f"{np.std(by_seed):.3f}")
            figures = (*shown, f"{closed.mean:+.0%}", f"{closed.low:+.0%} to {closed.high:+.0%}")
        rows.append((name, f"{found[name].mean():.3f}", *figures))
    head = ("router: what it reads", "reward", "gain over static", "95%", "std over seeds", "gap closed", "95%")
    return table(head, rows)


def _drawn(values: Matrix) -> Matrix:
    """(D, N) bootstrap means over prompts of (P, N) values."""
    return np.concatenate([drawn @ values for drawn in weights(len(values), seed=0)]) / len(values)


def _leaders(pool: Pool) -> str:
    """Which single teacher leads by alpha and normalisation, by how much, and in how many subjects another does."""
    rows = []
    for how in get_args(Normalisation):
        for alpha in ALPHAS:
            rewarded = pool.cells.rewards(alpha=alpha, how=how)
            first, second = np.argsort(-np.nanmean(rewarded, axis=0))[:2]
            lead = rewarded[:, first] - rewarded[:, second]
            lead = lead[~np.isnan(lead)]
            of_lead = interval(float(lead.mean()), _drawn(lead[:, None])[:, 0])
            best = [int(np.argmax(np.nanmean(rewarded[where], axis=0))) for where in _places(pool.subjects)]
            rows.append(
                (
                    how,
                    f"{alpha:g}",
                    pool.teachers[first],
                    pool.teachers[second],
                    f"{of_lead.mean:.3f} ({of_lead.low:.3f} to {of_lead.high:.3f})",
                    f"{sum(each != first for each in best)} of {len(best)}",
                )
            )
    head = ("normalisation", "alpha", "leader", "second", "lead (95%)", "subjects led by another")
    return "The best single teacher:\n\n" + table(head, rows)


def _places(subjects: Sequence[str | None]) -> list[Indices]:
    """The indices of each subject's prompts."""
    of = np.array([subject or "" for subject in subjects])
    return [np.flatnonzero(of == subject) for subject in sorted(set(of))]


def _scores(pool: Pool) -> str:
    """The teachers' raw and normalised scores, and how far learnability differs within a prompt."""
    quality, learnability = pool.cells.quality, pool.cells.learnability
    columns = [quality, learnability, *(rewards.normalise(learnability, how) for how in get_args(Normalisation))]
    rows = [(name, *(f"{np.nanmean(each[:, k]):.3f}" for each in columns)) for k, name in enumerate(pool.teachers)]
    spread = np.nanmax(learnability, axis=1) - np.nanmin(learnability, axis=1)
    low, middle, high = np.nanquantile(spread, [0.05, 0.5, 0.95])
    tied = np.nanmax(quality, axis=1) == np.nanmin(quality, axis=1)
    head = ("teacher", "quality", "learnability", *(f"learnability, {how}" for how in get_args(Normalisation)))
    return (
        "Mean scores; learnability in nats per token, and normalised:\n\n"
        + table(head, rows)
        + f"Within a prompt, learnability differs by {middle:.2f} nats per token (5% to 95%: {low:.2f} to {high:.2f}); "
        + f"quality is the same for all teachers on {tied.mean():.0%} of the prompts.\n\n"
    )
