"""Routers that a run might have had: heads fitted anew to its grid, at another alpha or to fewer prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from persyn import rewards, strategies
from persyn.config import thaw
from persyn.db import grid
from persyn.db.catalog import Run
from persyn.errors import UsageError
from persyn.rewards import Matrix
from persyn.router import refit
from persyn.stages import fit_router

#: Prompts whose rewards a prompt's neighbours tell, as many as the square root of those that are known, and no fewer.
_NEIGHBOURS_AT_LEAST = 5
#: The smallest calibration that a curve begins with.
_CURVE_FROM = 25
#: Less of the way to the oracle, for twice the prompts, is no gain.
_GAIN = 0.02


@dataclass(frozen=True, slots=True)
class Frozen:
    """A run's grid, and what its router's backbone makes of the grid's prompts.

    features: (P, H).
    """

    cells: grid.Grid
    features: Matrix
    seed: int
    how: rewards.Normalisation
    alpha: float

    def rewards(self, alpha: float) -> Matrix:
        """(P, T) at another weight of learnability."""
        return rewards.combine(self.cells.quality, self.cells.learnability, alpha=alpha, how=self.how)

    def scores(self, alpha: float) -> dict[str, Matrix]:
        """What reads the prompt and can be had at any alpha: (P, T) of a head, and of the nearest neighbours."""
        rewarded = self.rewards(alpha)
        learn = np.flatnonzero(~self.cells.is_holdout & ~np.isnan(rewarded).all(axis=1))
        k = max(_NEIGHBOURS_AT_LEAST, round(len(learn) ** 0.5))
        return {
            "head": refit.scores(self.features, rewarded, learn, seed=self.seed),
            "neighbours": strategies.neighbours(self.features[learn], rewarded[learn], self.features, k=k),
        }


class CurvePoint(Struct, frozen=True):
    """A router from so many calibration prompts, on the hold-out; see `refit.Point`."""

    n_calibration: int
    reward: float
    deviation: float
    static: float
    #: Of the way from the run's best single teacher to the oracle, the part that it goes.
    closed: float | None


class Curve(Struct, frozen=True):
    """What calibration is worth, and whether more of it would help."""

    run: str
    n_holdout: int
    oracle: float
    points: list[CurvePoint]
    verdict: str


def freeze(session: Session, run: Run, home: Path) -> Frozen:
    """Read a run's grid and the features of its prompts; those that are not kept in `home` are computed here.

    Raises `UsageError` when the run's router has no backbone, or nothing is in the grid.
    """
    config = thaw(run.config)
    if config.router.engine == "fake":
        raise UsageError(f"run {run.name!r} has a fake router: there is no backbone to read its prompts with")
    spec, request = fit_router.fit_of(session, run)
    if not request.conversations:
        raise UsageError(f"run {run.name!r} has no calibration grid")
    return Frozen(
        cells=grid.read(session, run),
        features=refit.frozen(home, spec, request.conversations),
        seed=run.seed,
        how=config.run.normalise,
        alpha=config.run.alpha,
    )


def curve(name: str, frozen: Frozen, *, progress: Callable[[], None] = lambda: None) -> Curve:
    """Fit routers to more and more of the calibration prompts, and measure each on the hold-out.

    name:     the run's.
    progress: called after each fit.
    Raises `UsageError` without scored prompts in both parts.
    """
    rewarded = frozen.rewards(frozen.alpha)
    known = ~np.isnan(rewarded).all(axis=1)
    holdout, calibration = frozen.cells.is_holdout & known, ~frozen.cells.is_holdout & known
    if not holdout.any() or calibration.sum() < 2:
        raise UsageError(f"run {name!r} has no scored hold-out or calibration prompts to draw a curve of")
    sizes = curve_sizes(int(calibration.sum()))
    points = refit.curve(frozen.features, rewarded, frozen.cells.is_holdout, sizes, seed=frozen.seed, progress=progress)
    oracle = float(np.nanmax(rewarded[holdout], axis=1).mean())
    way = oracle - points[-1].static
    shown = [
        CurvePoint(
            p.n_calibration, p.reward, p.deviation, p.static, (p.reward - points[-1].static) / way if way > 0 else None
        )
        for p in points
    ]
    return Curve(name, int(holdout.sum()), oracle, shown, _verdict(shown, rewarded[holdout]))


def curve_sizes(n_calibration: int) -> list[int]:
    """25, 50, 100, ... and all of them."""
    sizes = []
    size = _CURVE_FROM
    while size < n_calibration:
        sizes.append(size)
        size *= 2
    return [*sizes, n_calibration]


def _verdict(points: list[CurvePoint], rewarded: NDArray[np.float64]) -> str:
    """Compare all prompts with half of them: would twice as many be worth it?"""
    if len(points) < 2 or points[-1].closed is None:
        return "too few calibration prompts to tell"
    half = max(points[:-1], key=lambda point: -abs(point.n_calibration - points[-1].n_calibration / 2))
    assert half.closed is not None
    gain = points[-1].closed - half.closed
    # How far the mean over other hold-out prompts would lie from this one, in units of the way.
    way = (points[-1].reward - points[-1].static) / points[-1].closed if points[-1].closed else 1.0
    noise = float(np.nanstd(np.nanmax(rewarded, axis=1))) / len(rewarded) ** 0.5 / abs(way or 1.0)
    if gain <= _GAIN:
        return (
            f"more calibration would not help: {points[-1].n_calibration} prompts close {gain:+.0%} more of the way "
            f"than {half.n_calibration} did"
        )
    certain = "" if gain > noise else ", though within the noise of this hold-out"
    return f"more calibration may help: the last doubling closed {gain:+.0%} of the way{certain}"
