"""Write and read a fitted router as safetensors and JSON, without pickle; a write is atomic.

router.json           how to rebuild it: `CheckpointManifest`
kind.json             values of a router on frozen encoders, and
kind.safetensors      its arrays
router.safetensors    or the head on a tuned backbone, float32,
backbone/             with the tuned backbone and its tokenizer (tune = full)
adapter/              or the low-rank adapters (tune = lora)

A checkpoint without a kind is of a version that had only heads: router.safetensors is its head.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from persyn.atomic import replaced
from persyn.errors import HostLacks
from persyn.llm.chat import Chat, load_tokenizer
from persyn.llm.identity import hub_revision, require_unchanged
from persyn.llm.options import Dtype
from persyn.llm.protocols import ModelSpec
from persyn.router.kinds import files
from persyn.router.kinds.base import Predictor
from persyn.router.model import Reader, Reads, RouterModel, load

#: File types of a checkpoint; any other file could contain code and is rejected.
_SUFFIXES = frozenset({".json", ".jinja", ".model", ".safetensors", ".txt"})


class CheckpointManifest(Struct, frozen=True, forbid_unknown_fields=True):
    """How to rebuild the router of a checkpoint."""

    #: Folder or hub id of the original backbone, and its hub commit or its folder's digest; empty if none is read.
    backbone: str
    revision: str | None
    tune: str
    #: In the order of the head's outputs.
    teachers: list[str]
    #: Longer prompts lose their middle.
    max_tokens: int
    add_bos: bool | None
    #: Versions of the libraries used in training.
    versions: dict[str, str]
    #: Which hidden states the head reads; the default is for checkpoints written before "middle" existed.
    reads: Reads = "last"
    #: None: a head of a version that had only heads.
    kind: str | None = None
    #: What the router reads of a prompt, and the metadata fields that it reads.
    encoders: list[str] = []
    features: list[str] = []
    #: Folder or hub id of the sentence-embedding model, and its hub commit or its folder's digest.
    embedding: str = ""
    embedding_version: str | None = None
    #: The factor that makes the scores of a router on frozen encoders log-odds.
    scale: float = 1.0

    @property
    def is_frozen(self) -> bool:
        """Whether it is a router on frozen encoders, and has no weights of a language model."""
        return self.kind is not None and self.tune not in ("full", "lora")


def write(folder: Path, predictor: Predictor, manifest: CheckpointManifest) -> str:
    """Write the checkpoint of a router on frozen encoders, replacing an existing one; return its SHA-256."""
    assert manifest.kind is not None
    with replaced(folder) as new:
        files.write(new, manifest.kind, predictor)
        _write_manifest(new, manifest)
    return sha256(folder)


def write_tuned(folder: Path, router: RouterModel, manifest: CheckpointManifest, tokenizer: Any) -> str:
    """Write the checkpoint of a tuned backbone with its head, replacing an existing one; return its SHA-256."""
    head = {name: parameter.detach().cpu().contiguous() for name, parameter in router.head.named_parameters()}
    with replaced(folder) as new:
        save_file(head, new / "router.safetensors")
        if manifest.tune == "full":
            router.backbone.save_pretrained(new / "backbone")
            tokenizer.save_pretrained(new / "backbone")
        elif manifest.tune == "lora":
            router.backbone.save_pretrained(new / "adapter")
            _tidy_adapter(new / "adapter")
        _write_manifest(new, manifest)
    return sha256(folder)


def read_manifest(folder: Path) -> CheckpointManifest:
    """Read what a checkpoint is; `HostLacks` when the folder is not a checkpoint or contains other files."""
    _refuse_strangers(folder)
    try:
        return msgspec.json.decode((folder / "router.json").read_bytes(), type=CheckpointManifest)
    except (OSError, msgspec.MsgspecError) as error:
        raise HostLacks(f"{str(folder)!r} is not a router's checkpoint: {error}") from error


def read_tuned(spec: ModelSpec, manifest: CheckpointManifest, dtype: Dtype) -> tuple[RouterModel, Reader]:
    """Load the language model with its head in the folder `spec.model` for scoring.

    Raises `HostLacks` when the folder is not a checkpoint, and `UsageError` when the backbone it was fitted to has
    changed.
    """
    folder = Path(spec.model)
    try:
        head = load_file(folder / "router.safetensors")
    except (OSError, SafetensorError) as error:
        raise HostLacks(f"{spec.model!r} is not a router's checkpoint: {error}") from error
    if manifest.tune == "full":
        backbone = ModelSpec(spec.engine, str(folder / "backbone"), gpus=spec.gpus)
    else:
        backbone = ModelSpec(spec.engine, manifest.backbone, hub_revision(manifest.revision), spec.gpus)
        if backbone.revision != manifest.revision:  # the revision is a folder's digest
            require_unchanged(manifest.backbone, manifest.revision)
    reader = Reader(Chat(load_tokenizer(backbone), add_bos=manifest.add_bos), manifest.max_tokens)
    router = load(backbone, dtype, len(manifest.teachers), manifest.reads)
    if manifest.tune == "lora":
        _load_adapter(router, folder / "adapter")
    router.head.load_state_dict(head)
    return router.requires_grad_(False).eval(), reader


def merge(router: RouterModel) -> None:
    """Merge low-rank adapters, if any, into the backbone's weights: the same scores in less time.

    Only in float32: weights of lower precision would round most of the adapters' contribution away.
    """
    if hasattr(router.backbone, "merge_and_unload") and router.backbone.dtype is torch.float32:
        router.backbone = router.backbone.merge_and_unload()


def sha256(folder: Path) -> str:
    """One hash of the names and contents of all files in a folder."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{content}  {path.relative_to(folder).as_posix()}\n".encode())
    return total.hexdigest()


def _write_manifest(folder: Path, manifest: CheckpointManifest) -> None:
    text = msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=2)
    (folder / "router.json").write_bytes(text)


def _refuse_strangers(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix not in _SUFFIXES:
            raise HostLacks(f"{str(folder)!r} contains {path.name!r}; only safetensors and JSON files are allowed")


def _tidy_adapter(folder: Path) -> None:
    """Make the adapter's files deterministic: its configuration contains a set."""
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _load_adapter(router: RouterModel, folder: Path) -> None:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise HostLacks("a router tuned with lora needs peft: pip install 'persyn[lora]'") from error
    router.backbone = PeftModel.from_pretrained(router.backbone, folder, use_safetensors=True)
    merge(router)
