"""Active against random calibration, on grids of real scores.

    python -m studies.active GRID.jsonl.gz ... --embedding FOLDER --field domain

For each seed, a third of a grid's prompts is held out. A router has learned from some prompts drawn at random, and more
are added: drawn at random, or chosen in one of several ways. All are fitted and measured alike, on the prompts that
were held out. In the case `same` the first prompts are of all kinds; in the case `new` they are of half of the kinds
(the labels of a field, else clusters of the prompts), and the others came later, as by `persyn run extend`. Outcomes
are kept under --home and not repeated. The tables go to studies/active.md. No row of a grid is stored in this
repository.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from persyn.method import draws
from persyn.method.intervals import Vector
from persyn.method.rewards import Indices, Matrix
from persyn.router.kinds import design
from persyn.router.kinds.base import Examples
from persyn.router.kinds.choice import routed
from persyn.router.kinds.crossfit import one_thread
from persyn.router.kinds.registry import ROUTERS
from studies import committee, router_kinds
from studies.common import error, put, table
from studies.router_kinds import Grid

REPORT = Path(__file__).with_suffix(".md")
#: Routers that are fitted and measured.
KINDS = ("linear", "neighbours")
CASES = {"same": "prompts of the same kinds", "new": "half of the kinds of prompts are new"}
#: Clusters where prompts have no labels.
_CLUSTERS = 12


class Outcome(Struct, frozen=True):
    """Hold-out reward of one kind of router; of_new: that of the prompts of new kinds alone."""

    grid: str
    case: str
    seed: int
    way: str
    added: int
    kind: str
    reward: float
    of_new: float | None
    #: Of the teacher with the best mean over the prompts that were asked, and of the best response.
    static: float
    oracle: float


@dataclass(frozen=True, eq=False)
class Pool:
    """What a way of choosing sees.

    start: (S,) indices of the first calibration prompts. rest: (M,) indices of the others, in random order.
    is_new: (P,) whether a prompt of the grid came later.
    """

    grid: Grid
    points: Matrix
    start: Indices
    rest: Indices
    is_new: NDArray[np.bool_]
    seed: int

    @cached_property
    def gains(self) -> Vector:
        """(M,) of the committee."""
        examples = Examples(self.grid.rewards[self.start], seed=self.seed)
        return committee.gains(self.grid.prompts.take(self.start), examples, self.grid.prompts.take(self.rest))


Way = Callable[[Pool, int], Indices]
"""Returns the indices of so many prompts of a pool."""


def _random(pool: Pool, n: int) -> Indices:
    return pool.rest[:n]


def _even(pool: Pool, n: int) -> Indices:
    """As the product does: those that came later first, until they are sampled as densely."""
    parts = pool.is_new.astype(np.intp)
    asked, left = (np.bincount(parts[each], minlength=2) for each in (pool.start, pool.rest))
    return pool.rest[draws.even(parts[pool.rest], asked, left, n)]


def _by(value: Callable[[Pool], Vector]) -> Way:
    """The prompts with the highest values."""

    def way(pool: Pool, n: int) -> Indices:
        return pool.rest[np.argsort(-value(pool), kind="stable")[:n]]

    return way


def _margins(pool: Pool) -> Vector:
    """How little the router's best teacher is ahead."""
    examples = Examples(pool.grid.rewards[pool.start], seed=pool.seed)
    with one_thread():
        router = ROUTERS["linear"].fit(pool.grid.prompts.take(pool.start), examples)
    best = -np.sort(-router.scores(pool.grid.prompts.take(pool.rest)), axis=1)
    return np.asarray(best[:, 1] - best[:, 0])


def _diverse(pool: Pool, n: int) -> Indices:
    """The committee's choice, taken in turn from clusters."""
    from sklearn.cluster import KMeans

    clusters = KMeans(max(n // 5, 2), n_init=1, random_state=pool.seed).fit_predict(pool.points[pool.rest])
    order = np.argsort(-pool.gains, kind="stable")
    turns, seen = np.empty(len(order)), dict[int, int]()
    for place, row in enumerate(order.tolist()):
        turn = seen[clusters[row]] = seen.get(clusters[row], 0) + 1
        turns[row] = turn + place / len(order)
    return pool.rest[np.argsort(turns, kind="stable")[:n]]


def _centres(pool: Pool, n: int) -> Indices:
    """Each as far as possible from all before (k-centre; Sener and Savarese 2018)."""
    points, taken = pool.points[pool.rest], list[int]()
    similarity = (points @ pool.points[pool.start].T).max(axis=1)
    for _ in range(n):
        taken.append(int(similarity.argmin()))
        similarity = np.maximum(similarity, points @ points[taken[-1]])
        similarity[taken[-1]] = np.inf
    return pool.rest[taken]


WAYS: Mapping[str, Way] = {
    "random": _random,
    "even": _even,
    "committee": _by(lambda pool: pool.gains),
    "committee, diverse": _diverse,
    "margin": _by(_margins),
    "k-centre": _centres,
}


def main() -> None:
    """Measure what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grids", nargs="+", type=Path)
    parser.add_argument("--embedding", required=True, help="folder of a sentence-embedding model")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens of a prompt that are read")
    parser.add_argument("--field", help="the field whose labels are the kinds of prompts")
    parser.add_argument("--without", nargs="+", default=[], metavar="TEACHER", help="teachers that are left out")
    parser.add_argument("--start", type=int, default=250, help="first calibration prompts")
    parser.add_argument("--add", type=int, nargs="+", default=(250, 500), help="prompts that are added")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(20))
    parser.add_argument("--home", type=Path, default=Path("build/studies/active"))
    parser.add_argument("--report", type=Path, default=REPORT, help="the page whose tables are replaced")
    given = parser.parse_args()
    given.backbone = None
    given.home.mkdir(parents=True, exist_ok=True)
    file = given.home / "outcomes.jsonl"
    lines = file.read_bytes().splitlines() if file.exists() else []
    found = [msgspec.json.decode(line, type=Outcome) for line in lines]
    kept = {(each.grid, each.case, each.seed) for each in found}
    for path in given.grids:
        grid, kinds = _read(path, given)
        for seed in given.seeds:
            for case in CASES:
                if (grid.name, case, seed) not in kept:
                    outcomes = list(_measured(grid, kinds, case, seed, given))
                    found += outcomes
                    with file.open("ab") as to:
                        to.write(b"".join(msgspec.json.encode(each) + b"\n" for each in outcomes))
    put(given.report, report(found))


def _read(path: Path, given: argparse.Namespace) -> tuple[Grid, Indices]:
    """A grid that is read by its states alone, and the kind of each of its prompts."""
    from sklearn.cluster import KMeans

    grid = router_kinds.read(path, given.field, given.without)
    labels = next(iter(grid.prompts.fields.values()), None)
    states = router_kinds.replace_states(grid, given).prompts.states
    grid = replace(grid, prompts=replace(grid.prompts, states=states, texts=(), fields={}))
    if labels is not None:
        return grid, np.unique(np.array(labels, dtype=object).astype(str), return_inverse=True)[1]
    return grid, KMeans(_CLUSTERS, n_init=3, random_state=0).fit_predict(_points(grid))


def _points(grid: Grid) -> Matrix:
    return design.unit(design.fit(grid.prompts).encode(grid.prompts))


def _measured(grid: Grid, kinds: Indices, case: str, seed: int, given: argparse.Namespace) -> Iterator[Outcome]:
    chance = np.random.default_rng(seed)
    order = chance.permutation(len(kinds))
    held, others = order[: len(order) // 3], order[len(order) // 3 :]
    names = chance.permutation(kinds.max() + 1)
    is_new = np.isin(kinds, names[: len(names) // 2]) if case == "new" else np.zeros(len(kinds), dtype=np.bool_)
    start = others[~is_new[others]][: given.start]
    rest = chance.permutation(others[~np.isin(others, start)])
    pool = Pool(grid, _points(grid), start, rest, is_new, seed)
    yield from _fitted(pool, held, "none", start[:0])
    for way, choose in WAYS.items():
        for n in given.add:
            yield from _fitted(pool, held, way, choose(pool, n))


def _fitted(pool: Pool, held: Indices, way: str, added: Indices) -> Iterator[Outcome]:
    grid, learn = pool.grid, np.concatenate([pool.start, added])
    examples = Examples(grid.rewards[learn], seed=pool.seed)
    prompts, rewards, is_new = grid.prompts.take(held), grid.rewards[held], pool.is_new[held]
    best = np.tile(np.nanmean(examples.rewards, axis=0), (len(held), 1))
    for kind in KINDS:
        with one_thread():
            scores = ROUTERS[kind].fit(grid.prompts.take(learn), examples).scores(prompts)
        gained = routed(scores, rewards)
        yield Outcome(
            grid.name,
            "new" if is_new.any() else "same",
            pool.seed,
            way,
            len(added),
            kind,
            float(gained.mean()),
            float(gained[is_new].mean()) if is_new.any() else None,
            float(routed(best, rewards).mean()),
            float(np.nanmax(rewards, axis=1).mean()),
        )


def report(found: Sequence[Outcome]) -> str:
    """A table for each grid and case."""
    cases = dict.fromkeys((each.grid, each.case) for each in found)
    return "".join(_case(*case, [each for each in found if (each.grid, each.case) == case]) for case in cases)


def _case(grid: str, case: str, found: Sequence[Outcome]) -> str:
    sizes = sorted({each.added for each in found if each.added})
    n_seeds = len({each.seed for each in found})
    base = _mean([each.reward for each in found if each.way == "none"])
    head = ["way", *(f"{n} added" for n in sizes)]
    gains = [["random", *(_random_gain(found, n) for n in sizes)]]
    gains += [[way, *(_against(found, way, n, "reward") for n in sizes)] for way in WAYS if way != "random"]
    text = (
        f"### {grid}, {CASES[case]}\n\nReward {base:.3f} before; the gain of random prompts, and that of each other "
        f"way over random (mean of {' and '.join(KINDS)}, {n_seeds} seeds, 95%):\n\n" + table(head, gains)
    )
    if case == "new":
        rows = [[way, *(_against(found, way, n, "of_new") for n in sizes)] for way in WAYS if way != "random"]
        text += "Over random, on the prompts of new kinds alone:\n\n" + table(head, rows)
    return text


def _by_seed(found: Sequence[Outcome], way: str, added: int, name: str) -> Mapping[int, float]:
    """{seed: mean over the kinds of routers}."""
    mine = [each for each in found if each.way == way and each.added == added]
    return {seed: _mean([getattr(each, name) for each in mine if each.seed == seed]) for seed in {e.seed for e in mine}}


def _paired(one: Mapping[int, float], other: Mapping[int, float]) -> str:
    gains = np.array([one[seed] - other[seed] for seed in one.keys() & other.keys()])
    return f"{gains.mean():+.4f} +- {error(gains):.4f}"


def _random_gain(found: Sequence[Outcome], added: int) -> str:
    return _paired(_by_seed(found, "random", added, "reward"), _by_seed(found, "none", 0, "reward"))


def _against(found: Sequence[Outcome], way: str, added: int, name: str) -> str:
    return _paired(_by_seed(found, way, added, name), _by_seed(found, "random", added, name))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


if __name__ == "__main__":
    main()
