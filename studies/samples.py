"""Study several samples per cell and per prompt in a world with known truth.

A prompt is of one of eight kinds; a teacher answers each prompt correctly with a probability of its own, which depends
on the kind and varies within it. A response is right or wrong by chance, as verdicts of samples are. Nothing is
generated: `python -m studies.samples` takes a minute and puts its tables into samples.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from persyn.method import rewards
from persyn.method.rewards import Matrix
from persyn.router import refit
from persyn.router.kinds.base import Examples, Prompts
from persyn.router.kinds.registry import ROUTERS
from studies.common import put, table

PAGE = Path(__file__).with_suffix(".md")
KINDS, TEACHERS = 8, 4
#: Noise of a learnability, in nats per token, and weight of learnability.
NOISE, ALPHA = 0.1, 0.2
HOLDOUT = 2_000
SEEDS = range(5)


@dataclass(frozen=True, slots=True)
class World:
    """P prompts: their features (P, H), and the probability that each teacher answers each correctly, (P, T)."""

    features: Matrix
    chances: Matrix


def world(n_prompts: int, seed: int) -> World:
    """Draw a world; the kinds and the teachers are the same for every number of prompts."""
    draw = np.random.default_rng([seed, 0])
    of_kind = draw.normal(0.0, 1.0, (KINDS, TEACHERS))
    draw = np.random.default_rng([seed, 1])
    kinds = draw.integers(KINDS, size=n_prompts)
    logits = of_kind[kinds] + draw.normal(0.0, 0.7, (n_prompts, TEACHERS))
    features = np.eye(KINDS)[kinds] + draw.normal(0.0, 0.2, (n_prompts, KINDS))
    return World(features, 1.0 / (1.0 + np.exp(-logits)))


def verdicts(chances: Matrix, n: int, seed: int) -> NDArray[np.float64]:
    """(P, T, n) verdicts of n samples per cell."""
    draws = np.random.default_rng([seed, 2]).random((*chances.shape, n))
    return (draws < chances[:, :, None]).astype(np.float64)


def routed(found: World, learn: int, n: int, seed: int, *, with_errors: bool) -> float:
    """The share of right answers on the hold-out by the teachers that a router chooses.

    The router is fitted to `learn` prompts with n samples per cell.
    """
    quality = verdicts(found.chances[:learn], n, seed)
    draws = np.random.default_rng([seed, 3]).normal(-1.0, NOISE, quality.shape)
    means = rewards.sample_means(quality), rewards.sample_means(draws)
    errors = rewards.sample_errors(quality), rewards.sample_errors(draws)
    rewarded = np.full(found.chances.shape, np.nan)
    rewarded[:learn] = rewards.combine(*means, alpha=ALPHA, how="minmax")
    unsure = np.zeros(rewarded.shape)
    unsure[:learn] = rewards.combine_errors(*means, *errors, alpha=ALPHA, how="minmax")
    prompts = Prompts({"backbone": found.features})
    examples = Examples(rewarded, unsure if with_errors else None, seed=seed)
    scores = refit.scores(ROUTERS["head"], prompts, examples, np.arange(learn))
    chosen = scores[learn:].argmax(axis=1)
    return float(np.take_along_axis(found.chances[learn:], chosen[:, None], axis=1).mean())


def cells(sizes: Sequence[int]) -> str:
    """How far a cell's mean is from the truth, and what its standard error says."""
    rows = []
    found = world(HOLDOUT, 0)
    for n in sizes:
        quality = verdicts(found.chances, n, 0)
        off = np.sqrt(((rewards.sample_means(quality) - found.chances) ** 2).mean())
        said = np.sqrt((rewards.sample_errors(quality) ** 2).mean())
        rows.append([str(n), f"{off:.3f}", f"{said:.3f}" if n > 1 else "unknown"])
    return table(["samples", "distance of a cell's mean from the truth", "its standard error"], rows)


def routers(learns: Sequence[int], sizes: Sequence[int]) -> str:
    """The quality that a router achieves by the number of prompts and of samples."""
    rows = []
    for learn in learns:
        for n in sizes:
            without, with_errors = (
                [routed(world(learn + HOLDOUT, seed), learn, n, seed, with_errors=with_errors) for seed in SEEDS]
                for with_errors in (False, True)
            )
            best = [world(learn + HOLDOUT, seed).chances[learn:].max(axis=1).mean() for seed in SEEDS]
            shown = [f"{np.mean(each):.3f}" for each in (without, with_errors, best)]
            gain = np.array(with_errors) - np.array(without)
            rows.append([f"{learn:,}", str(n), f"{learn * n:,}", *shown, f"{gain.mean():+.3f} ({gain.std():.3f})"])
    head = [
        "prompts",
        "samples",
        "responses per teacher",
        "errors ignored",
        "with errors",
        "oracle",
        "difference (s.d.)",
    ]
    return table(head, rows)


def kept(most: Sequence[int]) -> str:
    """What rejection sampling keeps: with verdicts, and with a reward model that is right about two of three pairs."""
    found = world(HOLDOUT, 0)
    best = found.chances.mean(axis=0).argmax()
    chances = found.chances[:, [best]]
    rows = []
    for m in most:
        right = verdicts(chances, m, 1)[:, 0]  # (P, m)
        accepted = right.any(axis=1)
        asked = np.where(accepted, right.argmax(axis=1) + 1, m)
        # A logit that is higher for right responses by 0.61 standard deviations of the noise of a pair.
        logits = right + np.random.default_rng(4).normal(0.0, 1.64, right.shape)
        chosen = np.take_along_axis(right, logits.argmax(axis=1)[:, None], axis=1)
        rows.append([str(m), f"{accepted.mean():.1%}", f"{asked.mean():.2f}", f"{chosen.mean():.1%}"])
    head = [
        "samples at most",
        "prompts with a right answer",
        "samples asked for",
        "right, best of all by a weak scorer",
    ]
    return table(head, rows)


def main() -> None:
    """Run the study and update the page."""
    made = "### A cell\n\n" + cells((1, 2, 4, 8, 16))
    made += "### A router\n\n" + routers((100, 400), (1, 4))
    made += "### Rejection sampling\n\n" + kept((1, 2, 4, 8))
    put(PAGE, made)
    print(made)


if __name__ == "__main__":
    main()
