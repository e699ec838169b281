"""Keep what a C library prints out of standard output, which may be read by a program."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

#: The process has one standard output; two threads that put it aside together would not both restore the same one.
_ONE_AT_A_TIME = Lock()
_STDOUT, _STDERR = 1, 2


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send what the process prints to standard error meanwhile; without a standard output, do nothing.

    C has a buffer of its own, which is written here: otherwise its text would appear when the process ends.
    """
    with _ONE_AT_A_TIME:
        try:
            kept = os.dup(_STDOUT)
        except OSError:  # it is closed
            yield
            return
        flush = ctypes.CDLL(None).fflush
        flush(None)
        try:
            os.dup2(_STDERR, _STDOUT)
            yield
        finally:
            flush(None)
            os.dup2(kept, _STDOUT)
            os.close(kept)
