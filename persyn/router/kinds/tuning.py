"""Choose a setting by the reward of the teachers that it would take."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from persyn.method.rewards import Matrix

#: Scores this close, in standard deviations of the rewards, share a prompt: it makes the reward smooth in the scores.
_TEMPERATURE = 0.04


def best(candidates: Iterable[Matrix], rewards: Matrix) -> int:
    """The place of the candidate whose choices have the highest mean reward; the first of equal ones.

    The squared error of the scores would be another criterion, but it is dominated by teachers that are never chosen.

    Without any prompt, the first is taken.

    candidates: (P, K) out-of-sample scores, in units of the reward. rewards: (P, K), NaN where missing.
    """
    if not len(rewards):
        return 0
    temperature = _TEMPERATURE * float(np.nanstd(rewards)) or 1.0
    return int(np.argmax([_soft_reward(scores / temperature, rewards) for scores in candidates]))


def _soft_reward(logits: Matrix, rewards: Matrix) -> float:
    """Mean reward of choosing a teacher with the probabilities of a softmax over the present ones."""
    logits = np.where(np.isnan(rewards), -np.inf, logits)
    chance = np.exp(logits - logits.max(axis=1, keepdims=True))
    chance /= chance.sum(axis=1, keepdims=True)
    return round(float((chance * np.nan_to_num(rewards)).sum(axis=1).mean()), 12)
