"""Draw prompts so that every part of a run is sampled at the same rate. Pure NumPy."""

from __future__ import annotations

import numpy as np

from persyn.method.rewards import Indices


def even(parts: Indices, asked: Indices, left: Indices, n: int) -> Indices:
    """Draw up to n of M prompts, each from the part that is sampled at the lowest rate (proportional allocation).

    parts: (M,) the part of each prompt, 0 to S - 1, in random order; of each part, n prompts or all that are left.
    asked: (S,) how many prompts of each part were asked before, and left: (S,) how many were not.
    returns: indices of the M prompts, in the order of the draw.
    """
    queues = [np.flatnonzero(parts == part) for part in range(len(asked))]
    sizes, lengths = np.maximum(asked + left, 1), np.array([len(queue) for queue in queues])
    taken, drawn = np.zeros(len(asked), dtype=np.intp), list[int]()
    while len(drawn) < min(n, len(parts)):
        rates = np.where(taken < lengths, (asked + taken) / sizes, np.inf)
        part = int(rates.argmin())
        drawn.append(int(queues[part][taken[part]]))
        taken[part] += 1
    return np.array(drawn, dtype=np.intp)
