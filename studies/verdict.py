"""Check the verdict against the truth: is routing better where the verdict says so, on prompts it never saw?

    python -m studies.verdict GRID.jsonl.gz ... [--features FOLDER]

Each resampling draws calibration prompts from a grid, cross-fits a router to them, judges it, and measures the router
on the other prompts. A grid is a file for `persyn responses import` whose rows have a `label`, or rows with the
`scores` of all teachers. Reward is quality alone (alpha 0, min-max). The router is a ridge regression of the rewards;
its penalty is chosen by cross-validated reward with the one-standard-error rule, and the static ranking is one of the
choices. It reads NAME.npy, an array (P, H) of the grid's prompts in their order, from the folder of features, or else
TF-IDF weights of the prompts. The table goes to studies/verdict.md. No row of a grid is stored in this repository.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from persyn.method import rewards
from persyn.method.rewards import Indices, Matrix
from persyn.method.verdict import Evidence, Outcome, best_first, chosen, judge
from studies.common import put, table

REPORT = Path(__file__).with_suffix(".md")
SIZES = (100, 250, 500, 1_000, 2_500)
#: Strong to weak; infinity is the static ranking.
_PENALTIES = (np.inf, 3e3, 1e3, 300.0, 100.0, 30.0, 10.0)
_HEAD = (
    "grid",
    "calibration",
    "route",
    "do not route",
    "cannot tell",
    "wrong route",
    "wrong do not route",
    "gain of the router",
    "gain of the run",
    "runs below by 2 errors",
)
_FOLDS, _COMPONENTS, _UNSEEN_AT_LEAST = 5, 64, 100


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """A grid or a part of it: (P, K) rewards, and (P, H) standardised features."""

    name: str
    teachers: list[str]
    rewards: Matrix
    features: Matrix

    def without(self, column: int) -> Pool:
        """The grid without one teacher."""
        teachers = [name for place, name in enumerate(self.teachers) if place != column]
        return Pool(f"{self.name} without {self.teachers[column]}", teachers, self._rewards(column), self.features)

    def _rewards(self, column: int) -> Matrix:
        return np.delete(self.rewards, column, axis=1)


class Trial(NamedTuple):
    """One resampling. Rewards are means over the unseen prompts."""

    outcome: Outcome
    low: float
    high: float
    worthwhile: float
    router: float
    #: The teacher that is best on the calibration prompts, and the one that is best on the whole grid.
    single: float
    best: float
    #: Standard error of the router's gain over `single`.
    error: float


def main() -> None:
    """Judge routers on resamplings of each grid, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grids", nargs="+", type=Path)
    parser.add_argument("--features", type=Path, help="folder with NAME.npy for each grid")
    parser.add_argument("--resamplings", type=int, default=200)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--without-best", nargs="*", default=(), metavar="NAME", help="also without its best teacher")
    parser.add_argument("--report", type=Path, default=REPORT)
    options = parser.parse_args()
    rows = []
    for path in options.grids:
        pool = read(path, options.features)
        pools = [pool]
        if pool.name in options.without_best:
            pools.append(pool.without(best_first(rewards.static_ranking(pool.rewards))[0]))
        for each in pools:
            rows += _rows(each, [n for n in options.sizes if len(each.rewards) - n >= _UNSEEN_AT_LEAST], options)
    put(options.report, f"{options.resamplings} resamplings each.\n\n" + table(_HEAD, rows))


def read(path: Path, features: Path | None) -> Pool:
    """Read a grid: rewards from the labels or scores of its rows, and features of its prompts."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    place = {prompt: number for number, prompt in enumerate(prompts)}
    scored = [
        (row["prompt"], teacher, score)
        for row in rows
        for teacher, score in row.get("scores", {row.get("teacher"): row.get("label")}).items()
    ]
    teachers = sorted({teacher for _, teacher, _ in scored})
    quality = np.full((len(prompts), len(teachers)), np.nan)
    for prompt, teacher, score in scored:
        if score is not None:
            quality[place[prompt], teachers.index(teacher)] = float(score)
    name = path.name.split(".")[0]
    states = (
        np.load(features / f"{name}.npy") if features else TfidfVectorizer(sublinear_tf=True).fit_transform(prompts)
    )
    found = TruncatedSVD(min(_COMPONENTS, *(size - 1 for size in states.shape)), random_state=0).fit_transform(states)
    found -= found.mean(axis=0)
    return Pool(
        name.removesuffix("_parallel"), teachers, rewards.normalise(quality, "minmax"), found / found[:, 0].std()
    )


def _rows(pool: Pool, sizes: Sequence[int], options: argparse.Namespace) -> list[tuple[str, ...]]:
    made = []
    for n in sizes:
        trials = [_trial(pool, n, seed) for seed in range(options.resamplings)]
        made.append(_row(pool.name, n, trials))
        print(*made[-1], sep=" | ", flush=True)
    return made


def _trial(pool: Pool, n: int, seed: int) -> Trial:
    drawn = np.random.default_rng([seed, n]).permutation(len(pool.rewards))
    known, unseen = drawn[:n], drawn[n:]
    out_of_fold, scores = router(pool, known, unseen, seed)
    found = judge(Evidence(pool.teachers, pool.rewards[known], out_of_fold, len(unseen)))
    truth = pool.rewards[unseen]
    routed, single = chosen(scores, truth), truth[:, pool.teachers.index(found.teacher)]
    gains = routed - single
    return Trial(
        outcome=found.outcome,
        low=found.gain.low,
        high=found.gain.high,
        worthwhile=found.worthwhile,
        router=float(routed.mean()),
        single=float(single.mean()),
        best=float(truth[:, best_first(rewards.static_ranking(pool.rewards))[0]].mean()),
        error=float(gains.std() / np.sqrt(len(gains))),
    )


def router(pool: Pool, known: Indices, unseen: Indices, seed: int) -> tuple[Matrix, Matrix]:
    """Scores of the known prompts by routers fitted without them, and of the unseen ones by one fitted to all known."""
    features, rewarded = pool.features[known], pool.rewards[known]
    fold = np.random.default_rng(seed).permutation(len(known)) % _FOLDS
    tried = np.empty((len(_PENALTIES), *rewarded.shape))
    for out in range(_FOLDS):
        learn, asked = fold != out, fold == out
        tried[:, asked] = _ridge(features[learn], rewarded[learn], features[asked])
    reached = np.stack([chosen(scores, rewarded) for scores in tried], axis=1)
    out_of_fold = np.empty(rewarded.shape)
    for out in range(_FOLDS):
        out_of_fold[fold == out] = tried[_choice(reached[fold != out])][fold == out]
    return out_of_fold, _ridge(features, rewarded, pool.features[unseen])[_choice(reached)]


def _ridge(features: Matrix, rewarded: Matrix, of: Matrix) -> Matrix:
    """(penalties, P, K) predictions."""
    centre, base = features.mean(axis=0), rewarded.mean(axis=0)
    inner = features - centre
    values, vectors = np.linalg.eigh(inner.T @ inner)
    turned, asked = vectors.T @ (inner.T @ (rewarded - base)), (of - centre) @ vectors
    return np.stack([asked @ (turned / (values + penalty)[:, None]) + base for penalty in _PENALTIES])


def _choice(reached: Matrix) -> int:
    """The strongest penalty whose mean reward is within one standard error of the highest."""
    short = reached[:, [int(reached.mean(axis=0).argmax())]] - reached
    return int(np.argmax(short.mean(axis=0) <= short.std(axis=0) / np.sqrt(len(reached))))


def _row(name: str, n: int, trials: Sequence[Trial]) -> tuple[str, ...]:
    def share(outcome: Outcome) -> str:
        return f"{np.mean([each.outcome == outcome for each in trials]):.0%}"

    truth = np.array([each.router - each.best for each in trials])
    wrong = [each.outcome == "route" and gain <= 0 for each, gain in zip(trials, truth, strict=True)]
    missed = [each.outcome == "do not route" and each.router - each.single > each.worthwhile for each in trials]
    kept = np.array([each.router - each.single if each.outcome == "route" else 0.0 for each in trials])
    worse = [gain < -2 * each.error for each, gain in zip(trials, kept, strict=True)]
    routed = np.array([each.router - each.single for each in trials])
    return (
        name,
        f"{n:,}",
        share("route"),
        share("do not route"),
        share("cannot tell"),
        f"{np.mean(wrong):.1%}",
        f"{np.mean(missed):.1%}",
        f"{routed.mean():+.3f}",
        f"{kept.mean():+.3f}",
        f"{np.mean(worse):.1%}",
    )


if __name__ == "__main__":
    main()
