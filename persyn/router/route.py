"""The engine that scores every teacher for a prompt with a fitted router."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from persyn.errors import HostLacks
from persyn.llm import options, scoring
from persyn.llm.batched import Batched
from persyn.llm.protocols import Engine, ModelSpec, Request, Result, Route, Routed, Tick
from persyn.router import checkpoint, encoders
from persyn.router.encoders import Encoders
from persyn.router.kinds import files
from persyn.router.kinds.base import Predictor
from persyn.router.kinds.crossfit import one_thread
from persyn.router.model import Reader, RouterModel, batches, pad, precision, refuse_several_gpus

#: Prompts taken at once and sorted by length.
_CHUNK = 512
#: Prompts scored at once by a router on frozen encoders; few, because their results come together.
_FROZEN_CHUNK = 128


def load(spec: ModelSpec, tick: Tick) -> Engine:
    """Load a checkpoint that answers `Route`; `HostLacks` when it is missing, invalid or not the requested one.

    No prompt fails: a long one loses its middle, and one that the chat template rejects is read as plain text. The
    language models of frozen encoders are loaded for the first prompt whose states are not cached.
    """
    chosen = options.decode(spec, options.RouteOptions)
    refuse_several_gpus(spec)
    folder = Path(spec.model)
    if chosen.sha256 is not None and (found := checkpoint.sha256(folder)) != chosen.sha256:
        raise HostLacks(
            f"the router in {spec.model!r} is missing or has changed (sha256 {found}, not {chosen.sha256}): "
            "restore the folder, or start a run with another seed, which fits a new router"
        )
    manifest = checkpoint.read_manifest(folder)
    tick()
    if manifest.is_frozen:
        read, (_, predictor) = encoders.of_checkpoint(spec, manifest, chosen, Path()), files.read(folder)
        scaled = partial(_predict, read, predictor, manifest.scale, tick=tick)
        return Batched(scaled, version=scoring.VERSION, chunk=_FROZEN_CHUNK)
    router, reader = checkpoint.read_tuned(spec, manifest, precision(spec, chosen.dtype))
    batch_tokens = scoring.batch_tokens(spec, options.ScorerOptions(batch_tokens=chosen.batch_tokens))
    return Batched(lambda some: _compute(router, reader, some, batch_tokens), version=scoring.VERSION, chunk=_CHUNK)


def _predict(
    read: Encoders, predictor: Predictor, scale: float, requests: list[Request], *, tick: Tick
) -> Iterator[list[Result]]:
    """Yield the scores of all prompts, with explanations where they were requested."""
    routes = [request for request in requests if isinstance(request, Route)]
    labels = {name: [route.labels.get(name) for route in routes] for name in read.fields}
    # Not cached: a run has many times more prompts to route than to fit to.
    prompts = read.read([route.messages for route in routes], labels, tick, keep=False)
    with one_thread():
        scores = (scale * predictor.scores(prompts)).tolist()
        explained: list[list[dict[str, Any]]] = [[] for _ in routes]
        if any(route.explain for route in routes):
            explained = msgspec.to_builtins(predictor.explain(prompts))
    yield [
        Routed(route.id, row, said if route.explain else [])
        for route, row, said in zip(routes, scores, explained, strict=True)
    ]


def _compute(router: RouterModel, reader: Reader, requests: list[Request], batch_tokens: int) -> Iterator[list[Result]]:
    """Yield the scores of each batch by a language model with a head."""
    ids, prompts = [], []
    for request in requests:
        assert isinstance(request, Route)
        prompts.append(reader.ids(request.messages))
        ids.append(request.id)
    device = router.head.weight.device
    for batch in batches(prompts, batch_tokens):
        input_ids, lengths = pad([prompts[i] for i in batch])
        with torch.inference_mode():
            scores = router(input_ids.to(device), lengths.to(device)).tolist()
        yield [Routed(ids[i], row) for i, row in zip(batch, scores, strict=True)]
