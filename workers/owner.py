"""Who holds a lease: a name for this process that no other process ever has, and who of this machine is dead."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterable
from pathlib import Path

import psutil


def name() -> str:
    """machine/process id/start time/random: readable, unique, and its death can be seen from the same machine."""
    pid = os.getpid()
    return f"{_machine()}/{pid}/{_started(pid)}/{uuid.uuid4().hex[:8]}"


def dead(owners: Iterable[str]) -> list[str]:
    """Those of the owners that ran on this machine and run no more; nothing is known of other machines'."""
    here = _machine()
    return [owner for owner in owners if owner.startswith(f"{here}/") and not _is_alive(owner)]


def _is_alive(owner: str) -> bool:
    pid, started = owner.split("/")[-3:-1]
    return _started(int(pid)) == started


def _started(pid: int) -> str:
    """When a process began, in milliseconds; "" when there is none. A process id that is used again is another time."""
    try:
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time() * 1000:.0f}"
    except psutil.NoSuchProcess:
        return ""


def _machine() -> str:
    """This host; in a container also which one, since process ids mean nothing across them."""
    namespace = Path("/proc/self/ns/pid")
    inode = f".{namespace.stat().st_ino}" if namespace.exists() else ""
    return f"{socket.gethostname()}{inode}"
