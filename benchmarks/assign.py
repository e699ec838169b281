"""Measure assignments within limits: how near the optimum they are, and what they take for many prompts.

python -m benchmarks.assign [--sizes 10000 100000 1000000] [--teachers 20] [--databases sqlite postgresql]

The gap is that between the value of an assignment and the highest possible one, as a part of it: exactly for small
problems, by one integer program; for large ones, at most, by the bound that the prices prove. Memory is the peak of the
process.
Problems have scores that tell prompts apart, or none; then only lots and lengths do.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from sqlalchemy import select, text

from benchmarks.store import DATABASES, database
from persyn.db import bulk
from persyn.db.catalog import Prompt, Role, Run, RunPrompt
from persyn.db.connect import Database
from persyn.db.results import RouterScore, Score
from persyn.method.assignment import cheapest, solve
from persyn.method.limits import Costs, Limits, unlimited
from persyn.method.rewards import Matrix
from persyn.stages import assign, outcomes
from tests.factories import make_response, make_router, make_run

_CALIBRATION = 100
_CHUNK = 20_000


def problem(n_prompts: int, n_teachers: int, *, signal: float, seed: int) -> tuple[Matrix, Costs, Limits]:
    """Rewards, costs that rise twentyfold over the teachers, and limits that bind: a budget, and three on prompts."""
    lots = np.random.default_rng(seed)
    values = np.sort(lots.normal(0.5, 0.1, n_teachers)) + signal * lots.normal(size=(n_prompts, n_teachers))
    values += 1e-5 * lots.random(values.shape)
    price = np.exp(np.linspace(0, 3, n_teachers)) * 1e-6
    costs = Costs(300 * price * lots.uniform(0.7, 1.4, n_teachers), 0.075 * price, lots.lognormal(5.5, 1, n_prompts))
    free, least = solve(values, costs, unlimited(n_prompts, n_teachers)), np.zeros(n_teachers, dtype=np.int64)
    low = cheapest(values, costs, unlimited(n_prompts, n_teachers)) or 0.0
    least[0], most = n_prompts // 20, np.full(n_teachers, n_prompts)
    most[-1], most[-2] = int(np.ceil(0.15 * n_prompts)), int(np.ceil(0.4 * n_prompts))
    return values, costs, Limits(least, most, low + lots.uniform(0.3, 0.8) * (free.cost - low))


def exact(values: Matrix, costs: Costs, limits: Limits) -> float:
    """The highest value of any assignment, by one integer program with a variable for each cell."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import block_array, eye_array, kron

    n_prompts, n_teachers = values.shape
    once = kron(eye_array(n_prompts), np.ones((1, n_teachers)))
    counts = kron(np.ones((1, n_prompts)), eye_array(n_teachers))
    unit = limits.budget / n_prompts
    matrix = block_array([[once], [counts], [costs.of(slice(None)).reshape(1, -1) / unit]])
    low = np.concatenate([np.ones(n_prompts), limits.least, [-np.inf]])
    high = np.concatenate([np.ones(n_prompts), limits.most, [n_prompts]])
    found = milp(
        -values.ravel(),
        integrality=np.ones(values.size),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix, low, high),
        options={"mip_rel_gap": 1e-7, "time_limit": 60.0},
    )
    return -float(found.fun)


def measure_gaps(cases: int) -> None:
    """Compare with the exact optimum."""
    gaps, sizes = [], np.random.default_rng(0)
    for seed in range(cases):
        n_prompts, n_teachers = int(sizes.integers(20, 120)), int(sizes.integers(3, 7))
        values, costs, limits = problem(n_prompts, n_teachers, signal=0.1 * (seed % 2), seed=seed)
        best, found = exact(values, costs, limits), solve(values, costs, limits)
        gaps.append(max(0.0, best - found.value) / best)
    print(
        f"gap to the exact optimum, {cases} problems of 20 to 120 prompts: mean {np.mean(gaps):.5%}, largest "
        f"{max(gaps):.5%}"
    )


def measure_solver(n_prompts: int, n_teachers: int, signal: float) -> None:
    """Time and peak memory of the solver alone, in a process of its own."""
    values, costs, limits = problem(n_prompts, n_teachers, signal=signal, seed=0)
    began = time.perf_counter()
    found = solve(values, costs, limits)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    gap = (found.bound - found.value) / found.bound
    kind = "scores" if signal else "no scores"
    print(f"{'solver':<12} {n_prompts:>9,} {kind:<10} {seconds:>8.1f} {peak:>9,.0f} {gap:>10.1e}", flush=True)


def measure_stage(url: str, kind: str, n_prompts: int, n_teachers: int) -> None:
    """Time and peak memory of reading scores, solving, and writing assignments, in a process of its own."""
    store = Database(url)
    with store.write() as session:
        run = session.scalars(select(Run)).one()
        began = time.perf_counter()
        assign.plan(session, run)
    seconds = time.perf_counter() - began
    with store.read() as session:
        made = outcomes.last(session, run)
    assert made is not None
    assert made.slope > 0
    assert made.prompts == n_prompts
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    gap = (made.bound - made.value) / made.bound
    print(f"{kind:<12} {n_prompts:>9,} {'scores':<10} {seconds:>8.1f} {peak:>9,.0f} {gap:>10.1e}", flush=True)


def fill(url: str, n_prompts: int, n_teachers: int) -> None:
    """A run whose prompts all have scores, and whose best teachers are limited."""
    store, lots = Database(url), np.random.default_rng(0)
    names = [f"t{k}" for k in range(n_teachers)]
    with store.write() as session:
        made = make_run(session, teachers=names, prompts=_CALIBRATION, calibration=_CALIBRATION, stage="assign")
        run = session.get_one(Run, made.id)
        run.router_id = make_router(session, made)
        # Costs are response tokens; those of the best teachers are the longest.
        shares = {"min_share": {"t0": 0.05}, "max_share": {names[-1]: 0.15}, "budget": 0.012 * n_prompts}
        run.config = {**run.config, "strategy": {**run.config["strategy"], "when_unsure": "route", **shares}}
        scores = lots.normal(size=(_CALIBRATION, n_teachers)) + np.linspace(0, 1, n_teachers)
        for row, prompt_id in enumerate(made.prompt_ids):
            for k, teacher_id in enumerate(made.teacher_ids):
                response_id = make_response(session, prompt_id, teacher_id, response_tokens=5 + k)
                for scorer_id, value in (
                    (run.quality_scorer_id, scores[row, k] + lots.normal()),
                    (run.learnability_scorer_id, -5.0),
                ):
                    session.add(Score(response_id=response_id, scorer_id=scorer_id, value=value, n_tokens=5, detail={}))
                own = {"router_id": run.router_id, "prompt_id": prompt_id, "teacher_id": teacher_id}
                session.add(RouterScore(**own, score=scores[row, k], cross_fitted=scores[row, k]))
        session.flush()
        first = made.prompt_ids[-1] + 1
        for start in range(0, n_prompts, _CHUNK):
            ids = range(first + start, first + min(start + _CHUNK, n_prompts))
            prompts = [
                {"id": each, "content_hash": f"{each:064x}", "text": "What? " * (each % 50), "source": "p", "meta": {}}
                for each in ids
            ]
            bulk.insert_new(session, Prompt, prompts)
            of_run = [{"run_id": made.id, "prompt_id": each, "role": Role.TARGET} for each in ids]
            bulk.insert_new(session, RunPrompt, of_run)
            drawn = lots.normal(size=(len(ids), n_teachers)) + np.linspace(0, 1, n_teachers)
            rows = [
                {"router_id": run.router_id, "prompt_id": prompt_id, "teacher_id": teacher_id, "score": score}
                for prompt_id, row in zip(ids, drawn.tolist(), strict=True)
                for teacher_id, score in zip(made.teacher_ids, row, strict=True)
            ]
            bulk.insert_new(session, RouterScore, rows)
    with store.write() as session:
        session.execute(text("ANALYZE"))
    store.close()


def _apart(measure: object, *arguments: object) -> None:
    process = multiprocessing.get_context("spawn").Process(target=measure, args=arguments)  # type: ignore[arg-type]
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000], help="numbers of prompts")
    parser.add_argument("--teachers", type=int, default=20)
    parser.add_argument("--databases", nargs="*", choices=DATABASES, default=list(DATABASES))
    parser.add_argument("--cases", type=int, default=40, help="small problems that are solved exactly too")
    options = parser.parse_args()
    if options.cases:
        measure_gaps(options.cases)
    print(f"{options.teachers} teachers\n{'':<12} {'prompts':>9} {'':<10} {'seconds':>8} {'MiB':>9} {'gap below':>10}")
    for size in options.sizes:
        for signal in (0.1, 0.0):
            _apart(measure_solver, size, options.teachers, signal)
        for kind in options.databases:
            with tempfile.TemporaryDirectory(prefix="persyn-benchmark-") as name, database(kind, Path(name)) as url:
                if kind == "sqlite":
                    Database(url).upgrade()
                fill(url, size, options.teachers)
                _apart(measure_stage, url, kind, size, options.teachers)


if __name__ == "__main__":
    main()
