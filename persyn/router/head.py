"""Fit the router's head on features of a frozen backbone: convex, and shrunk towards the static ranking.

With few prompts a head of K times H weights could learn anything. So every head begins with the static
ranking, and what departs from it is penalised; how strongly is decided by cross-validation, and one of
the choices is not to depart at all. What is no better than chance would make it is not taken for an
improvement (the one-standard-error rule).
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
from persyn.method.rewards import Matrix, static_ranking
from persyn.router.model import pair_loss, preference_weights, prompt_losses

#: Strengths of the penalty on what departs from the static ranking, strong to weak; infinity is that ranking alone.
PENALTIES = (math.inf, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
FOLDS = 5

#: Keeps the strengths finite where one teacher always wins; far too weak to matter elsewhere.
_STRENGTH_PENALTY = 1e-3
#: So far apart are the best and the worst at least: a ranking is kept where the preferences contradict it.
_LEAST_SPREAD = 1e-3

#: Features that keep a thread busy.
_NUMBERS_A_THREAD = 1_000_000

#: A feature that varies by less than this part of itself is constant: float32 tells no more.
_RESOLUTION = 1e-6


@dataclass(frozen=True, slots=True)
class Head:
    """A linear head that takes raw features, and the penalty it was fitted with."""

    #: (K, H) float64.
    weight: Tensor
    #: (K,) float64.
    bias: Tensor
    penalty: float


def fit(features: Tensor, rewards: Matrix, *, preferences: str, seed: int, tick: Tick) -> Head:
    """Fit a head to P prompts; the folds that choose the penalty are drawn by `seed`.

    features:    (P, H), as the backbone gives them; standardised here, which the returned head undoes.
    rewards:     (P, K), NaN where missing.
    preferences: how they count, see `preference_weights`.
    """
    with _threads(features.numel()):
        return _fit(features, rewards, preferences, seed, tick)


@contextmanager
def _threads(numbers: int) -> Iterator[None]:
    """No more threads than there is work for: on small matrices they wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, numbers // _NUMBERS_A_THREAD)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fit(features: Tensor, rewards: Matrix, preferences: str, seed: int, tick: Tick) -> Head:
    mean, deviation = features.double().mean(dim=0), features.double().std(dim=0, correction=0)
    # The root of H makes a penalty mean the same whatever the backbone's width.
    varies = deviation > _RESOLUTION * mean.abs()
    scale = torch.where(varies, deviation, 1.0) * math.sqrt(features.shape[1])
    standard = (features.double() - mean) / scale
    grid = _Grid(standard, rewards, preferences)

    penalty = _choose_penalty(grid, seed, tick)
    weight = _path(grid, penalty, tick)[-1] / scale
    return Head(weight, grid.strengths - weight @ mean, penalty)


class _Grid:
    """What a head is fitted to: (P, H) standard features, (P, K) rewards, (P, K, K) weights of preferences."""

    def __init__(self, features: Tensor, rewards: Matrix, preferences: str) -> None:
        self.features = features
        self.weights = preference_weights(torch.from_numpy(rewards), preferences)
        self._rewards = rewards
        self._preferences = preferences

    def take(self, prompts: Tensor) -> _Grid:
        """Those prompts, given as (P,) booleans."""
        return _Grid(self.features[prompts], self._rewards[prompts.numpy()], self._preferences)

    @cached_property
    def strengths(self) -> Tensor:
        """(K,) the static ranking in Bradley-Terry form: as far apart as makes the preferences likeliest."""
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
        """(K,) who is better whatever the prompt: by mean reward, or by wins where all preferences are equal."""
        if self._preferences == "equal":
            wins = self.weights.sum(dim=0)
            return (wins - wins.T).sum(dim=1)
        ranking = static_ranking(self._rewards)
        # In a fold a teacher may have no reward at all: it comes last.
        return torch.from_numpy(np.nan_to_num(ranking, nan=np.fmin.reduce(ranking, initial=0.0)))


def _choose_penalty(grid: _Grid, seed: int, tick: Tick) -> float:
    """The strongest penalty whose loss, on prompts left out of the fit, is the smallest within its standard error."""
    n = len(grid.features)
    fold = torch.from_numpy(np.random.default_rng(seed).permutation(n) % FOLDS)
    losses = torch.zeros(n, len(PENALTIES), dtype=torch.float64)
    for k in range(min(FOLDS, n)):
        out = fold == k
        learn, asked = grid.take(~out), grid.take(out)
        for i, weight in enumerate(_path(learn, PENALTIES[-1], tick)):
            losses[out, i] = prompt_losses(asked.features @ weight.T + learn.strengths, asked.weights)
    excess = losses - losses[:, losses.sum(dim=0).argmin(), None]
    return PENALTIES[int(is_within_error(excess).int().argmax())]


def is_within_error(excess: Tensor, errors: float = 1.0) -> Tensor:
    """Whether chance alone could make such a difference: the sum is within so many standard errors, or below 0.

    excess: (P,) or (P, N), by how much each of P prompts has a higher loss under one choice than under another.
    returns: a boolean for each of the N.
    """
    # What is no number is no evidence either.
    return ~(excess.sum(dim=0) > errors * excess.std(dim=0, correction=0) * math.sqrt(len(excess)))


def _path(grid: _Grid, last: float, tick: Tick) -> list[Tensor]:
    """(K, H) weights for each penalty in turn down to `last`, every fit starting where the stronger one ended."""
    strengths = grid.strengths
    weight = torch.zeros(len(strengths), grid.features.shape[1], dtype=torch.float64)
    path = []
    for penalty in PENALTIES[: PENALTIES.index(last) + 1]:
        if math.isfinite(penalty):
            weight = weight.clone().requires_grad_()

            def loss(weight: Tensor = weight, penalty: float = penalty) -> Tensor:
                fit = pair_loss(grid.features @ weight.T + strengths, grid.weights)
                return fit + penalty / 2 * weight.square().sum()

            _minimise(loss, [weight])
            weight = weight.detach()
        path.append(weight)
        tick()
    return path


def _minimise(loss: Callable[[], Tensor], parameters: list[Tensor]) -> None:
    """Change the parameters in place until a convex loss of them is the smallest."""
    optimiser = torch.optim.LBFGS(
        parameters, max_iter=100, tolerance_grad=1e-7, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimiser.zero_grad()
        found = loss()
        found.backward()  # type: ignore[no-untyped-call]
        return found.item()

    optimiser.step(closure)  # type: ignore[no-untyped-call]
