"""Definitions of learnability: how well a response suits the student, from one pass of the student over it.

Pure NumPy. Higher is better in every definition, as in the reward. What the student's pass yields is kept as
*statistics* of each part of a response (its reasoning and its answer): sums over tokens, from which every definition is
computed without another pass. Those in `EXTRA` need the student to read the response once more in another context.

A token has the surprisal s = -log p in nats, the rank r among all tokens (1 for the most likely), and the entropy H of
the student's distribution at its place, all given the prompt and the tokens before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from persyn.registry import Registry

Statistics: TypeAlias = Mapping[str, float]
"""Of the tokens of a response or of a part of it, by name; raw sums, never normalised.

log_likelihood: the sum of log p, in nats.
n_tokens:       their number.
squares:        the sum of (log p)^2.
lowest:         the sum of the lowest fifth of log p; n_lowest is how many, rounded up.
lowest_window:  the lowest mean of log p over a window, see `WINDOW`; the lowest of both parts for a response.
rank:           the sum of min(r, 100).
n_first:        the number of tokens with rank 1.
entropy:        the sum of H, in nats.
alone, local:   see `EXTRA`.
"""

#: Tokens of a window. A part is divided into windows of equal length, of this many tokens or up to twice as many.
WINDOW = 32
#: Tokens before a window that are its context in `local`.
CONTEXT = 64
#: Ranks above this count as this: far down, a rank says nothing more (arXiv 2601.14249).
HIGHEST_RANK = 100
#: The share of a part's tokens that is `lowest` (arXiv 2310.16789).
LOWEST_SHARE = 0.2

#: Statistics for which the student reads the response once more: the sum of log p without the prompt, and the same of
#: windows, each given only the tokens just before it.
EXTRA = ("alone", "local")


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnability:
    """A definition of learnability."""

    name: str
    #: One sentence for the documentation, with the formula.
    summary: str
    #: Where it comes from.
    source: str
    #: Its unit, for reports; empty if it has none.
    unit: str
    #: The statistics that it needs besides the log-likelihood and the number of tokens.
    needs: tuple[str, ...] = ()
    #: Whether it is a mean log-likelihood, at most 0, so that its negative is a loss.
    is_log_likelihood: bool = False
    #: Its value; not finite where it is undefined.
    value: Callable[[Statistics], float]

    @property
    def extra(self) -> tuple[str, ...]:
        """The statistics it needs for which the student reads a response once more."""
        return tuple(name for name in self.needs if name in EXTRA)


def summarise(tokens: NDArray[np.float64]) -> dict[str, float]:
    """The statistics of one part of a response, without those in `Score`'s own columns and in `EXTRA`.

    tokens:  (L, 3) log-probability, rank and entropy of each token.
    returns: `lowest_window` only if L > 0.
    """
    log_likelihoods, ranks, entropies = tokens.T
    n = len(tokens)
    n_lowest = int(np.ceil(n * LOWEST_SHARE))
    found = {
        "squares": float(np.square(log_likelihoods).sum()),
        "lowest": float(np.partition(log_likelihoods, max(n_lowest - 1, 0))[:n_lowest].sum()) if n else 0.0,
        "n_lowest": float(n_lowest),
        "rank": float(np.minimum(ranks, HIGHEST_RANK).sum()),
        "n_first": float((ranks == 1).sum()),
        "entropy": float(entropies.sum()),
    }
    return found | ({"lowest_window": _lowest_window(log_likelihoods)} if n else {})


def _lowest_window(log_likelihoods: NDArray[np.float64]) -> float:
    bounds = np.linspace(0, len(log_likelihoods), max(1, len(log_likelihoods) // WINDOW) + 1).astype(np.intp)
    return float((np.add.reduceat(log_likelihoods, bounds[:-1]) / np.diff(bounds)).min())


def joined(answer: Statistics, reasoning: Statistics) -> Statistics:
    """The statistics of a whole response, from those of its parts: sums, and the lower of the two lowest windows.

    A statistic that one part lacks is lacking, except `lowest_window`, which a part without tokens does not have.
    """
    found = {name: answer[name] + reasoning[name] for name in answer.keys() & reasoning.keys()}
    lowest = [part["lowest_window"] for part in (answer, reasoning) if "lowest_window" in part]
    return found | ({"lowest_window": min(lowest)} if lowest else {})


def value(definition: Learnability, statistics: Statistics) -> float:
    """The learnability of a response or a part of it; NaN where a statistic is missing or no token was scored."""
    if not statistics["n_tokens"] > 0 or any(name not in statistics for name in definition.needs):
        return float("nan")
    found = float(definition.value(statistics))
    return found if np.isfinite(found) else float("nan")


def unit(name: str, *, per: str, on: str) -> str:
    """A learnability's unit in words, with the part of a response: "nats per token, of the answer".

    name: of the definition; one other than `log_likelihood` comes before its unit.
    """
    said = f"nats per {per}" if name == "log_likelihood" else ", ".join(filter(None, (name, LEARNABILITIES[name].unit)))
    return said if on == "both" else f"{said}, of the {on}"


def _mean(statistics: Statistics, name: str) -> float:
    return statistics[name] / statistics["n_tokens"]


def _ratio(above: float, below: float) -> float:
    return above / below if below else float("nan")


def _ifd(statistics: Statistics) -> float:
    ratio = _ratio(statistics["log_likelihood"], statistics["alone"])
    return 0.0 if ratio > 1 else ratio


#: Without plug-ins: the store's views compute each of them in SQL.
LEARNABILITIES = Registry(
    Learnability,
    Learnability(
        name="log_likelihood",
        summary="the mean log-likelihood of the tokens, mean(-s)",
        source="arXiv 2510.10925",
        unit="nats per token",
        is_log_likelihood=True,
        value=lambda of: _mean(of, "log_likelihood"),
    ),
    Learnability(
        name="lowest_window",
        summary=f"the lowest mean of -s over a window of {WINDOW} tokens: the hardest passage counts",
        source="a local form of the mean log-likelihood",
        unit="nats per token",
        needs=("lowest_window",),
        is_log_likelihood=True,
        value=lambda of: of["lowest_window"],
    ),
    Learnability(
        name="lowest_share",
        summary="the mean of -s over the fifth of the tokens with the lowest: Min-K% Prob with K = 20",
        source="arXiv 2310.16789",
        unit="nats per token",
        needs=("lowest", "n_lowest"),
        is_log_likelihood=True,
        value=lambda of: _ratio(of["lowest"], of["n_lowest"]),
    ),
    Learnability(
        name="local_log_likelihood",
        summary=f"the mean of -s where each window of {WINDOW} tokens is given only the {CONTEXT} tokens before it: "
        "Local Naturalness with windows in place of reasoning steps",
        source="arXiv 2510.03988",
        unit="nats per token",
        needs=("local",),
        is_log_likelihood=True,
        value=lambda of: _mean(of, "local"),
    ),
    Learnability(
        name="rank_surprisal_ratio",
        summary=f"-sum(min(r, {HIGHEST_RANK})) / sum(s): surprising tokens that still rank high. The source's ratio is "
        "lower for better responses, hence the sign",
        source="arXiv 2601.14249",
        unit="ranks per nat",
        needs=("rank",),
        value=lambda of: _ratio(of["rank"], of["log_likelihood"]),
    ),
    Learnability(
        name="ifd",
        summary="instruction-following difficulty: mean(s) divided by the mean(s) of the response without the prompt. "
        "Higher is harder and preferred; above 1 it counts as 0, since the source discards such responses",
        source="arXiv 2308.12032",
        unit="",
        needs=("alone",),
        value=_ifd,
    ),
    Learnability(
        name="entropy_aware",
        summary="mean(H - s): how much less surprising the tokens are than the student expects of its own",
        source="after locally typical sampling, arXiv 2202.00666",
        unit="nats per token",
        needs=("entropy",),
        value=lambda of: (of["log_likelihood"] + of["entropy"]) / of["n_tokens"],
    ),
    groups=(),
)
