"""Combine the values of several quality scorers into the quality of one response."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: The value from which on a response has passed a gate: that of a right verdict.
PASSED = 1.0
#: The quality of a wrong response, where it says what is right.
WRONG = 0.0


def combine(weights: Sequence[float | None], values: Sequence[float | None]) -> float | None:
    """The quality of a response; None while it depends on a value that is missing.

    weights: one per scorer; None for a gate.
    values:  one per scorer, raw, in the scorer's own unit; None where it gave none.
    returns: without a gate, the weighted sum of the values. With gates, 0 if one was not passed, whatever the others
             are; otherwise 1 if all scorers are gates, else 1 plus the logistic function of the weighted sum, which is
             between 1 and 2.

    For a gate and a reward model, this is the reward of Qwen2.5-Math (arXiv 2409.12122), plus 1, except that wrong
    responses are equal: which of several wrong answers a reward model prefers says little.
    """
    gates = [value for weight, value in zip(weights, values, strict=True) if weight is None]
    if any(value is not None and value < PASSED for value in gates):
        return 0.0
    if any(value is None for value in values):
        return None
    weighted = [weight * (value or 0.0) for weight, value in zip(weights, values, strict=True) if weight is not None]
    total = sum(weighted)
    if not gates or math.isnan(total):
        return total
    return PASSED + _logistic(total) if weighted else PASSED


def _logistic(x: float) -> float:
    """1 / (1 + exp(-x)), without an overflow."""
    return 0.5 * (1.0 + math.tanh(x / 2.0))
