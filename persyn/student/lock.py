"""Lock the folder of a training, so that one process trains in it."""

from __future__ import annotations

import fcntl
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from persyn.errors import UsageError


@contextmanager
def locked(folder: Path) -> Iterator[Callable[[], None]]:
    """Lock a training's folder; the lock is released when the process ends.

    Yields a function that raises `UsageError` once another process holds the lock: network file systems release the
    lock of a suspended host.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mine = uuid.uuid4().hex
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"another process is training in {folder}") from error
        (folder / "lock").write_text(mine)

        def require_mine() -> None:
            if (folder / "lock").read_text() != mine:
                raise UsageError(f"another process is training in {folder} now, so this one has stopped")

        yield require_mine
