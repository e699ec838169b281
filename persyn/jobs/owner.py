"""Name lease owners with globally unique process names, and detect dead owners on this machine."""

from __future__ import annotations

import getpass
import os
import socket
import uuid
from collections.abc import Iterable
from pathlib import Path

import psutil


def name(place: int | None = None) -> str:
    """machine/process id/start time/random: readable, unique, and other processes of the machine can see it die.

    place: which of the process's workers it is, if there are several.
    """
    pid = os.getpid()
    own = uuid.uuid4().hex[:8] if place is None else f"{place}-{uuid.uuid4().hex[:8]}"
    return f"{_machine()}/{pid}/{_started(pid)}/{own}"


def actor() -> str:
    """user@machine of the user who runs this process, for the audit log."""
    return f"{getpass.getuser()}@{socket.gethostname()}"


def short(owner: str) -> str:
    """A short name for display: host:pid, with .place if the process has several workers; it need not be unique.

    Any other text, such as the name of a person who caused an event, is returned unchanged.
    """
    parts = owner.split("/")
    if len(parts) != 4:
        return owner
    machine, pid, _, own = parts
    place = own.partition("-")[0] if "-" in own else ""
    return f"{machine.partition('.')[0]}:{pid}" + (f".{place}" if place else "")


def dead(owners: Iterable[str]) -> list[str]:
    """The owners that ran on this machine and are dead; owners on other machines are never included."""
    here = _machine()
    return [owner for owner in owners if owner.startswith(f"{here}/") and not _is_alive(owner)]


def _is_alive(owner: str) -> bool:
    pid, started = owner.split("/")[-3:-1]
    return _started(int(pid)) == started


def _started(pid: int) -> str:
    """The start time of a process, "" if it does not exist; distinguishes processes with a reused id.

    In clock ticks since boot where available, because wall-clock time changes when the clock is set.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return ""
        stat = Path(f"/proc/{pid}/stat")
        # Field 22; field 2, the program's name, may contain spaces and parentheses.
        return stat.read_text().rpartition(")")[2].split()[19] if stat.exists() else f"{process.create_time():.3f}"
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return ""


def _machine() -> str:
    """This host since its boot, and in a container its PID namespace, since process ids are only unique within one."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = [socket.gethostname()]
    parts += [boot.read_text()[:8]] if boot.exists() else []
    parts += [str(namespace.stat().st_ino)] if namespace.exists() else []
    return ".".join(parts)
