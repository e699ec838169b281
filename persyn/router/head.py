"""Fit the router's head on features of a frozen backbone: convex, and shrunk towards the static ranking.

With few prompts a head of K times H weights could learn anything. So the K biases, which are the
static ranking in Bradley-Terry form, are free, and the weights are penalised; how strongly is
decided by cross-validation, and one of the choices is not to read the prompt at all. What is no
better than chance would make it is not taken for an improvement (the one-standard-error rule).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from persyn.llm.protocols import Tick
from persyn.rewards import Matrix
from persyn.router.model import pair_loss, preference_weights, prompt_losses

#: Strengths of the penalty on the weights, strong to weak; infinity is the static ranking alone.
PENALTIES = (math.inf, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
FOLDS = 5

#: Keeps the biases finite where one teacher always wins; far too weak to matter elsewhere.
_BIAS_PENALTY = 1e-3

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
    weights = preference_weights(torch.from_numpy(rewards), preferences)  # (P, K, K)

    penalty = _choose_penalty(standard, weights, seed, tick)
    weight, bias = _path(standard, weights, penalty, tick)[-1]
    weight = weight / scale
    return Head(weight, bias - weight @ mean, penalty)


def _choose_penalty(features: Tensor, weights: Tensor, seed: int, tick: Tick) -> float:
    """The strongest penalty whose loss, on prompts left out of the fit, is the smallest within its standard error."""
    fold = torch.from_numpy(np.random.default_rng(seed).permutation(len(features)) % FOLDS)
    losses = torch.zeros(len(features), len(PENALTIES), dtype=torch.float64)
    for k in range(min(FOLDS, len(features))):
        out = fold == k
        path = _path(features[~out], weights[~out], PENALTIES[-1], tick)
        for i, (weight, bias) in enumerate(path):
            losses[out, i] = prompt_losses(features[out] @ weight.T + bias, weights[out])
    excess = losses - losses[:, losses.sum(dim=0).argmin(), None]
    return PENALTIES[int(is_within_error(excess).int().argmax())]


def is_within_error(excess: Tensor) -> Tensor:
    """Whether chance alone could make such a difference: the sum is within its standard error, or below 0.

    excess: (P,) or (P, N), by how much each of P prompts has a higher loss under one choice than under another.
    returns: a boolean for each of the N.
    """
    # What is no number is no evidence either.
    return ~(excess.sum(dim=0) > excess.std(dim=0, correction=0) * math.sqrt(len(excess)))


def _path(features: Tensor, weights: Tensor, last: float, tick: Tick) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases for each penalty in turn down to `last`, every fit starting where the stronger one ended."""
    weight = torch.zeros(weights.shape[1], features.shape[1], dtype=torch.float64)
    bias = torch.zeros(weights.shape[1], dtype=torch.float64)
    path = []
    for penalty in PENALTIES[: PENALTIES.index(last) + 1]:
        weight, bias = _minimise(features, weights, penalty, weight, bias)
        path.append((weight, bias))
        tick()
    return path


def _minimise(features: Tensor, weights: Tensor, penalty: float, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias = weight.clone(), bias.clone().requires_grad_()
    reads_prompt = math.isfinite(penalty)
    parameters = [weight.requires_grad_(), bias] if reads_prompt else [bias]
    optimiser = torch.optim.LBFGS(
        parameters, max_iter=100, tolerance_grad=1e-7, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimiser.zero_grad()
        loss = pair_loss(features @ weight.T + bias, weights) + _BIAS_PENALTY / 2 * bias.square().mean()
        if reads_prompt:
            loss = loss + penalty / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
