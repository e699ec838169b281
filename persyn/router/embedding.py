"""A sentence-embedding model in the layout of sentence-transformers: a text in, a vector out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from persyn.errors import HostLacks
from persyn.llm import loading
from persyn.llm.identity import hub_revision, identify_embedding, require_unchanged
from persyn.llm.protocols import ModelSpec, Tick

#: The files that are read; pickled weights are not.
_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
_PICKLED, _WEIGHTS = "pytorch_model.bin", "model.safetensors"
#: Texts encoded between two ticks, and at once.
_CHUNK, _BATCH = 128, 32


def verified(spec: ModelSpec) -> tuple[ModelSpec, str | None]:
    """A spec for loading the weights, and their version; `UsageError` if a folder is not the one the spec refers to."""
    hub = hub_revision(spec.revision)
    if hub != spec.revision:  # a folder's digest
        require_unchanged(spec.model, spec.revision, identify_embedding)
    version = identify_embedding(spec.model, hub).revision
    return ModelSpec(spec.engine, spec.model, hub, spec.gpus), version


def load(spec: ModelSpec) -> Any:
    """Load a `SentenceTransformer`; `EngineError` when it cannot be loaded, or only by unpickling."""
    loading.require_gpus(spec)
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise HostLacks("an embedding needs sentence-transformers: pip install 'persyn[embedding]'") from error
    try:
        folder = _folder(spec)
        _refuse_pickles(folder)
        return SentenceTransformer(
            str(folder),
            device="cuda" if spec.gpus else "cpu",
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={"use_safetensors": True},
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, TypeError) as error:
        raise loading.explain(spec, error) from error


def vectors(model: Any, texts: Sequence[str], tick: Tick) -> Tensor:
    """(P, H) float32 embeddings of P texts, on the CPU; a text beyond the model's length loses its end."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    found: Tensor | None = None
    for start in range(0, len(order), _CHUNK):
        rows = order[start : start + _CHUNK]
        made = model.encode(
            [texts[i] for i in rows], batch_size=_BATCH, show_progress_bar=False, convert_to_tensor=True
        ).float()
        found = torch.empty(len(texts), made.shape[1]) if found is None else found
        found[rows] = made.cpu()
        tick()
    assert found is not None, "no text"
    return found


def _folder(spec: ModelSpec) -> Path:
    if Path(spec.model).is_dir():
        return Path(spec.model)
    from huggingface_hub import snapshot_download

    # Nested patterns too: "1_Pooling/config.json".
    return Path(snapshot_download(spec.model, revision=spec.revision, allow_patterns=list(_FILES)))


def _refuse_pickles(folder: Path) -> None:
    for path in folder.rglob(_PICKLED):
        if not path.with_name(_WEIGHTS).exists():
            raise HostLacks(
                f"{str(folder)!r} has {path.name} and no {_WEIGHTS}: pickled weights can run code and are not loaded; "
                "save the model as safetensors"
            )
