"""Estimate from a model's files whether its weights and one response of maximum length fit in memory.

The estimate is a lower bound: a model that is rejected here cannot be loaded.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from persyn.llm import gpus
from persyn.llm.engines import ENGINES
from persyn.llm.identity import snapshot_in_cache
from persyn.llm.protocols import Finding, ModelSpec
from persyn.runs.checks.models import UsedModel

_GIB = 2**30
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
#: GiB of KV cache that vLLM gets on a CPU when the run file sets none.
_CPU_CACHE_GIB = 2.0
#: Configuration keys of models in which not every layer caches every token; their cache size cannot be derived.
_SPARSE = ("sliding_window", "layer_types", "kv_lora_rank", "attention_chunk_size", "ssm_cfg", "mamba_d_state")


def check(model: UsedModel) -> Finding | None:
    """The memory problem of a model; None if it fits, or its files are not on this host."""
    spec = model.spec
    if ENGINES[spec.engine].starts_server:
        return None
    folder = _folder(spec)
    config = _read(folder / "config.json") if folder else None
    if folder is None or config is None:
        return None
    stored = str(config.get("dtype") or config.get("torch_dtype") or "")
    used = _dtype(spec, stored)
    weights = _weight_bytes(folder)
    if "quantization_config" not in config and not spec.options.get("quantization") and stored in _BYTES:
        weights = weights * _BYTES[used] // _BYTES[stored]
    room, where = _room(spec)
    if room and weights > room:
        mend = "use more gpus, or a smaller options.dtype" if spec.gpus else "set gpus = 1 on a host with a GPU"
        message = f"its weights take {weights / _GIB:,.1f} GiB in {used}, and {where} {room / _GIB:,.1f}; {mend}"
        return Finding("error", "memory", message)
    if spec.engine == "vllm" and room:
        return _cache(spec, config, room - weights, _BYTES[used])
    return None


def _cache(spec: ModelSpec, config: dict[str, Any], left: int, size: int) -> Finding | None:
    """Check that the KV cache holds one response as long as the context."""
    context = spec.options.get("max_model_len") or config.get("max_position_embeddings")
    per_token = _token_bytes(config, size)
    if not context or not per_token:
        return None
    given = spec.options.get("kv_cache_gib") or (None if spec.gpus else _CPU_CACHE_GIB)
    cache = left if given is None else int(given * _GIB)
    if context * per_token <= cache:
        return None
    raised = "options.kv_cache_gib" if given is not None else "options.gpu_memory_utilization or gpus"
    return Finding(
        "error",
        "memory",
        f"a context of {context:,} tokens takes {context * per_token / _GIB:,.1f} GiB of KV cache, but there are only "
        f"{cache / _GIB:,.1f}: set options.max_model_len to {cache // per_token:,} or less, or raise {raised}",
    )


def _token_bytes(config: dict[str, Any], size: int) -> int | None:
    """Bytes of KV cache per token; None where the configuration does not determine it."""
    if any(config.get(name) for name in _SPARSE):
        return None
    try:
        heads, layers = int(config["num_attention_heads"]), int(config["num_hidden_layers"])
        width = int(config.get("head_dim") or config["hidden_size"] // heads)
        return 2 * layers * int(config.get("num_key_value_heads") or heads) * width * size
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _room(spec: ModelSpec) -> tuple[int, str]:
    """The bytes available to a model and a description of their limit; 0 where unknown."""
    if not spec.gpus:
        return _host_bytes(), "this host has"
    totals = sorted(gpus.total_mib(), reverse=True)[: spec.gpus]
    share = spec.options.get("gpu_memory_utilization", 0.9) if spec.engine == "vllm" else 1.0
    of = f"options.gpu_memory_utilization = {share:g} leaves" if spec.engine == "vllm" else f"{len(totals)} GPUs have"
    return int(sum(totals) * 2**20 * share), of


def _host_bytes() -> int:
    """The host's memory, or the limit of its container."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            total = min(total, int(file.read_text()))
        except (OSError, ValueError):
            continue
    return total


def _dtype(spec: ModelSpec, stored: str) -> str:
    """The dtype in which a model is computed."""
    chosen = spec.options.get("dtype")
    if chosen in _BYTES:
        return str(chosen)
    if spec.engine == "vllm":
        return "float16" if stored == "float16" else "bfloat16"
    if not spec.gpus:
        return "float32"
    return stored if spec.engine in ("log_likelihood", "reward_model") and stored in _BYTES else "bfloat16"


def _folder(spec: ModelSpec) -> Path | None:
    """The local folder of a model's files, if there is one."""
    if Path(spec.model).is_dir():
        return Path(spec.model)
    return snapshot_in_cache(spec.model, spec.revision)


def _weight_bytes(folder: Path) -> int:
    index = _read(folder / "model.safetensors.index.json")
    if index and isinstance(index.get("metadata"), dict) and index["metadata"].get("total_size"):
        return int(index["metadata"]["total_size"])
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError):
        return None
