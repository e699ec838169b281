"""Study several samples per cell and per prompt in a world with known truth.

A prompt is of one of eight kinds; a teacher answers each prompt correctly with a probability of its own, which depends
on the kind and varies within it. A response is right or wrong by chance, as verdicts of samples are. Nothing is
generated: `python -m studies.samples` takes a minute and puts its tables into samples.md. With `--real`, the demo's
teachers answer some of the demo's prompts instead, which takes about twenty minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import persyn
from demo import models, prompts
from persyn.method import rewards
from persyn.method.rewards import Matrix, Samples
from persyn.router import refit
from persyn.router.kinds.base import Examples, Prompts
from persyn.router.kinds.registry import ROUTERS
from studies.common import put, table, tables

PAGE = Path(__file__).with_suffix(".md")
KINDS, TEACHERS = 8, 4
#: Noise of a learnability, in nats per token, and weight of learnability.
NOISE, ALPHA = 0.1, 0.2
HOLDOUT = 2_000
SEEDS = range(5)
#: Of the demo's teachers: prompts of each group, samples per cell, and their temperature.
PER_GROUP, SAMPLES, TEMPERATURE = 4, 8, 0.7
REAL = "### Real teachers: a cell\n"


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


def real_verdicts(home: Path) -> tuple[list[str], Samples]:
    """The names of the demo's teachers, and the verdicts of their samples (P, T, SAMPLES), generated on first use.

    A sample that failed is NaN.
    """
    home.mkdir(parents=True, exist_ok=True)
    with persyn.open(home / "persyn.db", home=home) as store:
        run = store.start(_real_run(home)).work()
        scores = [row for row in run.scores().to_pylist() if row["measure"] == "quality"]
    teachers = sorted({row["teacher"] for row in scores})
    prompt_ids = sorted({row["prompt_id"] for row in scores})
    found = np.full((len(prompt_ids), len(teachers), SAMPLES), np.nan)
    for row in scores:
        found[prompt_ids.index(row["prompt_id"]), teachers.index(row["teacher"]), row["sample"]] = row["value"]
    return teachers, found


def _real_run(home: Path) -> dict[str, Any]:
    """The demo's run, with several samples and only as many prompts as calibration needs; nothing is learned."""
    rows = [row for row in prompts.make() if int(row["id"].rpartition("-")[2]) < PER_GROUP]
    (home / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = {folder.name: str(folder.resolve()) for folder in (models.smollm2(), models.gemma())}
    config = tomllib.loads(prompts.RUN_FILE.read_text())
    config["run"] |= {"name": f"samples-{len(rows)}-{SAMPLES}", "calibration": len(rows), "samples": SAMPLES}
    config["prompts"] = {"file": str((home / "prompts.jsonl").resolve())}
    config["student"] = {"name": "none", "model": "none", "engine": "fake"}
    config["strategy"] = {"kind": "static"}
    del config["router"]
    for teacher in config["teachers"]:
        teacher["model"] = folders[Path(teacher["model"]).name]
        teacher["sampling"]["temperature"] = TEMPERATURE
        teacher["options"] = {"batch_size": 64}
    return config


def groups(quality: Samples, n: int) -> Samples:
    """(P, T, SAMPLES / n, n): the samples of each cell in groups of n."""
    return quality.reshape(*quality.shape[:2], -1, n)


def real_cells(quality: Samples, sizes: Sequence[int]) -> str:
    """How far means of n samples of the same cell are from each other, and what their standard error says."""
    rows = []
    for n in sizes:
        each = groups(quality, n).reshape(len(quality), -1, n)
        means = rewards.sample_means(each).reshape(*quality.shape[:2], -1)
        spread = np.sqrt(np.nanmean(np.nanvar(means, axis=2, ddof=1))) if means.shape[2] > 1 else None
        said = np.sqrt((rewards.sample_errors(each) ** 2).mean()) if n > 1 else None
        rows.append([str(n), *("unknown" if found is None else f"{found:.3f}" for found in (spread, said))])
    return table(["samples", "standard deviation of a cell's mean over other samples", "its standard error"], rows)


def real_best(teachers: Sequence[str], quality: Samples, n: int) -> str:
    """The share of right responses: of one sample, and of the best of n by quality."""
    right = groups(np.nan_to_num(quality), n)  # (P, T, SAMPLES / n, n); a failed sample is not right
    best = right.max(axis=3)
    asked = np.where(best > 0, right.argmax(axis=3) + 1, n)
    rows = []
    for column, name in enumerate([*teachers, "all"]):
        chosen = slice(None) if name == "all" else slice(column, column + 1)
        one = right[:, chosen].mean()
        shares = [one, best[:, chosen].mean(), 1 - (1 - one) ** n]
        rows.append([name, *(f"{share:.1%}" for share in shares), f"{asked[:, chosen].mean():.2f}"])
    head = ["teacher", "one sample", f"best of {n}", "if all prompts were as difficult", "asked until one is right"]
    return table(head, rows)


def real(home: Path) -> str:
    """The tables of the demo's teachers."""
    teachers, quality = real_verdicts(home)
    missing = f"{np.isnan(quality).sum()} of {quality.size:,} samples failed.\n\n"
    best = "### Real teachers: the best of several samples\n\n" + real_best(teachers, quality, 4)
    return f"{REAL}\n{missing}{real_cells(quality, (1, 2, 4))}{best}"


def constructed() -> str:
    """The tables of the world with known truth."""
    made = "### A cell\n\n" + cells((1, 2, 4, 8, 16))
    made += "### A router\n\n" + routers((100, 400), (1, 4))
    return made + "### Rejection sampling\n\n" + kept((1, 2, 4, 8))


def main() -> None:
    """Run one part of the study and update its tables in the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="have the demo's teachers answer")
    parser.add_argument("--home", type=Path, default=Path("build/studies/samples"))
    options = parser.parse_args()
    there, heading, of_real = tables(PAGE).partition(REAL)
    parts = (there, real(options.home)) if options.real else (constructed(), heading + of_real)
    put(PAGE, "".join(parts))
    print("".join(parts))


if __name__ == "__main__":
    main()
