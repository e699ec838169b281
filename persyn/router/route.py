"""The engine that scores every teacher for a prompt: one forward pass, no LM head."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from persyn.errors import HostLacks
from persyn.llm import options, scoring
from persyn.llm.batched import Batched
from persyn.llm.protocols import Engine, ModelSpec, Request, Result, Route, Routed, Tick
from persyn.router import checkpoint
from persyn.router.model import Reader, RouterModel, batches, pad, precision, refuse_several_gpus

#: Prompts taken at once and sorted by length.
_CHUNK = 512


def load(spec: ModelSpec, tick: Tick) -> Engine:
    """Load a checkpoint that answers `Route`; `HostLacks` when it is missing, invalid or not the requested one.

    No prompt fails: a long one loses its middle, and one that the chat template rejects is read as plain text.
    """
    chosen = options.decode(spec, options.RouteOptions)
    refuse_several_gpus(spec)
    if chosen.sha256 is not None and (found := checkpoint.sha256(Path(spec.model))) != chosen.sha256:
        raise HostLacks(
            f"the router in {spec.model!r} is missing or has changed (sha256 {found}, not {chosen.sha256}): "
            "restore the folder, or start a run with another seed, which fits a new router"
        )
    tick()
    router, reader = checkpoint.read(spec, precision(spec, chosen.dtype))
    batch_tokens = scoring.batch_tokens(spec, options.ScorerOptions(batch_tokens=chosen.batch_tokens))

    def compute(requests: list[Request]) -> Iterator[list[Result]]:
        return _compute(router, reader, requests, batch_tokens)

    return Batched(compute, version=scoring.VERSION, chunk=_CHUNK)


def _compute(router: RouterModel, reader: Reader, requests: list[Request], batch_tokens: int) -> Iterator[list[Result]]:
    """Yield the scores of each batch."""
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
