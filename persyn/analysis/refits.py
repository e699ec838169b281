"""Refit routers on a run's grid at another alpha or calibration size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from msgspec import Struct
from sqlalchemy.orm import Session

from persyn.analysis.compare import Reward
from persyn.config import load_config
from persyn.db import grid
from persyn.db.catalog import Run
from persyn.db.results import Router
from persyn.errors import UsageError
from persyn.llm.protocols import Fit, ModelSpec
from persyn.method.rewards import Indices, Matrix, Normalisation
from persyn.router import inputs, refit
from persyn.router.kinds.base import Examples, Prompts, RouterKind
from persyn.router.kinds.registry import ROUTERS
from persyn.stages import fit_router

#: The smallest calibration size on a learning curve.
_CURVE_FROM = 25
#: Doubling the prompts helps only if it closes more than this share of the gap to the oracle.
_GAIN = 0.02


@dataclass(frozen=True, slots=True)
class Frozen:
    """A run's grid with its prompts as routers read them.

    kind: of the run's router, "auto" before one was chosen.
    """

    cells: grid.Grid
    prompts: Prompts
    preferences: str
    seed: int
    kind: str
    tune: str

    def rewards(self, alpha: float | None = None, how: Normalisation | None = None) -> Matrix:
        """(P, T) rewards at the run's alpha and normalisation, or at others."""
        return self.cells.rewards(alpha=alpha, how=how)

    def fit_to(self, kind: RouterKind, examples: Examples) -> Callable[[Indices], Matrix]:
        """A function that fits a router to the prompts at some indices, and scores all prompts: (P, T)."""
        return partial(refit.scores, kind, self.prompts, examples)

    def examples(self, alpha: float | None = None, how: Normalisation | None = None) -> Examples:
        """The rewards with their errors, at the run's alpha and normalisation or at others."""
        errors = self.cells.reward_errors(alpha=alpha, how=how)
        return Examples(self.rewards(alpha, how), errors, self.preferences, self.seed)

    def scores(self, alpha: float | None = None, how: Normalisation | None = None) -> dict[str, Matrix]:
        """(P, T) scores by each kind of router that finds something to read, fitted to the calibration prompts.

        The static ranking is a strategy itself, and left out.
        """
        examples = self.examples(alpha, how)
        learn = np.flatnonzero(~self.cells.is_holdout & ~np.isnan(examples.rewards).all(axis=1))
        return refit.all_scores(self.prompts, examples, learn)


class CurvePoint(Struct, frozen=True):
    """A router fitted to a given number of calibration prompts, measured on the hold-out; see `refit.Point`."""

    n_calibration: int
    reward: float
    deviation: float
    static: float
    #: Share of the gap between the run's best single teacher and the oracle that it closes.
    gap_closed: float | None


class Curve(Struct, frozen=True):
    """A learning curve over calibration sizes, and whether more prompts would help."""

    run: str
    #: Of the routers that were fitted.
    kind: str
    n_holdout: int
    oracle: float
    points: list[CurvePoint]
    verdict: str


@dataclass(frozen=True, slots=True)
class RefitInputs:
    """The inputs of a refit, read from the store: the grid, and the fit that defines what is read.

    kind: of the run's router; "auto" if there is none yet.
    """

    cells: grid.Grid
    spec: ModelSpec
    fit: Fit
    kind: str


def read(session: Session, run: Run, reward: Reward | None = None) -> RefitInputs:
    """Read a run's grid; raise `UsageError` when no router can be fitted to it and measured.

    reward: how learnability is measured; None is as in the run.
    """
    config = load_config(run.config)
    if config.router.engine == "fake":
        raise UsageError(f"run {run.name!r} has a fake router, which reads no prompts")
    spec, request = fit_router.fit_of(session, run, inputs.AUTO)  # with everything that the run file lets a router read
    cells = grid.read(session, run, **(reward or Reward()).measure)
    known = ~np.isnan(cells.rewards()).all(axis=1)
    if not (known & cells.is_holdout).any() or not (known & ~cells.is_holdout).any():
        raise UsageError(f"run {run.name!r} has no scored hold-out and calibration prompts to fit a router to")
    kind = config.router.chosen_kind if run.router_id is None else session.get_one(Router, run.router_id).kind
    return RefitInputs(cells, spec, request, kind)


def freeze(found: RefitInputs, home: Path) -> Frozen:
    """Read a grid's prompts with the run's encoders, or from the cache in `home`. Needs no session."""
    return Frozen(
        cells=found.cells,
        prompts=refit.read(home, found.spec, found.fit),
        preferences=found.fit.preferences,
        seed=found.fit.seed,
        kind=found.kind,
        tune=found.fit.tune,
    )


def curve(name: str, frozen: Frozen) -> Curve:
    """Fit routers to increasing numbers of calibration prompts, and measure each on the hold-out.

    name: the run's name. They are of the kind of the run's router; before one is chosen, heads.
    """
    kind = ROUTERS["head" if frozen.kind == inputs.AUTO else frozen.kind]
    examples = frozen.examples()
    rewarded = examples.rewards
    known = ~np.isnan(rewarded).all(axis=1)
    holdout, calibration = frozen.cells.is_holdout & known, ~frozen.cells.is_holdout & known
    sizes = curve_sizes(int(calibration.sum()))
    points = refit.curve(
        frozen.fit_to(kind, examples),
        rewarded,
        frozen.cells.is_holdout,
        sizes,
        preferences=frozen.preferences,
        seed=frozen.seed,
    )
    oracle = float(np.nanmax(rewarded[holdout], axis=1).mean())
    way = oracle - points[-1].static
    shown = [
        CurvePoint(
            p.n_calibration, p.reward, p.deviation, p.static, (p.reward - points[-1].static) / way if way > 0 else None
        )
        for p in points
    ]
    return Curve(
        name,
        kind.name,
        int(holdout.sum()),
        oracle,
        shown,
        _verdict(shown, way, has_head=kind.name == "head" and frozen.tune != "head"),
    )


def curve_sizes(n_calibration: int) -> list[int]:
    """The sizes 25, 50, 100, ..., half of the prompts, and all of them."""
    sizes = {n_calibration, n_calibration // 2}
    size = _CURVE_FROM
    while size < n_calibration:
        sizes.add(size)
        size *= 2
    return sorted(size for size in sizes if size >= _CURVE_FROM) or [n_calibration]


def _verdict(points: list[CurvePoint], way: float, *, has_head: bool) -> str:
    """Compare all prompts with half of them, to judge whether doubling would help.

    way:      the gap between the best single teacher and the oracle, in units of the reward.
    has_head: whether heads stand for a backbone that the run may tune.
    """
    half = next((point for point in points if point.n_calibration == points[-1].n_calibration // 2), None)
    if half is None or half.gap_closed is None or points[-1].gap_closed is None:
        return "too few calibration prompts for a conclusion"
    gain = points[-1].gap_closed - half.gap_closed
    # The drawn half is random; its reward is a mean over a few draws.
    noise = half.deviation / refit.REPEATS**0.5 / way
    helps = "may help" if gain > max(_GAIN, 2 * noise) else "would not help"
    heads = "" if not has_head else "; measured with heads: a fine-tuned backbone may gain more from more prompts"
    return (
        f"more calibration {helps}: {points[-1].n_calibration} prompts close {gain:+.0%} (+-{noise:.0%}) more of the "
        f"way to the oracle than {half.n_calibration} did{heads}"
    )
