"""Choose pairs of responses to one prompt to prefer one over the other. Pure NumPy."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from persyn.method.intervals import Vector
from persyn.method.rewards import preferences

Which: TypeAlias = Literal["best-worst", "best-each", "all"]
"""The pair with the largest margin, all pairs of the best response, or all pairs."""


def choose(
    rewards: Vector, may_win: NDArray[np.bool_], may_pair: NDArray[np.bool_], *, which: Which, min_margin: float
) -> list[tuple[int, int]]:
    """The pairs (chosen, rejected) of a prompt, by the indices of its responses; the best response's come first.

    Equal rewards are no pair. `best-worst` is the allowed pair of the largest margin; of equal ones, the first.

    rewards:    (K,) of the prompt's responses; NaN where there is none.
    may_win:    (K,) which responses may be chosen.
    may_pair:   (K, K) which responses (axis 1) may be rejected for which (axis 0).
    min_margin: the least difference of the rewards.
    """
    _, chosen, rejected = preferences(rewards[None, :])
    margins = rewards[chosen] - rewards[rejected]
    allowed = may_win[chosen] & may_pair[chosen, rejected] & (margins >= min_margin)
    chosen, rejected, margins = chosen[allowed], rejected[allowed], margins[allowed]
    if not len(chosen):
        return []
    if which == "best-worst":
        wanted = [int(np.argmax(margins))]
    else:
        order = np.lexsort((rejected, rewards[rejected], chosen, -rewards[chosen]))
        wanted = [int(place) for place in order if which == "all" or chosen[place] == chosen[order[0]]]
    return [(int(chosen[place]), int(rejected[place])) for place in wanted]
