"""Fit the router's head on features of a frozen backbone: convex, and shrunk towards the static ranking.

With few prompts, a head of K x H weights overfits. Each fit therefore starts from the static ranking and
penalises deviations from it. Cross-validation chooses the penalty, and no deviation at all is one of the
candidates. By the one-standard-error rule, an improvement within chance is not accepted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from persyn.llm.protocols import Tick
from persyn.method.rewards import Matrix, preference_weights, static_ranking
from persyn.router.model import pair_loss, prompt_losses

#: Penalties on deviations from the static ranking, strong to weak; infinity is the static ranking itself.
PENALTIES = (math.inf, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
FOLDS = 5

#: Keeps the strengths finite when one teacher always wins; too weak to matter otherwise.
_STRENGTH_PENALTY = 1e-3
#: Minimum difference between the best and the worst strength, which keeps a ranking that the preferences contradict.
_LEAST_SPREAD = 1e-3

#: Feature values per thread; with fewer, a thread is not kept busy.
_NUMBERS_A_THREAD = 1_000_000

#: Relative spread below which a feature counts as constant, as float32 resolves no less.
_RESOLUTION = 1e-6


@dataclass(frozen=True, slots=True)
class Head:
    """A linear head for raw features, and the penalty it was fitted with."""

    #: (K, H) float64.
    weight: Tensor
    #: (K,) float64.
    bias: Tensor
    penalty: float


def fit(
    features: Tensor, rewards: Matrix, *, errors: Matrix | None = None, preferences: str, seed: int, tick: Tick
) -> Head:
    """Fit a head to P prompts; `seed` draws the folds that choose the penalty.

    features:    (P, H) from the backbone; standardised internally, and the returned head takes raw features.
    rewards:     (P, K), NaN where missing.
    errors:      (P, K) their standard errors; None if unknown.
    preferences: how they are weighted, see `preference_weights`.
    """
    with threads(features.numel()):
        return _fit(features, rewards, errors, preferences, seed, tick)


@contextmanager
def threads(numbers: int) -> Iterator[None]:
    """Limit threads to the amount of work: on small matrices they mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, numbers // _NUMBERS_A_THREAD)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fit(features: Tensor, rewards: Matrix, errors: Matrix | None, preferences: str, seed: int, tick: Tick) -> Head:
    mean, deviation = features.double().mean(dim=0), features.double().std(dim=0, correction=0)
    # The square root of H makes a penalty independent of the backbone's width.
    varies = deviation > _RESOLUTION * mean.abs()
    scale = torch.where(varies, deviation, 1.0) * math.sqrt(features.shape[1])
    standard = (features.double() - mean) / scale
    weights = torch.from_numpy(preference_weights(rewards, preferences, errors))
    grid = Grid(standard, rewards, weights, preferences)

    penalty = choose_penalty(grid, seed, tick)
    weight = path(grid, penalty, tick)[-1] / scale
    return Head(weight, grid.strengths - weight @ mean, penalty)


class Grid:
    """The data of a fit: (P, H) standardised features, (P, K) rewards, (P, K, K) preference weights."""

    def __init__(self, features: Tensor, rewards: Matrix, weights: Tensor, preferences: str) -> None:
        self.features = features
        self.weights = weights
        self._rewards = rewards
        self._preferences = preferences

    def take(self, prompts: Tensor) -> Grid:
        """The subset of prompts selected by (P,) booleans."""
        rewards = self._rewards[prompts.numpy()]
        return Grid(self.features[prompts], rewards, self.weights[prompts], self._preferences)

    @cached_property
    def strengths(self) -> Tensor:
        """(K,) the static ranking as Bradley-Terry strengths, scaled to maximise the likelihood of the preferences."""
        ranking = self._ranking()
        ranking = ranking - ranking.mean()
        spread = ranking.max() - ranking.min()
        if not spread > 0:
            return torch.zeros_like(ranking)
        ranking = ranking / spread
        factor = torch.zeros((), dtype=torch.float64, requires_grad=True)

        def loss() -> Tensor:
            strengths = factor * ranking
            return pair_loss(strengths.expand(len(self.weights), -1), self.weights) + (
                _STRENGTH_PENALTY / 2 * strengths.square().mean()
            )

        _minimise(loss, [factor])
        return factor.detach().clamp(min=_LEAST_SPREAD) * ranking

    def _ranking(self) -> Tensor:
        """(K,) teachers ranked by mean reward, or by wins when preferences are weighted equally."""
        if self._preferences == "equal":
            wins = self.weights.sum(dim=0)
            return (wins - wins.T).sum(dim=1)
        ranking = static_ranking(self._rewards)
        # Within a fold a teacher may have no reward at all; it then ranks last.
        return torch.from_numpy(np.nan_to_num(ranking, nan=np.fmin.reduce(ranking, initial=0.0)))


def choose_penalty(grid: Grid, seed: int, tick: Tick) -> float:
    """Cross-validate: the strongest penalty whose loss is within one standard error of the smallest."""
    n = len(grid.features)
    fold = torch.from_numpy(np.random.default_rng(seed).permutation(n) % FOLDS)
    losses = torch.zeros(n, len(PENALTIES), dtype=torch.float64)
    for k in range(min(FOLDS, n)):
        out = fold == k
        learn, asked = grid.take(~out), grid.take(out)
        for i, weight in enumerate(path(learn, PENALTIES[-1], tick)):
            losses[out, i] = prompt_losses(asked.features @ weight.T + learn.strengths, asked.weights)
    excess = losses - losses[:, losses.sum(dim=0).argmin(), None]
    return PENALTIES[int(is_within_error(excess).int().argmax())]


def is_within_error(excess: Tensor, errors: float = 1.0) -> Tensor:
    """Whether chance can explain a difference: the sum is within `errors` standard errors, or below 0.

    excess:  (P,) or (P, N), how much higher each prompt's loss is under one choice than under another.
    returns: a boolean for each of the N.
    """
    # NaN is no evidence either.
    return ~(excess.sum(dim=0) > errors * excess.std(dim=0, correction=0) * math.sqrt(len(excess)))


def path(grid: Grid, last: float, tick: Tick) -> list[Tensor]:
    """(K, H) weights for each penalty down to `last`; every fit starts from the result of the stronger penalty."""
    strengths = grid.strengths
    weight = torch.zeros(len(strengths), grid.features.shape[1], dtype=torch.float64)
    found = []
    for penalty in PENALTIES[: PENALTIES.index(last) + 1]:
        if math.isfinite(penalty):
            weight = weight.clone().requires_grad_()

            def loss(weight: Tensor = weight, penalty: float = penalty) -> Tensor:
                fit = pair_loss(grid.features @ weight.T + strengths, grid.weights)
                return fit + penalty / 2 * weight.square().sum()

            _minimise(loss, [weight])
            weight = weight.detach()
        found.append(weight)
        tick()
    return found


def _minimise(loss: Callable[[], Tensor], parameters: list[Tensor]) -> None:
    """Minimise a convex loss over the parameters, in place."""
    optimiser = torch.optim.LBFGS(
        parameters, max_iter=100, tolerance_grad=1e-7, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimiser.zero_grad()
        found = loss()
        found.backward()  # type: ignore[no-untyped-call]
        return found.item()

    optimiser.step(closure)  # type: ignore[no-untyped-call]
