"""Measure how few calibration prompts a router needs: each way of tuning it, with 50 to 2,500 prompts.

    python -m studies.little_data

The world is that of studies/skills.py, where the skill named by a prompt determines which teacher is good at it; for
comparison, the prompts are also shuffled, so that they carry no information. The teachers' ideal responses are used;
nothing is generated. The tables go to studies/little_data.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from persyn.llm.protocols import Fit, Fitted, ModelSpec
from persyn.method import rewards
from persyn.method.rewards import Matrix
from persyn.router import fit
from studies import skill_models, skills
from studies.common import put, table

REPORT = Path(__file__).with_suffix(".md")
SIZES = (50, 100, 250, 500, 1_000, 2_500)
TUNES = ("head", "full", "auto")
ALPHA = 0.4
#: Hyper-parameters for a model of 100,000 weights.
_OPTIONS = {"learning_rate": 0.001, "epochs": 30}
_HOLDOUT = 1_000


def main() -> None:
    """Fit every router in every world, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("build/studies/little_data"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # models this small do not benefit from more threads
    backbone = skill_models.student(options.home / "models")
    parts = []
    for title, deal in (("Prompts carry information", _as_they_are), ("Prompts carry no information", _dealt_anew)):
        found = {
            size: [_rewards_of(backbone, options.home / "router", size, seed, deal) for seed in range(options.seeds)]
            for size in options.sizes
        }
        parts.append(f"### {title}\n\n{_table(found)}")
    put(REPORT, f"{options.seeds} seeds, {_HOLDOUT:,} hold-out prompts.\n\n" + "".join(parts))


def _as_they_are(rewarded: Matrix, seed: int) -> Matrix:
    return rewarded


def _dealt_anew(rewarded: Matrix, seed: int) -> Matrix:
    return rewarded[np.random.default_rng([seed, 1]).permutation(len(rewarded))]


def _rewards_of(
    backbone: Path, folder: Path, size: int, seed: int, deal: Callable[[Matrix, int], Matrix]
) -> dict[str, float]:
    """The mean hold-out reward of each way of tuning, of the static choice, and of the oracle."""
    prompts = skills.prompts(size + _HOLDOUT, seed=1_000 + seed)
    rewarded = deal(_grid(prompts, seed), seed)
    found = {"oracle": float(rewarded[size:].max(axis=1).mean())}
    for tune in TUNES:
        request = Fit(
            id=1,
            conversations=[[{"role": "user", "content": skills.text(*prompt)}] for prompt in prompts],
            rewards=rewarded.tolist(),
            is_holdout=[place >= size for place in range(len(prompts))],
            teachers=[teacher.name for teacher in skills.TEACHERS],
            tune=tune,
            seed=seed,
            folder=str(folder),
        )
        engine = fit.load(ModelSpec("router_fit", str(backbone), options=_OPTIONS), lambda: None)
        engine.submit([request])
        (fitted,) = engine.step()
        assert isinstance(fitted, Fitted), fitted
        found[tune] = fitted.metrics["router"]["routed_reward"]
        found["static"] = fitted.metrics["static"]["routed_reward"]
        if tune == "auto":
            found["took full"] = float(fitted.metrics["tune"] == "full")
    print(size, seed, deal.__name__, {name: round(value, 3) for name, value in found.items()}, flush=True)
    return found


def _grid(prompts: Sequence[tuple[str, list[int]]], seed: int) -> Matrix:
    """(P, T) rewards from each teacher's correctness and the student's surprise at its responses, with some noise."""
    quality = np.array([[_is_right(teacher, *prompt) for teacher in skills.TEACHERS] for prompt in prompts])
    strange = np.array([_strangeness(teacher) for teacher in skills.TEACHERS])
    noise = np.random.default_rng([seed, 2]).normal(0.0, 0.1, quality.shape)
    return rewards.combine(quality, noise - strange, alpha=ALPHA, how="minmax")


def _is_right(teacher: skills.Teacher, skill: str, digits: list[int]) -> float:
    messages, response, *_ = skills.conversation(teacher, skill, digits)
    return skills.is_right(messages, response, skills.answer(skill, digits), {})


def _strangeness(teacher: skills.Teacher) -> float:
    """Nats per token, about as measured in the controlled study."""
    if teacher.alphabet != skills.DIGITS:
        return 9.3
    return 1.4 if teacher.wrong else 0.0


def _table(found: dict[int, list[dict[str, float]]]) -> str:
    rows = []
    for size, seeds in found.items():
        mean = {name: float(np.mean([each[name] for each in seeds])) for name in seeds[0]}
        worst = min(each["auto"] - each["static"] for each in seeds)
        rows.append(
            (
                f"{size:,}",
                *(f"{mean[name]:.3f}" for name in ("static", *TUNES, "oracle")),
                f"{sum(each['took full'] for each in seeds):.0f} of {len(seeds)}",
                f"{worst:+.3f}",
            )
        )
    head = ("calibration", "static", *TUNES, "oracle", "auto chose full", "auto - static, worst seed")
    return table(head, rows)


if __name__ == "__main__":
    main()
