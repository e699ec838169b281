"""Explain why a model does not load, in terms of the run file; final if a retry cannot help."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from persyn.errors import EngineError, HostLacks, shorten
from persyn.llm.protocols import ModelSpec

#: Raised by the hub's client when something does not exist, as opposed to the hub being unreachable.
_NOT_THERE = {"RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError", "EntryNotFoundError"}
_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")


def require_gpus(spec: ModelSpec) -> None:
    """Raise `HostLacks` when a model needs more GPUs than this process sees."""
    if not spec.gpus:
        return
    import torch

    seen = torch.cuda.device_count()
    if seen >= spec.gpus:
        return
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    narrowed = f" (CUDA_VISIBLE_DEVICES is {shown!r})" if shown is not None else ""
    built = "" if torch.version.cuda or torch.version.hip else ", and this torch is built without GPU support"
    raise HostLacks(
        f"{spec.model!r} requires gpus = {spec.gpus}, but {seen} are visible here{narrowed}{built}; "
        "set gpus = 0 to run it on the CPU, or work the run on a host that has the GPUs"
    )


def require_program(program: str) -> None:
    """Raise `HostLacks` if a server's program is not on this host."""
    if shutil.which(program) is None:
        raise HostLacks(f"the program {program!r} of options.command is not installed here, or not on the PATH")


def explain(spec: ModelSpec, error: Exception, what: str = "cannot load") -> EngineError:
    """Convert a library's loading error to one of ours; permanent unless a retry may succeed."""
    said = f"{what} {spec.model!r}: {error}"
    if any(words in str(error).lower() for words in _MEMORY):
        where = "use more gpus" if spec.gpus else "use a host with more memory, or GPUs"
        return EngineError(f"{said}; not enough memory: set options.dtype to a smaller type, or {where}")
    if isinstance(error, OSError) and _may_come(spec, error):
        return EngineError(said)
    if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
        return EngineError(said)
    return HostLacks(said)


def explain_vllm(spec: ModelSpec, error: Exception) -> EngineError:
    """Convert an error of vLLM's start, naming the run file's keys that can fix it."""
    text = str(error)
    said = f"vLLM cannot load {spec.model!r}: {type(error).__name__}: {shorten(text, most=1000)}"
    lower = text.lower()
    if "free memory on device" in lower:  # another process may release it
        return EngineError(f"{said}; end other processes on the GPU, or lower options.gpu_memory_utilization")
    if "max seq len" in lower or "no available memory for the cache" in lower:
        cache = "raise options.kv_cache_gib, " if "kv_cache_gib" in spec.options or not spec.gpus else ""
        share = "raise options.gpu_memory_utilization, use more gpus, " if spec.gpus else ""
        return HostLacks(f"{said}; {cache}{share}or lower options.max_model_len")
    if any(words in lower for words in _MEMORY):
        return EngineError(f"{said}; lower options.max_model_len or options.max_num_seqs, or use more gpus")
    return HostLacks(said) if isinstance(error, (ValueError, OSError, TypeError)) else EngineError(said)


def _may_come(spec: ModelSpec, error: Exception) -> bool:
    """Whether the hub was unreachable, rather than the model missing."""
    if Path(spec.model).is_dir() or Path(spec.model).is_absolute() or os.environ.get("HF_HUB_OFFLINE") == "1":
        return False
    raised: BaseException | None = error
    while raised is not None:
        if type(raised).__name__ in _NOT_THERE:
            return False
        raised = raised.__cause__ or raised.__context__
    return True
