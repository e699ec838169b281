"""A grid on which the best teacher depends on the prompt's topic."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from persyn.llm.protocols import Fit, Message

TOPICS = {
    "sums": "What is {} plus {}?",
    "poems": "Write a poem about {} roses and {} tears.",
    "code": "def f(x): return x[{}] + x[{}]  # fix this",
}
TEACHERS = ["mathematician", "poet", "programmer", "generalist"]
#: One row per topic; the generalist has the best mean but is never the best.
TOPIC_REWARDS = np.array([[1.0, 0.1, 0.3, 0.8], [0.0, 1.0, 0.1, 0.8], [0.3, 0.0, 1.0, 0.8]])


def conversations(n: int) -> list[list[Message]]:
    """Distinct prompts, cycling through the topics."""
    texts = list(TOPICS.values())
    return [[{"role": "user", "content": texts[i % len(texts)].format(i, 7 * i % 50)}] for i in range(n)]


def grid(n: int, *, holdout: int = 0, tune: str = "head", folder: Path) -> Fit:
    """A fit of n prompts, the last ones held out, with slightly noisy rewards."""
    noise = np.random.default_rng(0).normal(0, 0.05, (n, len(TEACHERS)))
    rewards = TOPIC_REWARDS[np.arange(n) % len(TOPICS)] + noise
    return Fit(
        id=1,
        conversations=conversations(n),
        rewards=rewards.tolist(),
        is_holdout=[i >= n - holdout for i in range(n)],
        teachers=TEACHERS,
        tune=tune,
        seed=0,
        folder=str(folder),
    )
