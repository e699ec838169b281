"""Which new prompts are unlike the calibration prompts, and whether they are too many to be chance. Pure NumPy.

The distance of a prompt is that to its nearest calibration prompt (Sun et al. 2022, "Out-of-distribution detection with
deep nearest neighbors"); of a calibration prompt, to the nearest other one. Its conformal p-value is the share of
calibration prompts, and itself, that are at least as far (Bates et al. 2023, "Testing for outliers with conformal
p-values").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from persyn.method.intervals import Vector
from persyn.method.rewards import Indices

#: Of prompts of the calibration prompts' kind, this share is far.
USUAL = 0.05
#: More far prompts than this share are too many, if chance explains so many with less than this probability.
MUCH, CHANCE = 0.1, 0.001
#: Fewer calibration prompts leave no p-value as low as `USUAL`.
FEWEST = round(1 / USUAL) - 1


@dataclass(frozen=True, slots=True, eq=False)
class Novelty:
    """How unlike M new prompts are.

    far:     indices of the far ones, the farthest first.
    prompts: M. calibration: N, the calibration prompts that they were compared with.
    """

    far: Indices
    prompts: int
    calibration: int

    @property
    def share(self) -> float:
        """The share of new prompts that are far."""
        return len(self.far) / self.prompts

    @property
    def is_much(self) -> bool:
        """Whether too many are far for prompts of the same kind; a few new prompts never are."""
        return self.share > MUCH and self._chance() < CHANCE

    def _chance(self) -> float:
        """The probability of at least so many far prompts among M of the same kind.

        The share that is far has a beta distribution over draws of the calibration prompts (Vovk 2012).
        """
        from scipy.stats import betabinom

        rank = _rank(self.calibration)
        return float(betabinom.sf(len(self.far) - 1, self.prompts, rank, self.calibration + 1 - rank))


def compare(known: Vector, new: Vector) -> Novelty:
    """Find the new prompts whose p-value is at most `USUAL`.

    known: (N,) distances of calibration prompts, N >= `FEWEST`. new: (M,) those of new prompts, M > 0.
    """
    if len(known) < FEWEST:
        raise ValueError(f"{len(known)} calibration prompts cannot tell far prompts; {FEWEST} can")
    far = np.flatnonzero(new > np.sort(known)[len(known) - _rank(len(known))])
    return Novelty(far[np.argsort(-new[far], kind="stable")], len(new), len(known))


def _rank(n_calibration: int) -> int:
    """The rank, from the farthest, of the calibration prompt beyond which the p-value is at most `USUAL`."""
    return int(USUAL * (n_calibration + 1) + 1e-9)
