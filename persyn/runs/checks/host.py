"""Check that this host can load a run's models: GPUs, memory, adapters, programs, and vLLM's arguments."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from persyn.config import RunConfig
from persyn.errors import EngineError
from persyn.llm import adapters, gpus, loading
from persyn.llm.engines import ENGINES
from persyn.llm.protocols import Finding
from persyn.runs.checks import engine_arguments, memory, models
from persyn.runs.checks.models import UsedModel

#: Device files of GPU drivers: NVIDIA, AMD, Windows (WSL).
_DEVICES = ("nvidia[0-9]*", "kfd", "dxg")


def check(config: RunConfig) -> Iterator[tuple[str, Finding]]:
    """Yield (whose, finding) for each problem of this host with a run that it works alone."""
    for scorer in config.scorers:
        lacks = ENGINES[scorer.kind].lacks
        if lacks is not None and (lack := lacks(scorer.options)):
            yield f"quality {scorer.kind}", Finding("error", "load", lack)
    loaded = models.loaded(config)
    if not loaded:
        return
    seen = n_gpus() if any(model.spec.gpus for model in loaded) else len(_shown())
    for model in loaded:
        if model.spec.gpus > seen:
            yield model.whose, Finding("error", "gpus", _absent(model, seen))
        elif (found := memory.check(model)) is not None:
            yield model.whose, found
    yield from engine_arguments.check(loaded)
    yield from _parts(loaded)
    yield from on_cpu(config, seen)


def _parts(loaded: Sequence[UsedModel]) -> Iterator[tuple[str, Finding]]:
    """Yield (whose, finding) for each adapter that does not fit its model, and each server that is not here."""
    for model in loaded:
        spec = model.spec
        try:
            if ENGINES[spec.engine].starts_server:
                loading.require_program(spec.options["command"][0])
            for adapter in adapters.find(spec).values():
                yield model.whose, adapters.look_over(adapter, spec.model)
        except EngineError as error:
            yield model.whose, Finding("error", "load", str(error))


def on_cpu(config: RunConfig, seen: int | None = None) -> Iterator[tuple[str, Finding]]:
    """Yield (whose, finding) for each model that would run on the CPU although the host has GPUs.

    seen: the number of GPUs; None detects it.
    """
    seen = len(_shown()) if seen is None else seen
    for model in models.loaded(config) if seen else ():
        if not model.spec.gpus:
            message = (
                f"{model.spec.model!r} runs on the CPU, but {_many(seen)} visible: set gpus = 1 in [{model.table}]"
            )
            yield model.whose, Finding("warning", "gpus", message)


def n_gpus() -> int:
    """The number of visible GPUs; asks torch only where `nvidia-smi` finds none but a GPU driver is present."""
    if shown := _shown():
        return len(shown)
    if not any(device for pattern in _DEVICES for device in Path("/dev").glob(pattern)):
        return 0
    import torch

    return torch.cuda.device_count()


def _shown() -> list[str]:
    ids = gpus.ids()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return ids
    return [device for device in visible.split(",") if device.strip() and device.strip() != "-1"][: len(ids)]


def _absent(model: UsedModel, seen: int) -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    narrowed = f" (CUDA_VISIBLE_DEVICES is {visible!r})" if visible is not None else ""
    return (
        f"{model.spec.model!r} requires gpus = {model.spec.gpus}, but {_many(seen)} visible{narrowed}; set gpus = "
        f"{seen} in [{model.table}], or work the run on a host that has the GPUs"
    )


def _many(seen: int) -> str:
    return "1 GPU is" if seen == 1 else f"{seen} GPUs are" if seen else "no GPU is"
