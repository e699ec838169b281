"""The engine that fits a router to a calibration grid, measures it on the hold-out and writes its checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from msgspec import Meta
from numpy.typing import NDArray
from torch import Tensor

from persyn import rewards as reward_matrix
from persyn.llm import options, scoring
from persyn.llm.batched import Batched
from persyn.llm.chat import Chat, load_tokenizer
from persyn.llm.identity import identify
from persyn.llm.options import Dtype
from persyn.llm.protocols import Engine, Failed, Fit, Fitted, ModelSpec, Request, Result, Tick
from persyn.rewards import Matrix
from persyn.router import checkpoint, evaluate, features, head, model
from persyn.router.checkpoint import Manifest
from persyn.router.model import Reader, Router
from persyn.router.train import TUNES, Examples, Plan, split, train

_AtLeastOne = Annotated[int, Meta(ge=1)]


def load(spec: ModelSpec, tick: Tick) -> Engine:
    """Load a backbone's tokenizer; each `Fit` begins with the backbone's own weights. Options: `options.RouterFit`."""
    chosen = options.decode(spec, options.RouterFit)
    model.refuse_several_gpus(spec)
    chat = Chat(load_tokenizer(spec), add_bos=chosen.add_bos)

    def compute(requests: list[Request]) -> Iterator[list[Result]]:
        for request in requests:
            assert isinstance(request, Fit)
            reason = _refusal(request)
            yield [Failed(request.id, reason) if reason else _fit(request, spec, chosen, chat, tick)]

    return Batched(compute, version=scoring.VERSION, chunk=1)


def reader(chat: Chat, chosen: options.RouterFit, config: Any) -> Reader:
    """How prompts are read, within the context of the backbone with this configuration."""
    return Reader(chat, min(chosen.max_tokens, scoring.max_tokens(config) or chosen.max_tokens))


def _refusal(request: Fit) -> str | None:
    """Why a grid cannot be fitted, or None."""
    lengths = {len(request.conversations), len(request.rewards), len(request.is_holdout)}
    if len(lengths) > 1 or {len(row) for row in request.rewards} != {len(request.teachers)}:
        return f"malformed: a row of {len(request.teachers)} rewards and a flag are wanted for each conversation"
    if request.tune not in ("auto", *TUNES):
        return f"unknown_tune: {request.tune!r}; there are auto, {', '.join(TUNES)}"
    calibration = np.array(request.rewards, dtype=np.float64)[~np.array(request.is_holdout)]
    if not len(reward_matrix.preferences(calibration)[0]):
        return f"no_preferences: none of {len(calibration)} calibration prompts has two teachers of distinct reward"
    unmeasured = np.isnan(calibration).all(axis=0)
    if unmeasured.any():
        names = ", ".join(name for name, is_missing in zip(request.teachers, unmeasured, strict=True) if is_missing)
        return f"unmeasured_teachers: no calibration prompt has a reward of {names}"
    return None


def _fit(request: Fit, spec: ModelSpec, chosen: options.RouterFit, chat: Chat, tick: Tick) -> Fitted:
    started = time.monotonic()
    read = reader(chat, chosen, scoring.configuration(spec))
    grid = Examples([read.ids(messages) for messages in request.conversations], np.array(request.rewards, np.float64))
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
        **_measure(scores[is_holdout], grid.rewards[is_holdout], grid.rewards[calibration], request.preferences),
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


@dataclass(frozen=True, slots=True)
class _Trained:
    """A router that was trained in one way.

    frozen: (P, H) features of the grid's prompts, before the backbone was trained.
    """

    router: Router
    tune: str
    frozen: Tensor
    notes: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Work:
    """A fit, and what is read of it once, whichever way it is trained.

    learn: the calibration prompts that have a preference.
    """

    request: Fit
    spec: ModelSpec
    chosen: options.RouterFit
    grid: Examples
    learn: list[int]
    tick: Tick

    @property
    def batch_tokens(self) -> int:
        return scoring.batch_tokens(self.spec, self.chosen)

    def train(self, tune: str) -> _Trained:
        """The backbone's own weights, trained in a way of `TUNES`."""
        router, frozen = self._read(tune)
        notes = train(router, self.grid.take(self.learn), frozen[self.learn], self._plan(tune), self.tick)
        return _Trained(router, tune, frozen, notes)

    def better(self) -> _Trained:
        """The backbone tuned in full, if that is better than a head on its frozen states; else that head.

        Both learn without the validation prompts and are asked these; the fuller one has to be better than chance
        could make it.
        """
        learn, validate = (np.array(self.learn)[part] for part in split(len(self.learn), self.request.seed))
        frozen = self._read("head")[1]
        simple = head.fit(
            frozen[learn],
            self.grid.rewards[learn],
            preferences=self.request.preferences,
            seed=self.request.seed,
            tick=self.tick,
        )
        by_head = self._losses(frozen[validate].double() @ simple.weight.T + simple.bias, validate)
        taken = self.train("full")
        prompts = self.grid.take(validate.tolist()).prompts
        tuned = model.all_features(taken.router, prompts, self.batch_tokens, self.tick)
        by_full = self._losses(torch.from_numpy(_scores(taken.router, tuned)), validate)
        notes = {**taken.notes, "loss_head": by_head.mean().item(), "loss_full": by_full.mean().item()}
        if head.is_within_error(by_head - by_full):
            del taken  # before another backbone is loaded: a GPU may have no room for two
            taken = self.train("head")
        return replace(taken, notes={**notes, **taken.notes})

    def _read(self, tune: str) -> tuple[Router, Tensor]:
        """A router that nobody has trained, and what its backbone makes of the grid's prompts."""
        place = dtype(tune, self.spec, self.chosen)
        router = model.load(self.spec, place, len(self.request.teachers), model.reads_of(tune)).requires_grad_(False)
        self.tick()
        revision = identify(self.spec.model, self.spec.revision).revision
        frozen = features.remembered(
            features.folder(Path(), self.spec.model, revision, str(router.backbone.dtype), router.reads),
            self.grid.prompts,
            lambda new: model.all_features(router, new, self.batch_tokens, self.tick),
        )
        return router, frozen

    def _losses(self, scores: Tensor, prompts: NDArray[np.intp]) -> Tensor:
        """(Q,) losses of the scores (Q, K) of Q prompts, each over its preferences."""
        weights = model.preference_weights(torch.from_numpy(self.grid.rewards[prompts]), self.request.preferences)
        return model.prompt_losses(scores, weights)

    def _plan(self, tune: str) -> Plan:
        return Plan(
            tune=tune,
            preferences=self.request.preferences,
            seed=self.request.seed,
            batch_tokens=self.batch_tokens,
            epochs=self.chosen.epochs,
            learning_rate=self.chosen.learning_rate or {"lora": 1e-4}.get(tune, 1e-5),
            batch_size=self.chosen.batch_size,
            lora_rank=self.chosen.lora_rank,
        )


def dtype(tune: str, spec: ModelSpec, chosen: options.RouterFit) -> Dtype:
    """In what the backbone is held while a router is fitted to it.

    All weights are trained in float32, on a GPU under bfloat16 autocast: bfloat16 would round small steps away.
    """
    return "float32" if tune == "full" else model.precision(spec, chosen.dtype)


def _manifest(
    request: Fit, tune: str, spec: ModelSpec, chosen: options.RouterFit, router: Router, reader: Reader
) -> Manifest:
    folder = Path(spec.model)
    commit: str | None = getattr(router.backbone.config, "_commit_hash", None)
    return Manifest(
        backbone=str(folder.absolute()) if folder.is_dir() else spec.model,
        revision=spec.revision or commit,
        tune=tune,
        teachers=request.teachers,
        max_tokens=reader.max_tokens,
        add_bos=chosen.add_bos,
        versions={name: version(name) for name in ("persyn", "torch", "transformers")},
        reads=router.reads,
    )


def _scores(router: Router, features: Tensor) -> Matrix:
    """(P, K) of all prompts of the grid."""
    with torch.no_grad():
        scores: Matrix = router.score(features.to(router.head.weight.device)).cpu().double().numpy()
    return scores


def _measure(scores: Matrix, rewards: Matrix, calibration: Matrix, preferences: str) -> dict[str, Any]:
    """The router's metrics on the hold-out and its baselines', or None for each without a hold-out prompt."""
    if not len(rewards):
        return {"router": None, "static": None, "random": None}
    return evaluate.compare(scores, rewards, calibration, preferences=preferences)
