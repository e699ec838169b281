"""Who holds a lease: a name for this process that no other process ever has, and who of this machine is dead."""

from __future__ import annotations

import getpass
import os
import socket
import uuid
from collections.abc import Iterable
from pathlib import Path

import psutil


def name(place: int | None = None) -> str:
    """machine/process id/start time/random: readable, unique, and its death can be seen from the same machine.

    place: which of its process's workers it is, if there are several.
    """
    pid = os.getpid()
    own = uuid.uuid4().hex[:8] if place is None else f"{place}-{uuid.uuid4().hex[:8]}"
    return f"{_machine()}/{pid}/{_started(pid)}/{own}"


def actor() -> str:
    """user@machine: the person in whose name this process acts, for events."""
    return f"{getpass.getuser()}@{socket.gethostname()}"


def short(owner: str) -> str:
    """host:process id, and .place where a process has several workers, for people; two owners may have the same.

    Any other text, such as the name of a person who caused an event, is returned unchanged.
    """
    parts = owner.split("/")
    if len(parts) != 4:
        return owner
    machine, pid, _, own = parts
    place = own.partition("-")[0] if "-" in own else ""
    return f"{machine.partition('.')[0]}:{pid}" + (f".{place}" if place else "")


def dead(owners: Iterable[str]) -> list[str]:
    """Those of the owners that ran on this machine and run no more; nothing is known of other machines'."""
    here = _machine()
    return [owner for owner in owners if owner.startswith(f"{here}/") and not _is_alive(owner)]


def _is_alive(owner: str) -> bool:
    pid, started = owner.split("/")[-3:-1]
    return _started(int(pid)) == started


def _started(pid: int) -> str:
    """When a process began; "" when there is none. A process id that is used again is another time.

    In ticks since the boot where the kernel tells: a time of day would move when the clock is set.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return ""
        stat = Path(f"/proc/{pid}/stat")
        # The 22nd field; the second, the program's name, may hold blanks and brackets.
        return stat.read_text().rpartition(")")[2].split()[19] if stat.exists() else f"{process.create_time():.3f}"
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return ""


def _machine() -> str:
    """This host since its boot; in a container also which one, since process ids mean nothing across them."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = [socket.gethostname()]
    parts += [boot.read_text()[:8]] if boot.exists() else []
    parts += [str(namespace.stat().st_ino)] if namespace.exists() else []
    return ".".join(parts)
