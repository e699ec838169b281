"""Train a router on a calibration grid: its head, low-rank adapters, or all weights.

Every training starts from the head fitted to the frozen backbone, so that fine-tuning begins with a
working router and changes the backbone no more than necessary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from persyn.llm.protocols import Tick
from persyn.method.rewards import Matrix, preference_weights
from persyn.router import head
from persyn.router.model import RouterModel

TUNES = ("full", "lora", "head")

#: Validation prompts for early stopping: a share of the calibration prompts; at least this many, up to a larger
#: share.
VALIDATION, VALIDATION_PROMPTS, VALIDATION_AT_MOST = 0.1, 25, 0.2


@dataclass(frozen=True, slots=True)
class RouterExamples:
    """P prompts as token ids, their (P, K) rewards, NaN where missing, and the standard errors of these if known."""

    prompts: Sequence[Sequence[int]]
    rewards: Matrix
    errors: Matrix | None = None

    def take(self, indices: Sequence[int]) -> RouterExamples:
        """The examples at these indices."""
        rows = list(indices)
        errors = None if self.errors is None else self.errors[rows]
        return RouterExamples([self.prompts[i] for i in rows], self.rewards[rows], errors)

    def weights(self, preferences: str) -> Matrix:
        """(P, K, K) weights of the preferences, see `preference_weights`."""
        return preference_weights(self.rewards, preferences, self.errors)


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """How to train; the last four fields apply to fine-tuning only."""

    tune: str
    #: How preferences are weighted: "weighted" or "equal".
    preferences: str
    seed: int
    #: Maximum number of tokens, padding included, in a forward pass without gradients.
    batch_tokens: int
    epochs: int
    learning_rate: float
    #: Prompts per step.
    batch_size: int
    lora_rank: int


def train(
    router: RouterModel, examples: RouterExamples, features: Tensor, plan: TrainingPlan, tick: Tick
) -> dict[str, Any]:
    """Train `router` in place on P examples that have a preference each; `tick` is called throughout.

    features: (P, H) from the router's backbone before training.
    returns:  notes on the training. `head_penalty` is None if cross-validation found the static ranking
              better than any head that reads the prompt.
    """
    tunes = plan.tune != "head"
    everything = list(range(len(examples.prompts)))
    learn, validate = split(len(everything), plan.seed) if tunes else (everything, everything)
    taken = examples.take(learn)
    fitted = head.fit(
        features[learn],
        taken.rewards,
        errors=taken.errors,
        preferences=plan.preferences,
        seed=plan.seed,
        tick=tick,
    )
    with torch.no_grad():
        router.head.weight.copy_(fitted.weight)
        router.head.bias.copy_(fitted.bias)
    notes: dict[str, Any] = {"head_penalty": fitted.penalty if math.isfinite(fitted.penalty) else None}
    if tunes:
        from persyn.router import fine_tune  # imports transformers

        notes |= fine_tune.train(router, taken, examples.take(validate), plan, tick)
    router.requires_grad_(False).eval()
    return notes


def split(n: int, seed: int) -> tuple[list[int], list[int]]:
    """Split n examples at random into indices to learn from and indices to validate on."""
    order = np.random.default_rng(seed).permutation(n).tolist()
    n_validation = max(1, round(VALIDATION * n), min(VALIDATION_PROMPTS, round(VALIDATION_AT_MOST * n)))
    # A single example serves for both.
    return order[n_validation:] or order, order[:n_validation]
