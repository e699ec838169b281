"""The engine that fits a router to a calibration grid, measures it on the hold-out and writes its checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from msgspec import Meta
from torch import Tensor

from persyn import rewards as reward_matrix
from persyn.llm import options, scoring
from persyn.llm.batched import Batched
from persyn.llm.chat import Chat, load_tokenizer
from persyn.llm.identity import identify
from persyn.llm.protocols import Engine, Failed, Fit, Fitted, ModelSpec, Request, Result, Tick
from persyn.rewards import Matrix
from persyn.router import checkpoint, evaluate, features, model
from persyn.router.checkpoint import Manifest
from persyn.router.model import Dtype, Reader, Router
from persyn.router.train import TUNES, Examples, Plan, train

_AtLeastOne = Annotated[int, Meta(ge=1)]


class Options(scoring.Options, frozen=True, forbid_unknown_fields=True):
    """The options of a `router_fit`; its model is the backbone. The last four are for fine-tuning."""

    #: Of weights and computation; none: bfloat16 on a GPU, and float32 on the CPU. `full` trains in float32.
    dtype: Dtype | None = None
    #: Tokens of a prompt; longer ones lose their middle. Less where the backbone's context is smaller.
    max_tokens: _AtLeastOne = 1024
    #: `full` and `lora`: the most passes over the calibration prompts.
    epochs: _AtLeastOne = 3
    #: How far a step goes; none: 1e-5 for `full`, 1e-4 for `lora`.
    learning_rate: Annotated[float, Meta(gt=0)] | None = None
    #: `full` and `lora`: prompts per step.
    batch_size: _AtLeastOne = 16
    #: `lora`: the rank of the adapters.
    lora_rank: _AtLeastOne = 16


def load(spec: ModelSpec, tick: Tick) -> Engine:
    """Load a backbone's tokenizer; each `Fit` begins with the backbone's own weights. Options: `Options`."""
    chosen = options.decode(spec, Options)
    model.refuse_several_gpus(spec)
    chat = Chat(load_tokenizer(spec), add_bos=chosen.add_bos)

    def compute(requests: list[Request]) -> Iterator[list[Result]]:
        for request in requests:
            assert isinstance(request, Fit)
            reason = _refusal(request)
            yield [Failed(request.id, reason) if reason else _fit(request, spec, chosen, chat, tick)]

    return Batched(compute, version=scoring.VERSION, chunk=1)


def reader(chat: Chat, chosen: Options, config: Any) -> Reader:
    """How prompts are read, within the context of the backbone with this configuration."""
    return Reader(chat, min(chosen.max_tokens, scoring.max_tokens(config) or chosen.max_tokens))


def _refusal(request: Fit) -> str | None:
    """Why a grid cannot be fitted, or None."""
    lengths = {len(request.conversations), len(request.rewards), len(request.is_holdout)}
    if len(lengths) > 1 or {len(row) for row in request.rewards} != {len(request.teachers)}:
        return f"malformed: a row of {len(request.teachers)} rewards and a flag are wanted for each conversation"
    if request.tune not in TUNES:
        return f"unknown_tune: {request.tune!r}; there are {', '.join(TUNES)}"
    calibration = np.array(request.rewards, dtype=np.float64)[~np.array(request.is_holdout)]
    if not len(reward_matrix.preferences(calibration)[0]):
        return f"no_preferences: none of {len(calibration)} calibration prompts has two teachers of distinct reward"
    unmeasured = np.isnan(calibration).all(axis=0)
    if unmeasured.any():
        names = ", ".join(name for name, is_missing in zip(request.teachers, unmeasured, strict=True) if is_missing)
        return f"unmeasured_teachers: no calibration prompt has a reward of {names}"
    return None


def _fit(request: Fit, spec: ModelSpec, chosen: Options, chat: Chat, tick: Tick) -> Fitted:
    started = time.monotonic()
    router = _load_router(request, spec, chosen)
    tick()
    read = reader(chat, chosen, router.backbone.config)
    prompts = [read.ids(messages) for messages in request.conversations]
    grid = Examples(prompts, np.array(request.rewards, dtype=np.float64))
    is_holdout = np.array(request.is_holdout, dtype=np.bool_)
    calibration = np.flatnonzero(~is_holdout)
    plan = _plan(request, spec, chosen)
    router.requires_grad_(False)
    frozen = features.remembered(
        features.folder(
            Path(), spec.model, identify(spec.model, spec.revision).revision, str(router.backbone.dtype), router.reads
        ),
        prompts,
        lambda new: model.all_features(router, new, plan.batch_tokens, tick),
    )

    pairs, _, _ = reward_matrix.preferences(grid.rewards[calibration])
    learn = calibration[np.unique(pairs)].tolist()
    notes = train(router, grid.take(learn), frozen[learn], plan, tick)
    router.backbone.to(getattr(torch, model.precision(spec, chosen.dtype)))
    manifest = _manifest(request, spec, chosen, router, read)
    sha256 = checkpoint.write(Path(request.folder), router, manifest, chat.tokenizer)
    checkpoint.merge(router)
    final = frozen if request.tune == "head" else model.all_features(router, prompts, plan.batch_tokens, tick)
    scores = _scores(router, final)
    metrics = {
        **_measure(scores[is_holdout], grid.rewards[is_holdout], grid.rewards[calibration], request.preferences),
        "n_calibration": len(calibration),
        "n_holdout": int(is_holdout.sum()),
        "n_pairs": len(pairs),
        "tune": request.tune,
        "preferences": request.preferences,
        "seconds": time.monotonic() - started,
        "versions": manifest.versions,
        **notes,
    }
    return Fitted(request.id, request.folder, sha256, metrics, scores.tolist())


def dtype(request: Fit, spec: ModelSpec, chosen: Options) -> Dtype:
    """In what the backbone is held while it is fitted."""
    return "float32" if request.tune == "full" else model.precision(spec, chosen.dtype)


def _load_router(request: Fit, spec: ModelSpec, chosen: Options) -> Router:
    # All weights are trained in float32, on a GPU under bfloat16 autocast: bfloat16 would round small steps away.
    return model.load(spec, dtype(request, spec, chosen), len(request.teachers), model.reads_of(request.tune))


def _plan(request: Fit, spec: ModelSpec, chosen: Options) -> Plan:
    return Plan(
        tune=request.tune,
        preferences=request.preferences,
        seed=request.seed,
        batch_tokens=scoring.batch_tokens(spec, chosen),
        epochs=chosen.epochs,
        learning_rate=chosen.learning_rate or {"lora": 1e-4}.get(request.tune, 1e-5),
        batch_size=chosen.batch_size,
        lora_rank=chosen.lora_rank,
    )


def _manifest(request: Fit, spec: ModelSpec, chosen: Options, router: Router, reader: Reader) -> Manifest:
    folder = Path(spec.model)
    commit: str | None = getattr(router.backbone.config, "_commit_hash", None)
    return Manifest(
        backbone=str(folder.absolute()) if folder.is_dir() else spec.model,
        revision=spec.revision or commit,
        tune=request.tune,
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
