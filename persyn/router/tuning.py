"""Tune a backbone under the head, and compare it with a head on the frozen backbone."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from persyn.errors import EngineError, shorten
from persyn.llm import options, scoring
from persyn.llm.identity import identify
from persyn.llm.options import Dtype
from persyn.llm.protocols import Fit, ModelSpec, Tick
from persyn.method.rewards import Matrix
from persyn.router import features, head, model
from persyn.router.model import RouterModel
from persyn.router.train import RouterExamples, TrainingPlan, split, train

#: With fewer validation prompts, full tuning and a head cannot be told apart.
_ENOUGH = 10

#: Standard errors by which full tuning must be better; its early stopping uses the same prompts, which favours it.
_ERRORS = 2.0

#: Training memory per weight besides the weight itself, in bytes: the gradient and AdamW's state, in float32.
_BYTES_A_WEIGHT = 12


class InsufficientMemory(EngineError):
    """There is not enough memory for the training."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """A router with tuned weights, and notes on its training."""

    router: RouterModel
    tune: str
    notes: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tuning:
    """The inputs of a fit, shared by every setting of `tune` that is tried.

    grid:   all prompts of the grid.
    learn:  indices of the calibration prompts that have a preference.
    frozen: (P, H) states of the frozen backbone.
    """

    request: Fit
    spec: ModelSpec
    chosen: options.RouterFitOptions
    grid: RouterExamples
    learn: list[int]
    frozen: Tensor
    tick: Tick

    def train(self, tune: str) -> Tuned:
        """Train a fresh router, `full` or `lora`; `EngineError` when memory is insufficient."""
        router, states = self._untrained(tune)
        if tune == "full" and not self.spec.gpus:
            _require_memory(sum(weight.numel() for weight in router.parameters()))
        try:
            notes = train(router, self.grid.take(self.learn), states[self.learn], self._plan(tune), self.tick)
        except torch.OutOfMemoryError as error:
            raise InsufficientMemory(
                f"tune = {tune!r} does not fit in the GPU's memory ({shorten(str(error))}); use another tune, or a "
                "smaller batch_size or max_tokens in [router] options"
            ) from error
        router.backbone.to(getattr(torch, model.precision(self.spec, self.chosen.dtype)))
        return Tuned(router, tune, notes)

    def better(self) -> Tuned | dict[str, Any]:
        """The fully tuned router if it beats a head on the frozen backbone, else notes on the comparison.

        Both are compared on validation prompts that neither learns from, at the precision used for routing. Full tuning
        must be better by more than chance (`_ERRORS`). The head wins when there are too few validation prompts or too
        little memory.
        """
        learn, validate = (np.array(self.learn)[part] for part in split(len(self.learn), self.request.seed))
        if len(validate) < _ENOUGH:
            return {"not_full": f"{len(validate)} validation prompts are too few to decide"}
        examples = self.grid.take(learn.tolist())
        simple = head.fit(
            self.frozen[learn],
            examples.rewards,
            errors=examples.errors,
            preferences=self.request.preferences,
            seed=self.request.seed,
            tick=self.tick,
        )
        by_head = self._losses(self.frozen[validate].double() @ simple.weight.T + simple.bias, validate)
        taken = self._full()
        if isinstance(taken, str):
            return {"not_full": taken}
        by_full = self._losses(torch.from_numpy(self.scores(taken, validate.tolist())), validate)
        notes = {**taken.notes, "loss_head": by_head.mean().item(), "loss_full": by_full.mean().item()}
        return notes if head.is_within_error(by_head - by_full, _ERRORS) else Tuned(taken.router, "full", notes)

    def scores(self, tuned: Tuned, prompts: list[int] | None = None) -> Matrix:
        """(P, K) scores of prompts of the grid, by default all."""
        asked = self.grid.prompts if prompts is None else [self.grid.prompts[i] for i in prompts]
        states = model.all_features(tuned.router, asked, self.batch_tokens, self.tick)
        with torch.no_grad():
            found: Matrix = tuned.router.score(states.to(tuned.router.head.weight.device)).cpu().double().numpy()
        return found

    @property
    def batch_tokens(self) -> int:
        """Tokens of a forward pass without gradients."""
        return scoring.batch_tokens(self.spec, self.chosen)

    def _full(self) -> Tuned | str:
        """The fully tuned router, or the reason why memory was insufficient."""
        try:
            return self.train("full")
        except InsufficientMemory as error:
            why = str(error)
        # Collect after the except block: the exception references tensors on the GPU.
        gc.collect()
        torch.cuda.empty_cache()
        return why

    def _untrained(self, tune: str) -> tuple[RouterModel, Tensor]:
        """A router, and the (P, H) states of the grid's prompts that its head starts from."""
        place = _dtype(tune, self.spec, self.chosen)
        router = model.load(self.spec, place, len(self.request.teachers)).requires_grad_(False)
        self.tick()
        revision = identify(self.spec.model, self.spec.revision).revision
        states = features.cached(
            features.folder(Path(), self.spec.model, revision, str(router.backbone.dtype), router.reads),
            self.grid.prompts,
            lambda new: model.all_features(router, new, self.batch_tokens, self.tick),
        )
        return router, states

    def _losses(self, scores: Tensor, prompts: NDArray[np.intp]) -> Tensor:
        """(Q,) losses of the scores (Q, K) of Q prompts, each over its preferences."""
        weights = self.grid.take(prompts.tolist()).weights(self.request.preferences)
        return model.prompt_losses(scores, torch.from_numpy(weights))

    def _plan(self, tune: str) -> TrainingPlan:
        return TrainingPlan(
            tune=tune,
            preferences=self.request.preferences,
            seed=self.request.seed,
            batch_tokens=self.batch_tokens,
            epochs=self.chosen.epochs,
            learning_rate=self.chosen.learning_rate or {"lora": 1e-4}.get(tune, 1e-5),
            batch_size=self.chosen.batch_size,
            lora_rank=self.chosen.lora_rank,
        )


def _dtype(tune: str, spec: ModelSpec, chosen: options.RouterFitOptions) -> Dtype:
    """The backbone's dtype during training.

    Full tuning keeps weights in float32, on a GPU under bfloat16 autocast: bfloat16 weights would lose small updates.
    """
    return "float32" if tune == "full" else model.precision(spec, chosen.dtype)


def _require_memory(n_weights: int) -> None:
    """Raise `InsufficientMemory` when a CPU lacks the memory for training.

    Otherwise the system would kill the process silently.
    """
    wanted, free = n_weights * _BYTES_A_WEIGHT / 2**30, psutil.virtual_memory().available / 2**30
    if wanted > free:
        raise InsufficientMemory(
            f"tune = 'full' does not fit in memory ({n_weights / 1e9:.1f} billion weights take {wanted:.0f} GiB more, "
            f"{free:.0f} are free); use another tune, a smaller backbone, or gpus = 1 in [router]"
        )
