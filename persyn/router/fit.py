"""The engine that fits a router to a calibration grid, measures it on the hold-out and writes its checkpoint."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from persyn.errors import EngineError, shorten
from persyn.llm import options, scoring
from persyn.llm.batched import Batched
from persyn.llm.chat import Chat, load_tokenizer
from persyn.llm.identity import hub_revision, identify, require_unchanged
from persyn.llm.options import Dtype
from persyn.llm.protocols import Engine, Failed, Fit, Fitted, ModelSpec, Request, Result, Tick
from persyn.method import rewards as reward_matrix
from persyn.method import routing_metrics, strategies
from persyn.method.rewards import Matrix
from persyn.router import checkpoint, features, head, model
from persyn.router.checkpoint import CheckpointManifest
from persyn.router.model import Reader, RouterModel
from persyn.router.train import TUNES, RouterExamples, TrainingPlan, split, train

#: With fewer validation prompts, full tuning and a head cannot be told apart.
_ENOUGH = 10


#: Standard errors by which full tuning must be better; its early stopping uses the same prompts, which favours it.
_ERRORS = 2.0

#: Training memory per weight besides the weight itself, in bytes: the gradient and AdamW's state, in float32.
_BYTES_A_WEIGHT = 12


class InsufficientMemory(EngineError):
    """There is not enough memory for the training."""


def load(spec: ModelSpec, tick: Tick) -> Engine:
    """Load a backbone's tokenizer; each `Fit` starts from the backbone's own weights.

    Options: `options.RouterFitOptions`. Raises `UsageError` when the backbone is not the version the spec refers to.
    """
    chosen = options.decode(spec, options.RouterFitOptions)
    spec = backbone(spec)
    model.refuse_several_gpus(spec)
    chat = Chat(load_tokenizer(spec), add_bos=chosen.add_bos)

    def compute(requests: list[Request]) -> Iterator[list[Result]]:
        for request in requests:
            assert isinstance(request, Fit)
            reason = _refusal(request)
            yield [Failed(request.id, reason) if reason else _fit(request, spec, chosen, chat, tick)]

    return Batched(compute, version=scoring.VERSION, chunk=1)


def backbone(spec: ModelSpec) -> ModelSpec:
    """Return a spec for loading weights: a folder's digest is verified and removed. `UsageError` on a mismatch."""
    if hub_revision(spec.revision) != spec.revision:
        require_unchanged(spec.model, spec.revision)
    return msgspec.structs.replace(spec, revision=hub_revision(spec.revision))


def reader(chat: Chat, chosen: options.RouterFitOptions, config: Any) -> Reader:
    """A reader limited to the context length of the backbone with this configuration."""
    return Reader(chat, min(chosen.max_tokens, scoring.max_tokens(config) or chosen.max_tokens))


def _refusal(request: Fit) -> str | None:
    """Why a grid cannot be fitted, or None."""
    errors = request.rewards if request.errors is None else request.errors
    lengths = {len(request.conversations), len(request.rewards), len(request.is_holdout), len(errors)}
    if len(lengths) > 1 or {len(row) for row in [*request.rewards, *errors]} != {len(request.teachers)}:
        return f"malformed: expected a row of {len(request.teachers)} rewards and a flag for each conversation"
    if request.tune not in ("auto", *TUNES):
        return f"unknown_tune: {request.tune!r}; available: auto, {', '.join(TUNES)}"
    calibration = np.array(request.rewards, dtype=np.float64)[~np.array(request.is_holdout)]
    if not len(reward_matrix.preferences(calibration)[0]):
        return f"no_preferences: none of {len(calibration)} calibration prompts has two teachers of distinct reward"
    unmeasured = np.isnan(calibration).all(axis=0)
    if unmeasured.any():
        names = ", ".join(name for name, is_missing in zip(request.teachers, unmeasured, strict=True) if is_missing)
        return f"unmeasured_teachers: no calibration prompt has a reward of {names}"
    return None


def _fit(request: Fit, spec: ModelSpec, chosen: options.RouterFitOptions, chat: Chat, tick: Tick) -> Fitted:
    started = time.monotonic()
    read = reader(chat, chosen, scoring.configuration(spec))
    grid = RouterExamples(
        [read.ids(messages) for messages in request.conversations],
        np.array(request.rewards, np.float64),
        None if request.errors is None else np.array(request.errors, np.float64),
    )
    is_holdout = np.array(request.is_holdout, dtype=np.bool_)
    calibration = np.flatnonzero(~is_holdout)
    pairs, _, _ = reward_matrix.preferences(grid.rewards[calibration])
    work = _Work(request, spec, chosen, grid, calibration[np.unique(pairs)].tolist(), tick)
    trained = work.better() if request.tune == "auto" else work.train(request.tune)
    router = trained.router
    router.backbone.to(getattr(torch, model.precision(spec, chosen.dtype)))
    manifest = _manifest(request, trained.tune, spec, chosen, router, read)
    sha256 = checkpoint.write(Path(request.folder), router, manifest, chat.tokenizer)
    checkpoint.merge(router)
    is_frozen = trained.tune == "head"
    final = trained.frozen if is_frozen else model.all_features(router, grid.prompts, work.batch_tokens, tick)
    scores = _scores(router, final)
    metrics = {
        **_measure(scores, trained.frozen.double().numpy(), grid, is_holdout, request.preferences),
        "n_calibration": len(calibration),
        "n_holdout": int(is_holdout.sum()),
        "n_pairs": len(pairs),
        "tune": trained.tune,
        "preferences": request.preferences,
        "seconds": time.monotonic() - started,
        "versions": manifest.versions,
        **trained.notes,
    }
    return Fitted(request.id, request.folder, sha256, metrics, scores.tolist())


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


@dataclass(frozen=True, slots=True)
class _Trained:
    """A router trained with one setting of `tune`.

    frozen: (P, H) features of the grid's prompts from the backbone before training.
    """

    router: RouterModel
    tune: str
    frozen: Tensor
    notes: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Work:
    """One fit's inputs, shared by every setting of `tune` that is tried.

    learn: indices of the calibration prompts that have a preference.
    """

    request: Fit
    spec: ModelSpec
    chosen: options.RouterFitOptions
    grid: RouterExamples
    learn: list[int]
    tick: Tick

    @property
    def batch_tokens(self) -> int:
        return scoring.batch_tokens(self.spec, self.chosen)

    def train(self, tune: str) -> _Trained:
        """Train a fresh router with a setting from `TUNES`; `EngineError` when memory is insufficient."""
        router, frozen = self._read(tune)
        if tune == "full" and not self.spec.gpus:
            _require_memory(sum(weight.numel() for weight in router.parameters()))
        try:
            notes = train(router, self.grid.take(self.learn), frozen[self.learn], self._plan(tune), self.tick)
        except torch.OutOfMemoryError as error:
            raise InsufficientMemory(
                f"tune = {tune!r} does not fit in the GPU's memory ({shorten(str(error))}); use another tune, or a "
                "smaller batch_size or max_tokens in [router] options"
            ) from error
        return _Trained(router, tune, frozen, notes)

    def better(self) -> _Trained:
        """Return the fully tuned router if it beats a head on the frozen backbone, else the head.

        Both are compared on validation prompts that neither learns from, at the precision used for routing. Full tuning
        must be better by more than chance (`_ERRORS`). The head wins when there are too few validation prompts or too
        little memory.
        """
        learn, validate = (np.array(self.learn)[part] for part in split(len(self.learn), self.request.seed))
        if len(validate) < _ENOUGH:
            return self._simple(f"{len(validate)} validation prompts are too few to decide")
        frozen = self._read("head")[1]
        examples = self.grid.take(learn.tolist())
        simple = head.fit(
            frozen[learn],
            examples.rewards,
            errors=examples.errors,
            preferences=self.request.preferences,
            seed=self.request.seed,
            tick=self.tick,
        )
        by_head = self._losses(frozen[validate].double() @ simple.weight.T + simple.bias, validate)
        taken = self._full()
        if isinstance(taken, str):
            return self._simple(taken)
        taken.router.backbone.to(getattr(torch, model.precision(self.spec, self.chosen.dtype)))
        prompts = self.grid.take(validate.tolist()).prompts
        tuned = model.all_features(taken.router, prompts, self.batch_tokens, self.tick)
        by_full = self._losses(torch.from_numpy(_scores(taken.router, tuned)), validate)
        notes = {**taken.notes, "loss_head": by_head.mean().item(), "loss_full": by_full.mean().item()}
        if head.is_within_error(by_head - by_full, _ERRORS):
            del taken  # free memory before another backbone is loaded: a GPU may not hold two
            taken = self.train("head")
        return replace(taken, notes={**notes, **taken.notes})

    def _simple(self, why: str) -> _Trained:
        """Train the head, and note why full tuning was not compared."""
        found = self.train("head")
        return replace(found, notes={**found.notes, "not_full": why})

    def _full(self) -> _Trained | str:
        """The fully tuned router, or the reason why memory was insufficient."""
        try:
            return self.train("full")
        except InsufficientMemory as error:
            why = str(error)
        # Collect after the except block: the exception references tensors on the GPU.
        gc.collect()
        torch.cuda.empty_cache()
        return why

    def _read(self, tune: str) -> tuple[RouterModel, Tensor]:
        """An untrained router, and the (P, H) features of the grid's prompts from its backbone."""
        place = dtype(tune, self.spec, self.chosen)
        router = model.load(self.spec, place, len(self.request.teachers), model.reads_of(tune)).requires_grad_(False)
        self.tick()
        revision = identify(self.spec.model, self.spec.revision).revision
        frozen = features.cached(
            features.folder(Path(), self.spec.model, revision, str(router.backbone.dtype), router.reads),
            self.grid.prompts,
            lambda new: model.all_features(router, new, self.batch_tokens, self.tick),
        )
        return router, frozen

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


def dtype(tune: str, spec: ModelSpec, chosen: options.RouterFitOptions) -> Dtype:
    """The backbone's dtype while a router is fitted.

    Full tuning keeps weights in float32, on a GPU under bfloat16 autocast: bfloat16 weights would lose small updates.
    """
    return "float32" if tune == "full" else model.precision(spec, chosen.dtype)


def _manifest(
    request: Fit, tune: str, spec: ModelSpec, chosen: options.RouterFitOptions, router: RouterModel, reader: Reader
) -> CheckpointManifest:
    folder = Path(spec.model)
    return CheckpointManifest(
        backbone=str(folder.absolute()) if folder.is_dir() else spec.model,
        revision=identify(spec.model, spec.revision).revision,
        tune=tune,
        teachers=request.teachers,
        max_tokens=reader.max_tokens,
        add_bos=chosen.add_bos,
        versions={name: version(name) for name in ("persyn", "torch", "transformers")},
        reads=router.reads,
    )


def _scores(router: RouterModel, features: Tensor) -> Matrix:
    """(P, K) scores of all prompts of the grid."""
    with torch.no_grad():
        scores: Matrix = router.score(features.to(router.head.weight.device)).cpu().double().numpy()
    return scores


def _measure(
    scores: Matrix, frozen: Matrix, grid: RouterExamples, is_holdout: NDArray[np.bool_], preferences: str
) -> dict[str, Any]:
    """Metrics of the router and its baselines on the hold-out; None for each if there are no hold-out prompts.

    scores: (P, K). frozen: (P, H), features for the nearest-neighbour baseline.
    """
    rewards, errors = grid.rewards, grid.errors
    names = ("router", "static", "random", "neighbours", "oracle")
    if not is_holdout.any():
        return dict.fromkeys(names)
    learn = ~is_holdout & ~np.isnan(rewards).all(axis=1)
    near = strategies.neighbours(frozen[learn], rewards[learn], frozen[is_holdout])
    return {
        **routing_metrics.compare(
            scores[is_holdout],
            rewards[is_holdout],
            rewards[~is_holdout],
            preferences=preferences,
            errors=None if errors is None else errors[is_holdout],
        ),
        "neighbours": routing_metrics.evaluate(np.nan_to_num(near, nan=-np.inf), rewards[is_holdout]),
    }
