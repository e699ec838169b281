"""Policies that choose a teacher per prompt.

Pure NumPy. A policy is a (P, T) matrix with the probability of choosing each of T teachers for each of P
prompts. Only present cells can be chosen: if a strategy's first choice is missing, its next one is taken.
Most strategies rank the teachers, either once for all prompts or for each prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from persyn.method import rewards as reward_matrix
from persyn.method.intervals import Vector
from persyn.method.rewards import Matrix
from persyn.registry import Registry

Present = NDArray[np.bool_]
"""(P, T) which teachers can be chosen for which prompts."""


@dataclass(frozen=True, slots=True, eq=False)
class StrategyInputs:
    """Inputs available to a strategy. Compared by identity, so that results can be cached per instance.

    rewards, quality, learnability: (C, T) of the calibration prompts; C may be 0 where they are not needed.
    sizes:    (T,) parameters in billions, NaN where unknown.
    families: (T,) of the teachers; `family` is the student's.
    teachers: (T,) their names, in head order.
    price_in, price_out: (T,) US dollars per million prompt or response tokens, NaN where unknown.
    prompts:  (C,) the calibration prompts, {"messages", "meta"} each; empty for a strategy that does not read prompts.
    is_log_likelihood: whether learnability is one, so that its negative is the student's loss.
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
    is_log_likelihood: bool = True


Policy: TypeAlias = Callable[[StrategyInputs, Present, Mapping[str, Any]], Matrix]
"""Chooses teachers without reading the prompts, given their (P, T) presence and the arguments of the run file:
`ratio`, `beta` and `options`. Returns (P, T); raises `ValueError` when a required input is unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """A strategy as the rest of PerSyn knows it."""

    name: str
    #: One sentence for the documentation.
    summary: str
    #: What chooses the teacher of a prompt: `policy`, the fitted router, the user's function, or the rewards of the
    #: prompt's own responses.
    decided_by: Literal["policy", "router", "function", "rewards"] = "policy"
    #: For a strategy that is decided by it.
    policy: Policy | None = None
    #: The prompts that every teacher answers: none, the calibration prompts, or all.
    grid: Literal["none", "calibration", "all"]
    #: The fields that every teacher must have, and all descriptive fields that it reads.
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    #: Whether the student needs a family that is a teacher's.
    needs_family: bool = False
    #: Whether it reads learnability, also at alpha 0; and whether it needs it, and so a student.
    reads_learnability: bool = False
    needs_learnability: bool = False
    #: How figures draw it: colour, marker and line.
    style: tuple[str, str, str] = ("grey", "*", "-")


def _random(known: StrategyInputs, present: Present, arguments: Mapping[str, Any]) -> Matrix:
    return random(present)


def _static(known: StrategyInputs, present: Present, arguments: Mapping[str, Any]) -> Matrix:
    return by_ranking(_measured(reward_matrix.static_ranking(known.rewards)), present)


def _car(known: StrategyInputs, present: Present, arguments: Mapping[str, Any]) -> Matrix:
    if not known.is_log_likelihood:
        raise ValueError("needs the student's loss; this learnability is no log-likelihood")
    return by_ranking(_measured(car(known.quality, known.learnability, beta=arguments["beta"])), present)


def _strong(known: StrategyInputs, present: Present, arguments: Mapping[str, Any]) -> Matrix:
    return by_ranking(_strength(known), present)


def _mix(known: StrategyInputs, present: Present, arguments: Mapping[str, Any]) -> Matrix:
    return mix(_strength(known), present, ratio=arguments["ratio"])


def _family_strong(known: StrategyInputs, present: Present, arguments: Mapping[str, Any]) -> Matrix:
    return by_ranking(family_strength(_strength(known), known.families, known.family), present)


def _measured(ranking: Vector) -> Vector:
    if np.isnan(ranking).all():
        raise ValueError("no response of the calibration grid has a reward")
    return ranking


def _strength(known: StrategyInputs) -> Vector:
    """A teacher's strength is its size."""
    if np.isnan(known.sizes).any():
        raise ValueError("needs params_b of every teacher")
    return known.sizes


def policy(name: str, known: StrategyInputs, present: Present, **arguments: Any) -> Matrix:
    """Return the policy of a strategy that does not read the prompt.

    present:   (P, T) of the prompts to choose for.
    arguments: `ratio`, `beta` and the strategy's own options.
    Raises `ValueError` when a required input is unknown.
    """
    decide = STRATEGIES[name].policy
    assert decide is not None
    return decide(known, present, arguments)


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
    if np.isnan(learnability).all():
        raise ValueError("needs learnability, and no response has one")
    reward = reward_matrix.column_means(quality)
    loss = -reward_matrix.column_means(learnability)
    reward = reward - np.nanmin(reward, initial=0.0)
    return np.asarray(reward / (1.0 + beta * loss))


def draw(policy: Matrix, lots: Vector) -> NDArray[np.intp]:
    """Sample one teacher for each prompt from a policy.

    policy:  (P, T), rows sum to 1.
    lots:    (P,) uniform random numbers from [0, 1).
    returns: (P,) column indices.
    """
    reached = np.cumsum(policy, axis=1)
    return np.asarray(np.argmax(reached / reached[:, -1:] > lots[:, None], axis=1))


def places(policy: Callable[[Present], Matrix], present: Present, lots: Vector) -> Matrix:
    """Rank the teachers by asking a policy again and again without those that it has chosen.

    policy:  the (P, T) policy of P prompts, given which teachers can be chosen.
    lots:    as in `draw`; the same for every place.
    returns: (P, T), 0 for the first choice, -1 for the second one, ...; NaN where a teacher is not present.
    """
    found, left = np.full(present.shape, np.nan), np.array(present)
    for place in range(present.shape[1]):
        if not len(rows := np.flatnonzero(left.any(axis=1))):
            break
        columns = draw(policy(left[rows]), lots[rows])
        found[rows, columns] = -place
        left[rows, columns] = False
    return found


STRATEGIES = Registry(
    Strategy,
    Strategy(
        name="persyn",
        summary="the router, fitted to the calibration prompts' rewards",
        decided_by="router",
        grid="calibration",
        style=("blue", "o", "-"),
    ),
    Strategy(
        name="static",
        summary="the teacher with the best mean reward",
        policy=_static,
        grid="calibration",
        style=("orange", "s", "--"),
    ),
    Strategy(
        name="strong",
        summary="the largest teacher",
        policy=_strong,
        grid="none",
        needs=("params_b",),
        reads=("params_b",),
        style=("red", "^", "-."),
    ),
    Strategy(
        name="mix",
        summary="the largest teacher for a share of the prompts, else the smallest",
        policy=_mix,
        grid="none",
        needs=("params_b",),
        reads=("params_b",),
        style=("purple", "D", "-"),
    ),
    Strategy(
        name="family-strong",
        summary="the largest teacher of the student's family",
        policy=_family_strong,
        grid="none",
        needs=("params_b",),
        reads=("params_b", "family"),
        needs_family=True,
        style=("green", "v", "--"),
    ),
    Strategy(
        name="car",
        summary="the teacher with the best compatibility-adjusted reward",
        policy=_car,
        grid="calibration",
        reads_learnability=True,
        needs_learnability=True,
        style=("green", "P", "-."),
    ),
    Strategy(
        name="random",
        summary="each teacher with equal probability",
        policy=_random,
        grid="none",
        style=("grey", "x", "-"),
    ),
    Strategy(
        name="oracle",
        summary="the best response to each prompt, after every teacher has answered it",
        decided_by="rewards",
        grid="all",
        style=("grey", "", ":"),
    ),
    Strategy(
        name="python",
        summary="your own function",
        decided_by="function",
        grid="calibration",
        reads=("family", "params_b", "price_in", "price_out"),
        reads_learnability=True,
    ),
    groups=("persyn.strategies",),
)
