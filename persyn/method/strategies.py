"""Policies that choose a teacher per prompt.

Pure NumPy. A policy is a (P, T) matrix with the probability of choosing each of T teachers for each of P
prompts. Only present cells can be chosen: if a strategy's first choice is missing, its next one is taken.
Most strategies rank the teachers, either once for all prompts or for each prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from persyn.method import rewards as reward_matrix
from persyn.method.rewards import Matrix

Vector = NDArray[np.float64]
Present = NDArray[np.bool_]
"""(P, T) which teachers can be chosen for which prompts."""

Kind: TypeAlias = Literal["static", "strong", "mix", "family-strong", "car", "random"]
"""Strategies that do not read the prompt."""

#: Minimum number of nearest prompts.
_NEIGHBOURS_AT_LEAST = 5


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """Inputs available to a strategy. Compared by identity, so that results can be cached per instance.

    rewards, quality, learnability: (C, T) of the calibration prompts; C may be 0 where they are not needed.
    sizes:    (T,) parameters in billions, NaN where unknown.
    families: (T,) of the teachers; `family` is the student's.
    teachers: (T,) their names, in head order.
    price_in, price_out: (T,) US dollars per million prompt or response tokens, NaN where unknown.
    prompts:  (C,) the calibration prompts, {"messages", "meta"} each; empty for a strategy that does not read prompts.
    """

    rewards: Matrix
    quality: Matrix
    learnability: Matrix
    sizes: Vector
    families: Sequence[str | None]
    family: str | None
    teachers: Sequence[str]
    price_in: Vector
    price_out: Vector
    prompts: Sequence[dict[str, Any]] = ()


def policy(kind: Kind, known: Known, present: Present, *, ratio: float, beta: float) -> Matrix:
    """Return the policy of a strategy that does not read the prompt.

    present: (P, T) of the prompts to choose for.
    Raises `ValueError` when a required input is unknown.
    """
    match kind:
        case "random":
            return random(present)
        case "static":
            return by_ranking(_measured(reward_matrix.static_ranking(known.rewards)), present)
        case "car":
            return by_ranking(_measured(car(known.quality, known.learnability, beta=beta)), present)
        case "strong":
            return by_ranking(_strength(known), present)
        case "mix":
            return mix(_strength(known), present, ratio=ratio)
        case "family-strong":
            return by_ranking(family_strength(_strength(known), known.families, known.family), present)


def _measured(ranking: Vector) -> Vector:
    if np.isnan(ranking).all():
        raise ValueError("no response of the calibration grid has a reward")
    return ranking


def _strength(known: Known) -> Vector:
    """A teacher's strength is its size."""
    if np.isnan(known.sizes).any():
        raise ValueError("strength is size, and params_b is not known of every teacher")
    return known.sizes


def by_ranking(scores: Vector | Matrix, present: Present) -> Matrix:
    """Choose the present teacher with the highest score; ties go to the first in head order.

    scores:  (T,) for every prompt, or (P, T); NaN ranks lowest.
    returns: (P, T), a single 1 in each row that has a present cell.
    """
    ranked = np.where(np.isnan(scores), -np.inf, scores)
    ranked = np.where(present, np.broadcast_to(ranked, present.shape), np.nan)
    policy = np.zeros(present.shape)
    rows = np.flatnonzero(present.any(axis=1))
    policy[rows, np.nanargmax(ranked[rows], axis=1)] = 1.0
    return policy


def random(present: Present) -> Matrix:
    """Choose every present teacher with equal probability, the random mix of the literature."""
    count = present.sum(axis=1, keepdims=True)
    return np.asarray(np.divide(present, count, out=np.zeros(present.shape), where=count > 0))


def mix(strength: Vector, present: Present, *, ratio: float) -> Matrix:
    """Choose the strongest teacher for a share of the prompts, else the weakest (Li et al. 2025, arXiv 2502.12143).

    strength: (T,).
    ratio:    probability of the strongest teacher.
    """
    return ratio * by_ranking(strength, present) + (1.0 - ratio) * by_ranking(-strength, present)


def family_strength(strength: Vector, families: Sequence[str | None], family: str | None) -> Vector:
    """(T,) strengths that rank the student's family first and otherwise keep the order of `strength`.

    Raises `ValueError` when no teacher belongs to the student's family.
    """
    is_kin = np.array([family is not None and name == family for name in families])
    if not is_kin.any():
        known = ", ".join(sorted({name for name in families if name})) or "none"
        lack = f"no teacher is of the student's family {family!r}" if family else "the student has no family"
        raise ValueError(f"{lack}; the teachers' families: {known}")
    spread = np.nanmax(strength) - np.nanmin(strength) + 1.0
    return np.where(is_kin, strength + spread, strength)


def car(quality: Matrix, learnability: Matrix, *, beta: float) -> Vector:
    """Compatibility-adjusted reward of each teacher: mean reward / (1 + beta * the student's mean loss).

    Xu et al. 2024, arXiv 2411.07133.

    quality:      (P, T) raw. A reward model's logits may be negative, and their ratio would favour responses that
                  are hard to learn, so the means are shifted until the lowest is 0.
    learnability: (P, T) mean log-likelihood, nats per token; the loss is its negative.
    returns:      (T,); NaN for a teacher without both.
    """
    reward = reward_matrix.column_means(quality)
    loss = -reward_matrix.column_means(learnability)
    reward = reward - np.nanmin(reward, initial=0.0)
    return np.asarray(reward / (1.0 + beta * loss))


def neighbours(features: Matrix, rewards: Matrix, of: Matrix, *, k: int | None = None) -> Matrix:
    """Mean reward of each teacher over the k nearest prompts by cosine similarity.

    Prompts without two distinct rewards are ignored, as in the static ranking.

    features: (C, H) of the prompts whose `rewards` (C, T) are known.
    of:       (P, H) of the prompts to predict.
    k:        None means the square root of C, at least 5.
    returns:  (P, T); NaN where none of the k has a reward.
    """
    k = max(_NEIGHBOURS_AT_LEAST, round(len(features) ** 0.5)) if k is None else k
    nearest = np.argsort(-_unit(of) @ _unit(features).T, axis=1, kind="stable")[:, :k]
    told = np.where(reward_matrix.informative(rewards)[:, None], rewards, np.nan)
    near = told[nearest]  # (P, k, T)
    count = (~np.isnan(near)).sum(axis=1)
    return np.asarray(np.divide(np.nansum(near, axis=1), count, out=np.full(count.shape, np.nan), where=count > 0))


def draw(policy: Matrix, lots: Vector) -> NDArray[np.intp]:
    """Sample one teacher for each prompt from a policy.

    policy:  (P, T), rows sum to 1.
    lots:    (P,) uniform random numbers from [0, 1).
    returns: (P,) column indices.
    """
    reached = np.cumsum(policy, axis=1)
    return np.asarray(np.argmax(reached / reached[:, -1:] > lots[:, None], axis=1))


def _unit(rows: Matrix) -> Matrix:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(np.divide(rows, length, out=np.zeros_like(rows), where=length > 0))
