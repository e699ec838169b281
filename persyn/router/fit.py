"""The engine that fits a router to a calibration grid, measures it on the hold-out and writes its checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from persyn.llm import options, scoring
from persyn.llm.batched import Batched
from persyn.llm.protocols import Engine, Failed, Fit, Fitted, ModelSpec, Request, Result, Tick
from persyn.method import rewards as reward_matrix
from persyn.method import routing_metrics
from persyn.method.rewards import Indices, Matrix
from persyn.router import checkpoint, encoders, inputs, model
from persyn.router.checkpoint import CheckpointManifest
from persyn.router.kinds import choice
from persyn.router.kinds.base import Examples, Predictor, Prompts
from persyn.router.kinds.crossfit import Bench, one_thread
from persyn.router.kinds.registry import ROUTERS
from persyn.router.model import Reader
from persyn.router.train import TUNES, RouterExamples
from persyn.router.tuning import Tuned, Tuning


def load(spec: ModelSpec, tick: Tick) -> Engine:
    """Check the backbone's version, if the spec has one; each `Fit` reads what is not cached with the original weights.

    Options: `options.RouterFitOptions`. Raises `UsageError` when the backbone is not the version the spec refers to.
    """
    chosen = options.decode(spec, options.RouterFitOptions)
    model.refuse_several_gpus(spec)
    if spec.model:
        encoders.verified(spec)

    def compute(requests: list[Request]) -> Iterator[list[Result]]:
        for request in requests:
            assert isinstance(request, Fit)
            reason = _refusal(request)
            yield [Failed(request.id, reason) if reason else _GridFit(request, spec, chosen, tick).run()]

    return Batched(compute, version=scoring.VERSION, chunk=1)


def _refusal(request: Fit) -> str | None:
    """Why a grid cannot be fitted, or None."""
    errors = request.rewards if request.errors is None else request.errors
    lengths = {len(request.conversations), len(request.rewards), len(request.is_holdout), len(errors)}
    lengths |= {len(labels) for labels in request.labels.values()}
    if len(lengths) > 1 or {len(row) for row in [*request.rewards, *errors]} != {len(request.teachers)}:
        return (
            f"malformed: expected a row of {len(request.teachers)} rewards, a flag and the labels of each conversation"
        )
    if request.tune not in ("auto", *TUNES):
        return f"unknown_tune: {request.tune!r}; available: auto, {', '.join(TUNES)}"
    if request.kind not in (inputs.AUTO, *ROUTERS):
        return f"unknown_kind: {request.kind!r}; available: {inputs.AUTO}, {', '.join(ROUTERS)}"
    return _too_little(request)


def _too_little(request: Fit) -> str | None:
    """Why the rewards say too little about the teachers, or None."""
    calibration = np.array(request.rewards, dtype=np.float64)[~np.array(request.is_holdout)]
    if not len(reward_matrix.preferences(calibration)[0]):
        return f"no_preferences: none of {len(calibration)} calibration prompts has two teachers of distinct reward"
    unmeasured = np.isnan(calibration).all(axis=0)
    if unmeasured.any():
        names = ", ".join(name for name, is_missing in zip(request.teachers, unmeasured, strict=True) if is_missing)
        return f"unmeasured_teachers: no calibration prompt has a reward of {names}"
    return None


@dataclass(frozen=True, slots=True)
class _Learned:
    """A router on frozen encoders.

    out_of_fold: (C, K) scores of the calibration prompts by routers fitted without them.
    scale: the factor that makes its scores log-odds, see `choice.log_odds_scale`. notes: on the choice.
    """

    kind: str
    predictor: Predictor
    out_of_fold: Matrix
    scale: float
    notes: dict[str, Any]


class _GridFit:
    """One `Fit`: its grid as arrays, and the steps in order."""

    def __init__(self, request: Fit, spec: ModelSpec, chosen: options.RouterFitOptions, tick: Tick) -> None:
        self._request, self._spec, self._chosen, self._tick = request, spec, chosen, tick
        self._read = encoders.of_fit(spec, request, Path())
        self._started = time.monotonic()
        errors = None if request.errors is None else np.array(request.errors, np.float64)
        rewards = np.array(request.rewards, np.float64)
        self._examples = Examples(rewards, errors, request.preferences, request.seed)
        self._is_holdout = np.array(request.is_holdout, dtype=np.bool_)
        self._calibration: Indices = np.flatnonzero(~self._is_holdout)

    def run(self) -> Fitted:
        """Fit, write the checkpoint, and measure what it routes."""
        prompts = self._read.read(self._request.conversations, self._request.labels, self._tick, keep=True)
        self._read.release()  # a GPU may not hold two models
        if self._request.tune in ("full", "lora"):
            work = self._tuning(prompts)
            return self._tuned(work, work.train(self._request.tune))
        learned = self._learn(prompts)
        if not self._may_tune(learned.kind):
            return self._frozen(learned, prompts, {})
        work = self._tuning(prompts)
        better = work.better()
        return self._tuned(work, better) if isinstance(better, Tuned) else self._frozen(learned, prompts, better)

    def _learn(self, prompts: Prompts) -> _Learned:
        """Fit the router, or the kind that cross-validation chooses, to the calibration prompts."""
        known, examples = prompts.take(self._calibration), self._examples.take(self._calibration)
        with one_thread():
            if self._request.kind == inputs.AUTO:
                kinds, is_weighed = list(ROUTERS.values()), self._request.is_weighed
                found = choice.choose(kinds, known, examples, is_weighed=is_weighed, tick=self._tick)
                notes = {"candidates": msgspec.to_builtins(found.candidates), "why": found.why}
                return _Learned(found.kind, found.predictor, found.scores, found.scale, notes)
            predictor, scores = Bench(known, examples, self._tick).fitted(ROUTERS[self._request.kind])
        return _Learned(self._request.kind, predictor, scores, choice.log_odds_scale(scores, examples), {})

    def _may_tune(self, kind: str) -> bool:
        """Whether full tuning is compared with this router: it reads nothing but the backbone.

        For a kind that was chosen, only on a GPU. Not where scores are weighed: a tuned router has no cross-fitted ones
        to measure.
        """
        request = self._request
        reads_text_alone = request.encoders == ["backbone"] and not request.labels
        is_wanted = request.kind == "head" or bool(self._spec.gpus)
        return kind == "head" and request.tune == "auto" and reads_text_alone and is_wanted and not request.is_weighed

    def _tuning(self, prompts: Prompts) -> Tuning:
        reader = self._reader
        pairs, _, _ = reward_matrix.preferences(self._examples.rewards[self._calibration])
        ids = [reader.ids(messages) for messages in self._request.conversations]
        return Tuning(
            self._request,
            self._spec,
            self._chosen,
            RouterExamples(ids, self._examples.rewards, self._examples.errors),
            self._calibration[np.unique(pairs)].tolist(),
            torch.from_numpy(prompts.states["backbone"]),
            self._tick,
        )

    @property
    def _reader(self) -> Reader:
        assert self._read.backbone is not None
        return self._read.backbone.reader

    def _tuned(self, work: Tuning, tuned: Tuned) -> Fitted:
        manifest = self._manifest("head", tuned.tune)
        folder = Path(self._request.folder)
        sha256 = checkpoint.write_tuned(folder, tuned.router, manifest, self._reader.tokenizer)
        checkpoint.merge(tuned.router)
        return self._fitted(sha256, manifest, work.scores(tuned), tuned.notes)

    def _frozen(self, learned: _Learned, prompts: Prompts, notes: dict[str, Any]) -> Fitted:
        manifest = msgspec.structs.replace(self._manifest(learned.kind, "head"), scale=learned.scale)
        sha256 = checkpoint.write(Path(self._request.folder), learned.predictor, manifest)
        notes = {"settings": dict(learned.predictor.settings), **learned.notes, **notes}
        fitted = self._fitted(sha256, manifest, learned.scale * learned.predictor.scores(prompts), notes)
        out_of_fold = dict(zip(self._calibration.tolist(), (learned.scale * learned.out_of_fold).tolist(), strict=True))
        rows = [out_of_fold.get(row) for row in range(len(self._is_holdout))]
        return msgspec.structs.replace(fitted, cross_fitted=rows)

    def _manifest(self, kind: str, tune: str) -> CheckpointManifest:
        read = inputs.needed(kind, self._request.encoders)
        backbone = self._read.backbone if "backbone" in read else None
        embedding = self._read.embedding if "embedding" in read else None
        return CheckpointManifest(
            backbone=_absolute(backbone.spec.model) if backbone else "",
            revision=backbone.version if backbone else None,
            tune=tune,
            teachers=self._request.teachers,
            max_tokens=backbone.reader.max_tokens if backbone else self._chosen.max_tokens,
            add_bos=self._chosen.add_bos,
            versions={name: version(name) for name in ("persyn", "torch", "transformers", "scikit-learn")},
            kind=kind,
            encoders=read,
            features=list(self._request.labels) if "fields" in ROUTERS[kind].reads else [],
            embedding=_absolute(embedding.spec.model) if embedding else "",
            embedding_version=embedding.version if embedding else None,
        )

    def _fitted(self, sha256: str, manifest: CheckpointManifest, scores: Matrix, notes: dict[str, Any]) -> Fitted:
        said = msgspec.to_builtins(manifest)
        names = ("kind", "tune", "encoders", "features", "embedding", "embedding_version", "versions")
        metrics = {
            **_measure(scores, self._examples, self._is_holdout),
            "n_calibration": len(self._calibration),
            "n_holdout": int(self._is_holdout.sum()),
            "n_pairs": len(reward_matrix.preferences(self._examples.rewards[self._calibration])[0]),
            "preferences": self._examples.preferences,
            "seconds": time.monotonic() - self._started,
            **{name: said[name] for name in names},
            **notes,
        }
        return Fitted(self._request.id, self._request.folder, sha256, metrics, scores.tolist())


def _absolute(name: str) -> str:
    folder = Path(name)
    return str(folder.absolute()) if folder.is_dir() else name


def _measure(scores: Matrix, grid: Examples, is_holdout: NDArray[np.bool_]) -> dict[str, Any]:
    """Metrics of the router and its baselines on the hold-out; None for each if there are no hold-out prompts.

    scores: (P, K).
    """
    if not is_holdout.any():
        return dict.fromkeys(("router", "static", "random", "oracle"))
    return routing_metrics.compare(
        scores[is_holdout],
        grid.rewards[is_holdout],
        grid.rewards[~is_holdout],
        preferences=grid.preferences,
        errors=None if grid.errors is None else grid.errors[is_holdout],
    )
