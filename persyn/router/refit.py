"""Refit heads on cached features of the grid, at another alpha or calibration size, in seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from persyn.llm import options, scoring
from persyn.llm.chat import Chat, load_tokenizer
from persyn.llm.identity import identify
from persyn.llm.protocols import Fit, ModelSpec
from persyn.method import rewards as reward_matrix
from persyn.method import routing_metrics
from persyn.method.rewards import Indices, Matrix
from persyn.router import features, fit, head, model

#: Number of random draws per point of the learning curve.
REPEATS = 5


def frozen(home: Path, spec: ModelSpec, request: Fit) -> Matrix:
    """(P, H) features of a fit's conversations; missing ones are computed and cached in `home`.

    spec: of a `router_fit` engine.
    Raises `EngineError` when the backbone cannot be loaded, `UsageError` when it has changed.
    """
    chosen = options.decode(spec, options.RouterFitOptions)
    spec = fit.backbone(spec)
    reader = fit.reader(Chat(load_tokenizer(spec), add_bos=chosen.add_bos), chosen, scoring.configuration(spec))
    dtype = fit.dtype("head", spec, chosen)
    reads = model.reads_of("head")
    made = features.cached(
        features.folder(home, spec.model, identify(spec.model, spec.revision).revision, f"torch.{dtype}", reads),
        [reader.ids(messages) for messages in request.conversations],
        lambda new: model.all_features(
            model.load(spec, dtype, 1, reads).requires_grad_(False), new, scoring.batch_tokens(spec, chosen), _quietly
        ),
    )
    return np.asarray(made.double().numpy())


def scores(
    frozen: Matrix, rewards: Matrix, learn: Indices, *, errors: Matrix | None = None, preferences: str, seed: int
) -> Matrix:
    """(P, K) scores of a head fitted to some of the prompts.

    frozen:  (P, H). rewards: (P, K), NaN where missing.
    learn:   indices of the prompts to fit to; those without a preference have no effect.
    errors:  (P, K) standard errors of the rewards; None if unknown.
    preferences: how they are weighted, "weighted" or "equal".
    returns: scores of all P prompts; zeros if there is no preference at all.
    """
    pairs, _, _ = reward_matrix.preferences(rewards[learn])
    if not len(pairs):
        return np.zeros(rewards.shape)
    informative = learn[np.unique(pairs)]
    fitted = head.fit(
        torch.from_numpy(frozen[informative]),
        rewards[informative],
        errors=None if errors is None else errors[informative],
        preferences=preferences,
        seed=seed,
        tick=_quietly,
    )
    return np.asarray(frozen @ fitted.weight.numpy().T + fitted.bias.numpy())


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
    """Learning curve: hold-out reward of a head by the number of calibration prompts.

    fit_to:   the (P, K) `scores` of a head fitted to the prompts at some indices.
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


def _quietly() -> None:
    """A tick that does nothing: no watchdog is running here."""
