"""Score calibration prompts by routers that did not learn from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from persyn.llm.protocols import Tick
from persyn.method.rewards import Indices, Matrix
from persyn.router.kinds.base import Examples, Predictor, Prompts, RouterKind, Values, quietly

FOLDS = 5


def folds(n: int, *, seed: int) -> Indices:
    """(n,) the fold of each of n prompts, 0 to FOLDS - 1."""
    return np.asarray(np.random.default_rng(seed).permutation(n) % FOLDS)


def cross_fitted(
    kind: RouterKind,
    prompts: Prompts,
    examples: Examples,
    fold: Indices,
    *,
    settings: Values | None = None,
    tick: Tick = quietly,
) -> Matrix:
    """(P, K) scores of each prompt by a router that was fitted to the other folds.

    fold:     (P,) see `folds`.
    settings: of a fit to all prompts; None to choose them in each fold, from its own prompts alone.
    """
    scores = np.zeros(examples.rewards.shape)
    for each in np.unique(fold):
        learn, asked = np.flatnonzero(fold != each), np.flatnonzero(fold == each)
        if not len(learn):  # a single prompt: nothing is known without it, and all scores are equal
            continue
        fitted = kind.fit(prompts.take(learn), examples.take(learn), tick=tick, settings=settings)
        scores[asked] = fitted.scores(prompts.take(asked))
        tick()
    return scores


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: on matrices of this size, and beside other work, more mostly wait for each other."""
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1):
            yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """Kinds fitted to the same prompts and folds, each once."""

    prompts: Prompts
    examples: Examples
    tick: Tick = quietly
    _fitted: dict[str, tuple[Predictor, Matrix]] = field(default_factory=dict)

    @property
    def fold(self) -> Indices:
        """(P,) folds."""
        return folds(len(self.examples), seed=self.examples.seed)

    def fitted(self, kind: RouterKind) -> tuple[Predictor, Matrix]:
        """A router fitted to all prompts, and its (P, K) out-of-fold scores."""
        if kind.name not in self._fitted:
            self._fitted[kind.name] = kind.mix(self) if kind.mix else self._fit(kind)
        return self._fitted[kind.name]

    def _fit(self, kind: RouterKind) -> tuple[Predictor, Matrix]:
        fitted = kind.fit(self.prompts, self.examples, tick=self.tick)
        settings = fitted.settings if kind.reuses_settings else None
        return fitted, cross_fitted(kind, self.prompts, self.examples, self.fold, settings=settings, tick=self.tick)
