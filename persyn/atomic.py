"""A folder that is replaced as a whole: written beside its place, then swapped in."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from persyn.errors import PersynError


class FolderChanged(PersynError):
    """Another process replaced, made or removed the folder meanwhile; what it put there stays."""


@contextmanager
def replaced(folder: Path, *, only_new: bool = False) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `folder`, or of nothing, when all went well.

    only_new: `folder` is not to be replaced: it is not there.
    On any error what was written is removed and `folder` stays as it was. So it does, with `FolderChanged`, when it is
    another than it was at the beginning: whoever was suspended must not undo what was done meanwhile. A process that
    is killed leaves at most a sibling named NAME.new-... or, for the moment of the swap, NAME.old-...
    """
    mark = uuid.uuid4().hex[:8]
    new, old = (folder.with_name(f"{folder.name}.{word}-{mark}") for word in ("new", "old"))
    before = None if only_new else _identity(folder)
    new.mkdir(parents=True)
    try:
        yield new
        _sync(new)
        if before is not None:
            _put_aside(folder, old, before)
        _put(new, folder, old)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _identity(folder: Path) -> tuple[int, ...] | None:
    """Tells a folder from whatever takes its place; an inode alone may be used again."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _put_aside(folder: Path, old: Path, before: tuple[int, ...]) -> None:
    """Looked at once it is moved: nobody can replace it any more."""
    try:
        folder.rename(old)
    except FileNotFoundError as error:
        raise _changed(folder) from error
    if _identity(old) != before:
        _put_back(old, folder)
        raise _changed(folder)


def _put(new: Path, folder: Path, old: Path) -> None:
    try:
        new.rename(folder)
    except BaseException as error:
        is_taken = folder.exists()
        _put_back(old, folder)
        if is_taken and isinstance(error, OSError):
            raise _changed(folder) from error
        raise
    _sync(folder.parent)


def _put_back(old: Path, folder: Path) -> None:
    """What was put aside, unless something newer is there."""
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _changed(folder: Path) -> FolderChanged:
    return FolderChanged(
        f"{folder} was replaced or removed by another process meanwhile and is left as it is; try again"
    )


def _sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
