"""A folder that is replaced as a whole: written beside its place, then swapped in."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `folder`, or of nothing, when all went well.

    On any error what was written is removed and `folder` stays as it was. A process that is
    killed leaves at most a sibling named NAME.new-... or, for the moment of the swap, NAME.old-...
    """
    mark = uuid.uuid4().hex[:8]
    new, old = (folder.with_name(f"{folder.name}.{word}-{mark}") for word in ("new", "old"))
    new.mkdir(parents=True)
    try:
        yield new
        _sync(new)
        _swap(new, folder, old)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _swap(new: Path, folder: Path, old: Path) -> None:
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    _sync(folder.parent)


def _sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
