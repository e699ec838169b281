"""Run a command, and end it with everything that it started once it has ended or the parent is gone.

Run as a file of its own, with the read end of a pipe and the command: the pipe closes when the parent ends, however
it ends. Processes that leave the command's group, as servers with workers do, are found as descendants: on Linux,
those whose own parent has ended become children of this process. Imports nothing of PerSyn, to start at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_LOOK_SECONDS = 0.2
#: Of Linux's prctl.
_SET_PARENT_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36


def main() -> int:
    """Run the command to its end; its exit code, or 128 and the signal that ended it."""
    lifeline, command = int(sys.argv[1]), sys.argv[2:]
    _prctl(_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
        while child.poll() is None and not select.select([lifeline], [], [], _LOOK_SECONDS)[0]:
            pass
        return child.returncode if (child.returncode or 0) >= 0 else 128 - child.returncode
    finally:
        end_descendants()


def end_descendants() -> None:
    """Kill all descendants of this process; returns when they are gone."""
    if not Path("/proc/self/stat").exists():
        os.killpg(os.getpgrp(), signal.SIGKILL)  # no list of processes here: this one goes, too
    while found := descendants(os.getpid()):
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)


def descendants(pid: int) -> list[int]:
    """The processes below a process, from Linux's list of processes."""
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            parent = int(file.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(file.parent.name))
    found, left = [], [pid]
    while left:
        below = children.get(left.pop(), [])
        found += below
        left += below
    return found


def _die_with_parent() -> None:
    _prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
