"""Which prompts a router may learn most from: where routers fitted to resampled prompts disagree at a cost.

Query by committee (Seung, Opper and Sompolinsky 1992) with bagging (Abe and Mamitsuka 1998). The committee votes in
units of the reward, so that a disagreement between equally good teachers counts for nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from persyn.method.intervals import Vector
from persyn.method.rewards import Indices
from persyn.router.kinds.base import Examples, Prompts
from persyn.router.kinds.crossfit import one_thread
from persyn.router.kinds.registry import ROUTERS

#: Routers in a committee.
MEMBERS = 16
#: Their kind: it reads whatever there is, and is fitted in no time.
_KIND = ROUTERS["linear"]


def gains(prompts: Prompts, examples: Examples, asked: Prompts) -> Vector:
    """(M,) what knowing the best teacher of each of M prompts is expected to gain, in units of the reward.

    prompts, examples: P calibration prompts, of which each member learns from P drawn with replacement.
    """
    votes = np.empty((MEMBERS, len(asked), examples.rewards.shape[1]))
    with one_thread():
        for member, drawn in enumerate(_resampled(len(examples), examples.seed)):
            votes[member] = _KIND.fit(prompts.take(drawn), examples.take(drawn)).scores(asked)
    return of_votes(votes)


def of_votes(votes: NDArray[np.float64]) -> Vector:
    """(M,) mean over the members of how much better their own choice is than that of all together, by their own votes.

    It is the expected value of perfect information (Howard 1966), if each member is as likely to be right.

    votes: (B, M, K) the members' scores, in units of the reward.
    """
    together = votes.mean(axis=0).argmax(axis=1)
    chosen = np.take_along_axis(votes, together[None, :, None], axis=2)[..., 0]
    return np.asarray((votes.max(axis=2) - chosen).mean(axis=0))


def _resampled(n: int, seed: int) -> Indices:
    """(B, n) indices drawn with replacement."""
    return np.asarray(np.random.default_rng(seed).integers(n, size=(MEMBERS, n)))
