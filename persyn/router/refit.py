"""Refit routers on cached features of the grid, at another alpha or calibration size, in seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persyn.llm.protocols import Fit, ModelSpec
from persyn.method import rewards as reward_matrix
from persyn.method import routing_metrics
from persyn.method.rewards import Indices, Matrix
from persyn.router import encoders
from persyn.router.kinds.base import Examples, Prompts, RouterKind
from persyn.router.kinds.crossfit import Bench, one_thread
from persyn.router.kinds.registry import ROUTERS

#: Number of random draws per point of the learning curve.
REPEATS = 5


def read(home: Path, spec: ModelSpec, request: Fit) -> Prompts:
    """A fit's prompts as routers read them; missing states are computed and cached in `home`.

    spec: of a `router_fit` engine.
    Raises `EngineError` when a model cannot be loaded, `UsageError` when it has changed.
    """
    return encoders.of_fit(spec, request, home).read(request.conversations, request.labels, keep=True)


def scores(kind: RouterKind, prompts: Prompts, examples: Examples, learn: Indices) -> Matrix:
    """(P, K) scores of all P prompts by a router fitted to some of them.

    learn: indices of the prompts to fit to; those without a preference have no effect.
    returns: zeros if there is no preference at all.
    """
    known = examples.take(learn)
    if not len(reward_matrix.preferences(known.rewards)[0]):
        return np.zeros(examples.rewards.shape)
    with one_thread():
        return kind.fit(prompts.take(learn), known).scores(prompts)


def all_scores(prompts: Prompts, examples: Examples, learn: Indices) -> dict[str, Matrix]:
    """`scores` of each kind that reads something of the prompts; the static ranking reads nothing.

    Kinds that are made of others share them.
    """
    kinds = [kind for kind in ROUTERS.values() if kind.reads and kind.can_read(prompts)]
    known = examples.take(learn)
    if not len(reward_matrix.preferences(known.rewards)[0]):
        return {kind.name: np.zeros(examples.rewards.shape) for kind in kinds}
    bench = Bench(prompts.take(learn), known)
    with one_thread():
        return {kind.name: bench.fitted(kind)[0].scores(prompts) for kind in kinds}


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a learning curve: means over repeated draws of `n_calibration` prompts, and the standard deviation."""

    n_calibration: int
    reward: float
    deviation: float
    #: Reward of the best single teacher, chosen on the same prompts.
    static: float


def curve(
    fit_to: Callable[[Indices], Matrix],
    rewards: Matrix,
    is_holdout: NDArray[np.bool_],
    sizes: Sequence[int],
    *,
    preferences: str,
    seed: int,
) -> list[Point]:
    """Learning curve: hold-out reward of a router by the number of calibration prompts.

    fit_to:   the (P, K) `scores` of a router fitted to the prompts at some indices.
    rewards:  (P, K), NaN where missing.
    sizes:    each at most the number of calibration prompts.
    """
    known = ~np.isnan(rewards).all(axis=1)
    calibration, holdout = np.flatnonzero(~is_holdout & known), np.flatnonzero(is_holdout & known)
    points = []
    for size in sizes:
        routed: list[Any] = []
        static: list[Any] = []
        repeats = REPEATS if size < len(calibration) else 1
        for repeat in range(repeats):
            drawn = np.random.default_rng([seed, repeat]).permutation(calibration)[:size]
            fitted = fit_to(drawn)
            measured = routing_metrics.compare(
                fitted[holdout], rewards[holdout], rewards[drawn], preferences=preferences
            )
            routed.append(measured["router"]["routed_reward"])
            static.append(measured["static"]["routed_reward"])
        points.append(Point(size, float(np.mean(routed)), float(np.std(routed)), float(np.mean(static))))
    return points
