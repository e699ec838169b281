"""Read prompts as routers do: states of a frozen backbone, sentence embeddings, texts and labels.

States are cached by model and prompt, and a model is loaded when a state is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
from torch import Tensor

from persyn.llm import options, scoring
from persyn.llm.chat import Chat, load_tokenizer
from persyn.llm.identity import Identify, hub_revision, identify, identify_embedding, require_unchanged
from persyn.llm.options import Dtype
from persyn.llm.protocols import Fit, Message, ModelSpec, Tick
from persyn.router import features, inputs, model, sentence_model
from persyn.router.checkpoint import CheckpointManifest
from persyn.router.inputs import text_of
from persyn.router.kinds.base import Prompts, quietly
from persyn.router.model import Reader, Reads, precision
from persyn.router.sentence_model import SentenceModel

Conversations = Sequence[Sequence[Message]]

#: What a head on a frozen backbone reads.
FROZEN: Reads = "middle"


class StateEncoder(Protocol):
    """Computes a vector for each prompt."""

    def states(self, conversations: Conversations, tick: Tick, *, keep: bool) -> Tensor:
        """(P, H) float32 states, on the CPU, those that are cached from there; keep: whether to cache the others."""

    def release(self) -> None:
        """Free the model's memory, if it was loaded."""


@dataclass(eq=False)
class BackboneEncoder:
    """Mean states of the middle layer of a language model.

    spec:    with a hub revision, or None for a folder. version: identifies the weights.
    limit:   tokens of a prompt that are read, at most; fewer if the model's context is smaller.
    home:    where states are cached.
    """

    spec: ModelSpec
    version: str | None
    dtype: Dtype
    limit: int
    add_bos: bool | None
    batch_tokens: int
    home: Path

    @cached_property
    def reader(self) -> Reader:
        """Its tokenizer, without its weights."""
        context = scoring.max_tokens(scoring.configuration(self.spec)) or self.limit
        return Reader(Chat(load_tokenizer(self.spec), add_bos=self.add_bos), min(self.limit, context))

    def states(self, conversations: Conversations, tick: Tick, *, keep: bool) -> Tensor:
        """See `StateEncoder`; `EngineError` when the model cannot be loaded."""
        return features.cached(
            features.folder(self.home, self.spec.model, self.version, f"torch.{self.dtype}", FROZEN),
            [self.reader.ids(messages) for messages in conversations],
            lambda new: model.all_features(self._model, new, self.batch_tokens, tick),
            keep=keep,
        )

    def release(self) -> None:
        """See `StateEncoder`."""
        self.__dict__.pop("_model", None)

    @cached_property
    def _model(self) -> model.RouterModel:
        return model.load(self.spec, self.dtype, 1, FROZEN).requires_grad_(False)


@dataclass(eq=False)
class EmbeddingEncoder:
    """The vectors of a sentence-embedding model, in float32; the fields are those of `BackboneEncoder`."""

    spec: ModelSpec
    version: str | None
    home: Path

    def states(self, conversations: Conversations, tick: Tick, *, keep: bool) -> Tensor:
        """See `StateEncoder`; `EngineError` when the model cannot be loaded."""
        return features.cached(
            features.folder(self.home, self.spec.model, self.version, "torch.float32", "embedding"),
            [text_of(messages) for messages in conversations],
            lambda new: self._model.vectors(new, tick),
            keep=keep,
        )

    def release(self) -> None:
        """See `StateEncoder`."""
        self.__dict__.pop("_model", None)

    @cached_property
    def _model(self) -> SentenceModel:
        return sentence_model.load(self.spec)


@dataclass(frozen=True, slots=True, eq=False)
class Encoders:
    """Everything that a router reads of a prompt; None for what it does not read."""

    backbone: BackboneEncoder | None
    embedding: EmbeddingEncoder | None
    reads_texts: bool
    fields: Sequence[str]

    def read(
        self,
        conversations: Conversations,
        labels: Mapping[str, Sequence[str | None]],
        tick: Tick = quietly,
        *,
        keep: bool,
    ) -> Prompts:
        """Read P prompts; labels: (P,) of each field. keep: whether to cache states that are not cached yet."""
        given: dict[str, StateEncoder | None] = {"backbone": self.backbone, "embedding": self.embedding}
        found = {name: each.states(conversations, tick, keep=keep) for name, each in given.items() if each}
        # A router that reads nothing still has to know how many prompts there are.
        needs_texts = self.reads_texts or not (found or self.fields)
        return Prompts(
            {name: np.asarray(states.double().numpy()) for name, states in found.items()},
            [text_of(messages) for messages in conversations] if needs_texts else (),
            {name: labels[name] for name in self.fields},
        )

    def release(self) -> None:
        """Free the memory of the models."""
        for each in (self.backbone, self.embedding):
            if each is not None:
                each.release()


def of_fit(spec: ModelSpec, request: Fit, home: Path) -> Encoders:
    """What a fit reads; `UsageError` when a model is not the version that the fit refers to.

    spec: of a `router_fit` engine, as in the run; its model is read if the kind needs it.
    home: where states are cached.
    """
    chosen = options.decode(spec, options.RouterFitOptions)
    read = inputs.needed(request.kind, request.encoders)
    return Encoders(
        _backbone(spec, chosen, home) if "backbone" in read else None,
        _embedding(spec, request.embedding, request.embedding_version, home) if "embedding" in read else None,
        "tfidf" in read,
        list(request.labels),
    )


def of_checkpoint(spec: ModelSpec, manifest: CheckpointManifest, chosen: options.RouteOptions, home: Path) -> Encoders:
    """What the router of a checkpoint reads; `UsageError` when a model has changed since the fit."""
    reading = options.RouterFitOptions(
        dtype=chosen.dtype,
        batch_tokens=chosen.batch_tokens,
        max_tokens=manifest.max_tokens,
        add_bos=manifest.add_bos,
    )
    backbone = ModelSpec(spec.engine, manifest.backbone, manifest.revision, spec.gpus)
    return Encoders(
        _backbone(backbone, reading, home) if manifest.backbone else None,
        _embedding(spec, manifest.embedding, manifest.embedding_version, home) if manifest.embedding else None,
        "tfidf" in manifest.encoders,
        manifest.features,
    )


def verified(spec: ModelSpec, identified_by: Identify = identify) -> ModelSpec:
    """Return a spec for loading weights: a folder's digest is verified and removed. `UsageError` on a mismatch."""
    if hub_revision(spec.revision) != spec.revision:
        require_unchanged(spec.model, spec.revision, identified_by)
    return msgspec.structs.replace(spec, revision=hub_revision(spec.revision))


def _backbone(spec: ModelSpec, chosen: options.RouterFitOptions, home: Path) -> BackboneEncoder:
    spec = verified(spec)
    return BackboneEncoder(
        spec,
        identify(spec.model, spec.revision).revision,
        precision(spec, chosen.dtype),
        chosen.max_tokens,
        chosen.add_bos,
        scoring.batch_tokens(spec, chosen),
        home,
    )


def _embedding(spec: ModelSpec, name: str, version: str | None, home: Path) -> EmbeddingEncoder:
    found = verified(ModelSpec(spec.engine, name, version, spec.gpus), identify_embedding)
    return EmbeddingEncoder(found, identify_embedding(name, found.revision).revision, home)
