"""Decide whether routing pays: a router against the best single teacher, on prompts that it was not fitted to.

Pure NumPy. The router's scores are cross-fitted: each prompt is scored by a router that has not seen it. The best
single teacher is known only from the same prompts, so the router is compared with *every* teacher: it must beat each
of them beyond noise (an intersection-union test, Berger 1982), which no lucky choice of the best one can spoil.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from msgspec import Struct

from persyn.method import rewards as reward_matrix
from persyn.method import strategies
from persyn.method.intervals import Interval, Vector
from persyn.method.rewards import Indices, Matrix

Outcome: TypeAlias = Literal["route", "do not route", "cannot tell"]

#: With fewer measured prompts the verdict may change: routers still learn much from more.
FEW = 1_000
#: With fewer still, nothing can be told.
LEAST = 50
#: Share of the gap between the best single teacher and the oracle that routing must close to be worth it, and the least
#: gain that is worth it however small the gap is, as a share of the largest difference between two rewards of a prompt.
WORTHWHILE, WORTHWHILE_AT_LEAST = 0.05, 0.01
#: Standard normal quantiles: of the interval's ends (97.5%), and of the evidence against routing (80%), because to use
#: one teacher wrongly costs less than to route wrongly.
_SURE, _LIKELY = 1.959964, 0.841621
#: Routers fitted to overlapping folds err together: widens standard errors by sqrt(1 + k / (k - 1)) for k = 5 folds
#: (Nadeau & Bengio 2003). Used for upper ends only: cross-fitted routers have learned from fewer prompts, and the best
#: of several teachers looks better than it is, so that lower ends are low enough.
_FOLDS_ERR_TOGETHER = 1.5
_FOLDS = 5
#: Prompts of all groups that count as much as a group's own: a group of few prompts follows the static ranking.
_SHRINKAGE = 10.0


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What a verdict is based on: P calibration prompts, hold-out included, and K teachers.

    teachers:  (K,) names, in head order.
    rewards:   (P, K) at the run's alpha, NaN where missing.
    scores:    (P, K) of a router that was not fitted to the prompt; NaN where there is none.
    n_prompts: prompts that the decision is about, those without a calibration response.
    groups:    (P,) labels of the prompts, such as their sources; None if there are none.
    alphas:    {alpha: (P, K) rewards} at other weights of learnability.
    """

    teachers: Sequence[str]
    rewards: Matrix
    scores: Matrix
    n_prompts: int
    groups: Sequence[str] | None = None
    alphas: Mapping[float, Matrix] = field(default_factory=dict)

    def usable(self) -> Evidence:
        """The prompts with two rewards or more, and a score of every teacher."""
        rows = np.flatnonzero(((~np.isnan(self.rewards)).sum(axis=1) > 1) & ~np.isnan(self.scores).any(axis=1))
        groups = None if self.groups is None else [self.groups[row] for row in rows]
        alphas = {alpha: found[rows] for alpha, found in self.alphas.items()}
        return Evidence(self.teachers, self.rewards[rows], self.scores[rows], self.n_prompts, groups, alphas)


class Lead(Struct, frozen=True):
    """How far the best single teacher is ahead of the second at one weight of learnability."""

    alpha: float
    teacher: str
    second: str
    lead: Interval


class GroupFacts(Struct, frozen=True):
    """One group of prompts; rewards are per prompt of the group."""

    group: str
    n_prompts: int
    #: Its best teacher, and how far that is ahead of the best single teacher of all prompts.
    teacher: str
    lead: Interval
    #: The router's gain over the best single teacher of all prompts.
    gain: Interval
    #: Its part of the whole gain: the parts of all groups add up to the router's gain.
    part: float


class Verdict(Struct, frozen=True):
    """Whether routing pays. All gains are in units of the reward, per prompt unless stated otherwise."""

    outcome: Outcome
    #: The best single teacher.
    teacher: str
    #: Of the router over the best single teacher.
    gain: Interval
    #: Over all prompts that the decision is about.
    total: Interval
    n_prompts: int
    #: Calibration prompts with two rewards or more.
    n_calibration: int
    #: Those of them that the gain is measured on: the hold-out alone where the router was fitted to the others.
    n_measured: int
    #: Mean rewards.
    router: float
    single: float
    oracle: float
    #: The least gain that is worth it.
    worthwhile: float
    #: Share of the gap between the best single teacher and the oracle that the router closes; None without a gap.
    gap_closed: Interval | None
    #: The second-best single teacher, and the best one's lead over it.
    second: str
    lead: Interval
    #: Calibration prompts that are likely needed in addition before the verdict is `route` or `do not route`.
    more: int | None
    #: Gain of the best teacher of each prompt's group, cross-validated; None without groups.
    by_group: Interval | None = None
    #: By their part of the gain, largest first.
    groups: list[GroupFacts] = []
    alphas: list[Lead] = []
    #: A field that was to group the prompts and does not; see `is_group`.
    no_group: str | None = None

    @property
    def is_near_tie(self) -> bool:
        """Whether the best single teacher is not ahead of the second beyond noise."""
        return self.lead.low <= 0

    @property
    def one_leads(self) -> bool:
        """Whether the same teacher is the best in every group."""
        return len({group.teacher for group in self.groups}) <= 1


def judge(evidence: Evidence) -> Verdict:
    """Compare a router with every single teacher; raise `ValueError` when no prompt allows a comparison."""
    known, ranking = evidence.usable(), reward_matrix.static_ranking(evidence.rewards)
    n_calibration = int(((~np.isnan(evidence.rewards)).sum(axis=1) > 1).sum())
    if not len(known.rewards):
        raise ValueError("no calibration prompt has two rewards, and scores of a router that was not fitted to it")
    singles, spread = always(known.rewards, ranking), _spread(known.rewards)
    best, second = best_first(ranking)[:2]
    routed = chosen(known.scores, known.rewards)
    versus = _Versus(routed[:, None] - singles, spread)
    gap = float(np.nanmax(known.rewards, axis=1).mean() - singles[:, best].mean())
    worthwhile = max(WORTHWHILE * gap, WORTHWHILE_AT_LEAST * spread)
    gain = versus.gain()
    outcome = versus.outcome(worthwhile)
    n_measured = len(routed)
    return Verdict(
        outcome=outcome,
        teacher=known.teachers[best],
        gain=gain,
        total=_scaled(gain, known.n_prompts),
        n_prompts=known.n_prompts,
        n_calibration=n_calibration,
        n_measured=n_measured,
        router=float(routed.mean()),
        single=float(singles[:, best].mean()),
        oracle=float(singles[:, best].mean()) + gap,
        worthwhile=worthwhile,
        gap_closed=_scaled(gain, 1 / gap) if gap > 0 else None,
        second=known.teachers[second],
        lead=difference(singles[:, best] - singles[:, second], spread),
        more=versus.more(worthwhile, n_calibration) if outcome == "cannot tell" else None,
        by_group=_by_group(known, singles, spread),
        groups=_groups(known, singles, best, routed),
        alphas=[
            _lead(alpha, found, known.teachers)
            for alpha, found in sorted(known.alphas.items())
            if not np.isnan(found).all()
        ],
    )


def is_group(labels: Sequence[str | None]) -> bool:
    """Whether the prompts' labels make groups of them: no more different ones than half of the prompts."""
    return len(set(labels)) <= max(1, len(labels) / 2)


def chosen(scores: Matrix, rewards: Matrix) -> Vector:
    """(P,) reward of the present teacher with the highest score; ties go to the first in head order."""
    policy = strategies.by_ranking(scores, ~np.isnan(rewards))
    return np.asarray((policy * np.nan_to_num(rewards)).sum(axis=1))


def best_first(ranking: Vector) -> list[int]:
    """Columns by their static ranking, the best first; a teacher without a reward comes last."""
    return [int(column) for column in np.argsort(-np.where(np.isnan(ranking), -np.inf, ranking), kind="stable")]


def always(rewards: Matrix, ranking: Vector) -> Matrix:
    """(P, K) reward of always asking teacher k, and where its response is missing the next in the static ranking."""
    instead = chosen(np.broadcast_to(ranking, rewards.shape), rewards)
    return np.where(np.isnan(rewards), instead[:, None], rewards)


def difference(gains: Vector, spread: float) -> Interval:
    """The mean of paired differences with a 95% interval; `spread` as in `_errors`."""
    mean, error = float(gains.mean()), float(_errors(gains[:, None], spread)[0])
    return Interval(mean, mean - _SURE * error, mean + _SURE * error)


def paired(before: Matrix, after: Matrix, rewards: Matrix) -> tuple[float, float, Interval]:
    """The mean rewards of two routers with some scores (P, K), and what the second gains over the first."""
    one, other = chosen(before, rewards), chosen(after, rewards)
    return float(one.mean()), float(other.mean()), difference(other - one, _spread(rewards))


def _errors(gains: Matrix, spread: float) -> Vector:
    """(K,) standard errors of the column means of (P, K) paired differences.

    Two imaginary prompts, with the largest difference in either direction, keep a few equal differences from looking
    certain (in the manner of Agresti & Caffo 2000).

    spread: the largest possible difference.
    """
    squares = ((gains - gains.mean(axis=0)) ** 2).sum(axis=0) + 2 * spread**2
    return np.asarray(np.sqrt(squares) / len(gains))


class _Versus:
    """A router against each teacher.

    gains: (P, K) the router's reward minus that of always asking teacher k.
    """

    def __init__(self, gains: Matrix, spread: float) -> None:
        self.n = len(gains)
        self.means, self.errors = gains.mean(axis=0), _errors(gains, spread)

    def gain(self) -> Interval:
        """The gain over the best single teacher, whichever it is.

        The lower end is below the gain over every teacher, and so below that over the best one.
        """
        low, high = self.means - _SURE * self.errors, self.means + _FOLDS_ERR_TOGETHER * _SURE * self.errors
        return Interval(float(self.means.min()), float(low.min()), float(high.min()))

    def outcome(self, worthwhile: float) -> Outcome:
        """The verdict, given the smallest gain that is worth it."""
        if self.n < LEAST:
            return "cannot tell"
        if self.gain().low > 0:
            return "route"
        is_unlikely = (self.means + _LIKELY * self.errors).min() < worthwhile
        return "do not route" if is_unlikely or worthwhile <= 0 else "cannot tell"

    def more(self, worthwhile: float, n_calibration: int) -> int:
        """Additional prompts after which the same gain would be told from none, or from one that is not worthwhile.

        At least those up to `FEW`, and rounded up to two digits: errors shrink with the square root of the number. Just
        these where no number would tell, because all gains are exactly between the two.

        n_calibration: calibration prompts, of which the same share would be measured.
        """
        to_route, to_refrain = (
            _times(_SURE * self.errors, self.means),
            _times(_LIKELY * self.errors, worthwhile - self.means),
        )
        times = min(to_route.max(), to_refrain.min())
        wanted = max(n_calibration * times if np.isfinite(times) else 0.0, FEW, n_calibration + 1) - n_calibration
        step = 10 ** max(0, math.floor(math.log10(max(wanted, 1))) - 1)
        return int(max(math.ceil(wanted / step), 1) * step)


def _times(errors: Vector, distances: Vector) -> Vector:
    """How many times as many prompts make errors as small as distances; infinite for a distance of 0 or below."""
    ratios = np.divide(errors, distances, out=np.full(len(errors), np.inf), where=distances > 0)
    return np.asarray(ratios**2)


def _scaled(interval: Interval, by: float) -> Interval:
    return Interval(interval.mean * by, interval.low * by, interval.high * by)


def _spread(rewards: Matrix) -> float:
    """The largest difference between two rewards of a prompt."""
    return float((np.nanmax(rewards, axis=1) - np.nanmin(rewards, axis=1)).max())


def _lead(alpha: float, rewards: Matrix, teachers: Sequence[str]) -> Lead:
    ranking = reward_matrix.static_ranking(rewards)
    singles = always(rewards[(~np.isnan(rewards)).any(axis=1)], ranking)
    best, second = best_first(ranking)[:2]
    lead = difference(singles[:, best] - singles[:, second], _spread(singles))
    return Lead(alpha, teachers[best], teachers[second], lead)


def _by_group(known: Evidence, singles: Matrix, spread: float) -> Interval | None:
    """The gain of asking each group's best teacher, chosen on the other folds and shrunk towards the best of all."""
    if known.groups is None or len(set(known.groups)) < 2:
        return None
    labels, of_group = np.unique(np.array(known.groups, dtype=object).astype(str), return_inverse=True)
    fold = np.random.default_rng(0).permutation(len(singles)) % _FOLDS
    scores = np.empty(singles.shape)
    for out in range(_FOLDS):
        scores[fold == out] = _group_means(singles[fold != out], of_group[fold != out], len(labels))[
            of_group[fold == out]
        ]
    return _Versus(chosen(scores, known.rewards)[:, None] - singles, spread).gain()


def _group_means(singles: Matrix, of_group: Indices, n_groups: int) -> Matrix:
    """(G, K) mean rewards by group, shrunk towards those of all prompts."""
    sums = np.tile(_SHRINKAGE * singles.mean(axis=0), (n_groups, 1))
    np.add.at(sums, of_group, singles)
    return np.asarray(sums / (np.bincount(of_group, minlength=n_groups)[:, None] + _SHRINKAGE))


def _groups(known: Evidence, singles: Matrix, best: int, routed: Vector) -> list[GroupFacts]:
    if known.groups is None:
        return []
    spread, members = _spread(known.rewards), dict[str, list[int]]()
    for row, label in enumerate(known.groups):
        members.setdefault(label, []).append(row)
    found = []
    for label, rows in sorted(members.items()):
        leader = int(np.argmax(singles[rows].mean(axis=0)))
        gains = routed[rows] - singles[rows, best]
        found.append(
            GroupFacts(
                group=label,
                n_prompts=len(rows),
                teacher=known.teachers[leader],
                lead=difference(singles[rows, leader] - singles[rows, best], spread),
                gain=difference(gains, spread),
                part=float(gains.sum() / len(routed)),
            )
        )
    return sorted(found, key=lambda group: -group.part)
