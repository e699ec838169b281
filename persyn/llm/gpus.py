"""Query this host's GPUs through `nvidia-smi`, without initialising CUDA."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence

_ASK_SECONDS = 30


def ids() -> list[str]:
    """The GPUs' ids; empty without `nvidia-smi`."""
    return [line.strip() for line in _ask("index")]


def visible() -> tuple[str, ...]:
    """The GPUs' ids, restricted by CUDA_VISIBLE_DEVICES, which batch systems set."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(ids() if shown is None else [gpu for gpu in shown.split(",") if gpu])


def names(devices: Sequence[str]) -> str | None:
    """The GPUs' names as "0 NVIDIA H100 80GB HBM3; 1 ..."; all GPUs if no ids are given; None without any."""
    lines = _ask("index,name", *([f"--id={','.join(devices)}"] if devices else []))
    return "; ".join(line.strip().replace(", ", " ", 1) for line in lines) or None


def used_mib(devices: Sequence[str]) -> int | None:
    """Memory in use on some GPUs, MiB; None if unknown."""
    lines = _ask("memory.used", "--id=" + ",".join(devices))
    try:
        return sum(int(line) for line in lines) if lines else None
    except ValueError:
        return None


def total_mib() -> list[int]:
    """Total memory of each GPU, MiB; empty if unknown."""
    return [int(line) for line in _ask("memory.total") if line.strip().isdecimal()]


def await_free(devices: Sequence[str], below_mib: int, seconds: float) -> bool:
    """Wait until at most `below_mib` of memory is in use; False if it still exceeds that after `seconds`."""
    until = time.monotonic() + seconds
    while (used := used_mib(devices)) is not None and used > below_mib:
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True


def _ask(what: str, *options: str) -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={what}", "--format=csv,noheader,nounits", *options]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_ASK_SECONDS)
    except subprocess.TimeoutExpired:
        return []
    return asked.stdout.strip().splitlines() if asked.returncode == 0 else []
