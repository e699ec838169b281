"""Choose a kind of router by cross-validated reward; the static ranking is one of the candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from msgspec import Struct

from persyn.llm.protocols import Tick
from persyn.method.intervals import Vector
from persyn.method.rewards import Matrix, preference_weights
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
                they show what choosing comes to. A fold's scores are comparable within a prompt only.
    scale:      by which the predictor's scores are log-odds; see `log_odds_scale`.
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


def choose(kinds: Sequence[RouterKind], prompts: Prompts, examples: Examples, *, tick: Tick = quietly) -> Choice:
    """Take the kind with the highest reward, or one that is preferred and within its standard errors of it.

    kinds: at least one; those that find nothing to read in the prompts are left out.
    """
    return choose_on(Bench(prompts, examples, tick), kinds)


def choose_on(bench: Bench, kinds: Sequence[RouterKind]) -> Choice:
    """See `choose`; the bench keeps what is fitted."""
    examples = bench.examples
    with one_thread():
        kinds = [kind for kind in kinds if kind.can_read(bench.prompts)]
        found = {kind.name: bench.fitted(kind) for kind in kinds}
    names, out, fold = list(found), [scores for _, scores in found.values()], bench.fold
    rewards = np.column_stack([routed(each, examples.rewards) for each in out])
    known = ~np.isnan(rewards).any(axis=1)
    within = [kind.preferred_within for kind in kinds]
    place = _preferred(rewards[known], within)
    taken = kinds[place]
    scores = np.zeros(examples.rewards.shape)
    for each in np.unique(fold):
        inside, others = fold == each, known & (fold != each)
        scores[inside] = out[_preferred(rewards[others], within)][inside]
    candidates = _candidates(names, rewards[known])
    scale = log_odds_scale(out[place], examples)
    return Choice(taken.name, found[taken.name][0], scores, scale, candidates, _why(taken, candidates))


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


def _preferred(rewards: Matrix, within: Sequence[float]) -> int:
    """Of N candidates' (P, N) rewards: the one that is within the most of its (N,) standard errors of the highest mean.

    Only the best itself is within 0; of several candidates, the one that is preferred within the most errors.
    """
    if not len(rewards):
        return int(np.argmax(within))
    behind = rewards[:, [rewards.mean(axis=0).argmax()]] - rewards
    error = behind.std(axis=0) / np.sqrt(len(rewards))
    is_near = behind.mean(axis=0) <= error * np.asarray(within)
    return int(np.where(is_near, within, -1.0).argmax())


def _candidates(names: Sequence[str], rewards: Matrix) -> list[Candidate]:
    gains = rewards - rewards[:, :1]
    errors = gains.std(axis=0) / np.sqrt(max(len(gains), 1))
    return [
        Candidate(name, float(reward), float(gain), float(error))
        for name, reward, gain, error in zip(names, rewards.mean(axis=0), gains.mean(axis=0), errors, strict=True)
    ]


def _why(taken: RouterKind, candidates: Sequence[Candidate]) -> str:
    best = max(candidates, key=lambda candidate: candidate.reward)
    chosen = next(candidate for candidate in candidates if candidate.kind == taken.name)
    reach = f", preferred within {taken.preferred_within:g} standard errors of {best.kind} ({best.reward:.3f})"
    return (
        f"{taken.name}: cross-validated reward {chosen.reward:.3f}{'' if chosen is best else reach}; "
        f"{chosen.gain:+.3f} +- {chosen.error:.3f} over the best single teacher"
    )
