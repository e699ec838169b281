"""Choose a kind of router by cross-validation; the static ranking is one of the candidates.

Where the best score decides alone, by the reward that it brings. Where scores are weighed against costs, by how surely
they predict rewards: there, a router is useful if it knows where a cheap teacher is good enough, even if one teacher is
the best everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from msgspec import Struct

from persyn.llm.protocols import Tick
from persyn.method import expectation
from persyn.method.intervals import Vector
from persyn.method.rewards import Matrix, preference_weights
from persyn.method.strategies import Present
from persyn.router.kinds.base import Examples, Predictor, Prompts, RouterKind, quietly
from persyn.router.kinds.crossfit import Bench, one_thread

#: Bounds of the logarithm of the factor of `log_odds_scale`, for scores that differ by 1 on average.
_LOG_FACTORS = (-7.0, 4.0)


class Candidate(Struct, frozen=True):
    """A kind's cross-validated mean reward over the calibration prompts.

    gain: over the static ranking; error: the standard error of the gain. Both in units of the reward.
    """

    kind: str
    reward: float
    gain: float
    error: float


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """The kind that was taken, and on what evidence.

    predictor: of this kind, fitted to all prompts.
    scores:     (P, K) out-of-fold scores: those of the kind that the other folds' rewards would have chosen, so that
                they show what choosing comes to, in the unit of the predictor's. A fold's scores are comparable within
                a prompt only.
    scale:      by which both are log-odds; see `log_odds_scale`.
    candidates: in the order of the registry.
    why:        a sentence.
    """

    kind: str
    predictor: Predictor
    scores: Matrix
    scale: float
    candidates: list[Candidate]
    why: str


def routed(scores: Matrix, rewards: Matrix) -> Vector:
    """(P,) reward of the present teacher with the highest score; NaN for a prompt without any reward."""
    best = np.where(np.isnan(rewards), -np.inf, scores).argmax(axis=1)
    return np.asarray(rewards[np.arange(len(rewards)), best])


def choose(
    kinds: Sequence[RouterKind],
    prompts: Prompts,
    examples: Examples,
    *,
    is_weighed: bool = False,
    tick: Tick = quietly,
) -> Choice:
    """Take the kind with the highest reward, or one that is preferred and within its standard errors of it.

    kinds:      at least one; those that find nothing to read in the prompts are left out.
    is_weighed: whether scores will be weighed against costs or limits; then take the kind whose scores predict rewards
                most surely, see `Expectation.evidence`.
    """
    return choose_on(Bench(prompts, examples, tick), kinds, is_weighed=is_weighed)


def choose_on(bench: Bench, kinds: Sequence[RouterKind], *, is_weighed: bool = False) -> Choice:
    """See `choose`; the bench keeps what is fitted."""
    examples = bench.examples
    with one_thread():
        kinds = [kind for kind in kinds if kind.can_read(bench.prompts)]
        found = {kind.name: bench.fitted(kind) for kind in kinds}
    candidates = _Candidates(kinds, [scores for _, scores in found.values()], examples)
    pick = candidates.surest if is_weighed else candidates.preferred
    place, fold = pick(np.ones(len(examples), dtype=np.bool_)), bench.fold
    scores = np.zeros(examples.rewards.shape)
    for each in np.unique(fold):
        scores[fold == each] = candidates.scores(pick(fold != each), like=place)[fold == each]
    kind = kinds[place].name
    why = candidates.surest_of(place) if is_weighed else candidates.preferred_of(place)
    return Choice(kind, found[kind][0], scores, candidates.scale(place), candidates.table(), f"{kind}: {why}")


@dataclass(frozen=True, slots=True, eq=False)
class _Candidates:
    """N kinds with their (P, K) out-of-fold scores of the same prompts."""

    kinds: Sequence[RouterKind]
    out: Sequence[Matrix]
    examples: Examples
    _scales: dict[int, float] = field(default_factory=dict)

    @property
    def rewards(self) -> Matrix:
        """(P, N) rewards of what each kind routes; NaN for a prompt without any reward."""
        return np.column_stack([routed(each, self.examples.rewards) for each in self.out])

    def preferred(self, rows: Present) -> int:
        """The kind that is within the most of its standard errors of the highest mean reward of some prompts.

        Only the best itself is within 0; of several kinds, the one that is preferred within the most errors.
        """
        within = np.array([kind.preferred_within for kind in self.kinds])
        rewards = _known(self.rewards[rows])
        if not len(rewards):
            return int(within.argmax())
        behind = rewards[:, [rewards.mean(axis=0).argmax()]] - rewards
        error = behind.std(axis=0) / np.sqrt(len(rewards))
        return int(np.where(behind.mean(axis=0) <= error * within, within, -1.0).argmax())

    def surest(self, rows: Present) -> int:
        """The kind whose scores predict the rewards of some prompts most surely; the first if none does."""
        return int(np.argmax([self._evidence(place, rows) for place in range(len(self.kinds))]))

    def _evidence(self, place: int, rows: Present) -> float:
        with suppress(ValueError):  # a teacher has no reward on these prompts
            return expectation.of_scores(self.out[place][rows], self.examples.rewards[rows]).evidence
        return 0.0

    def scale(self, place: int) -> float:
        """By which a kind's scores are log-odds."""
        if place not in self._scales:
            self._scales[place] = log_odds_scale(self.out[place], self.examples)
        return self._scales[place]

    def scores(self, place: int, *, like: int) -> Matrix:
        """A kind's scores in the unit of another's."""
        return self.out[place] if place == like else self.out[place] * (self.scale(place) / self.scale(like))

    def table(self) -> list[Candidate]:
        """All kinds beside the first, the static ranking."""
        rewards = _known(self.rewards)
        gains = rewards - rewards[:, :1]
        errors = gains.std(axis=0) / np.sqrt(max(len(gains), 1))
        return [
            Candidate(kind.name, float(reward), float(gain), float(error))
            for kind, reward, gain, error in zip(
                self.kinds, rewards.mean(axis=0), gains.mean(axis=0), errors, strict=True
            )
        ]

    def preferred_of(self, place: int) -> str:
        """Why a kind is preferred."""
        table = self.table()
        chosen, best = table[place], max(table, key=lambda candidate: candidate.reward)
        within = self.kinds[place].preferred_within
        reach = f", preferred within {within:g} standard errors of {best.kind} ({best.reward:.3f})"
        return (
            f"cross-validated reward {chosen.reward:.3f}{'' if chosen is best else reach}; "
            f"{chosen.gain:+.3f} +- {chosen.error:.3f} over the best single teacher"
        )

    def surest_of(self, place: int) -> str:
        """Why a kind is the surest."""
        evidence = self._evidence(place, np.ones(len(self.examples), dtype=np.bool_))
        if not evidence:
            return "no router predicts rewards"
        if np.isinf(evidence):
            return "predicts rewards without error"
        return f"predicts rewards most surely (slope {evidence:.1f} standard errors above 0)"


def _known(rewards: Matrix) -> Matrix:
    return np.asarray(rewards[~np.isnan(rewards).any(axis=1)])


def log_odds_scale(scores: Matrix, examples: Examples) -> float:
    """The factor for which sigmoid(factor * difference of two scores) predicts the preferences best; 1 without any.

    scores: (P, K) out-of-fold, in any unit.
    """
    from scipy.optimize import minimize_scalar

    weights = preference_weights(examples.rewards, examples.preferences, examples.errors)
    stated = np.nonzero(weights)
    margins = (scores[:, :, None] - scores[:, None, :])[stated]
    unit = float(np.abs(margins).mean()) if len(margins) else 0.0
    if not unit:
        return 1.0

    def loss(log_factor: float) -> float:
        return float(np.average(np.logaddexp(0.0, -np.exp(log_factor) * margins / unit), weights=weights[stated]))

    return float(np.exp(minimize_scalar(loss, bounds=_LOG_FACTORS, method="bounded").x) / unit)
