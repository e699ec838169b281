"""Cache the features that frozen models compute from prompts, so that a router is fitted in seconds.

Each model has a folder of safetensors files, each with the keys of its rows. Files are only ever
added, atomically; a prompt in two files has the same features in both.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_TENSOR, _KEYS = "features", "keys"

Prompt = TypeVar("Prompt", str, Sequence[int])


def folder(home: Path, model: str, revision: str | None, dtype: str, reads: str) -> Path:
    """The cache folder of a model.

    revision: identifies the model's weights. reads: which of its states are used.
    """
    digest = hashlib.sha256(json.dumps([model, revision, dtype, reads]).encode()).hexdigest()
    return home / "features" / digest[:16]


def cached(
    place: Path, prompts: Sequence[Prompt], compute: Callable[[Sequence[Prompt]], Tensor], *, keep: bool = True
) -> Tensor:
    """Return the features of P prompts, computing those that are missing.

    place:   a `folder`.
    prompts: token ids, or texts.
    compute: maps Q prompts, Q > 0, to their (Q, H) float32 features.
    keep:    whether to cache what was missing.
    returns: (P, H) float32 on the CPU.
    """
    keys = [_key(ids) for ids in prompts]
    kept = _read(place, set(keys))
    missing = {key: ids for key, ids in zip(keys, prompts, strict=True) if key not in kept}
    if missing:
        made = compute(list(missing.values()))
        if keep:
            _write(place, list(missing), made)
        kept |= dict(zip(missing, made, strict=True))
    return torch.stack([kept[key] for key in keys])


def _key(prompt: str | Sequence[int]) -> str:
    content = prompt.encode() if isinstance(prompt, str) else array("q", prompt).tobytes()
    return hashlib.sha256(content).hexdigest()[:32]


def _read(place: Path, wanted: set[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(place.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as piece:
                keys: list[str] = json.loads(piece.metadata()[_KEYS])
                rows = [row for row, key in enumerate(keys) if key in wanted]
                found |= {keys[row]: piece.get_slice(_TENSOR)[row] for row in rows}
        except OSError:
            continue  # possibly readable next time
        except (SafetensorError, ValueError, KeyError, TypeError):
            with contextlib.suppress(OSError):
                path.unlink()  # damaged: compute it again
    return found


def _write(place: Path, keys: Sequence[str], features: Tensor) -> None:
    """Cache the features; if the folder is not writable, they are computed again next time."""
    name = hashlib.sha256("".join(keys).encode()).hexdigest()[:16]
    unfinished = place / f"{name}.{uuid.uuid4().hex[:8]}.unfinished"
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
        save_file({_TENSOR: features.contiguous()}, unfinished, metadata={_KEYS: json.dumps(list(keys))})
        unfinished.replace(place / f"{name}.safetensors")
