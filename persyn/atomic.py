"""Replace a folder atomically: write the new content beside it, then swap it in."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from persyn.errors import PersynError


class FolderChanged(PersynError):
    """Another process replaced, created or removed the folder in the meantime; its version is kept."""


@contextmanager
def replaced(folder: Path, *, only_new: bool = False) -> Iterator[Path]:
    """Yield an empty folder that replaces `folder` (or creates it) if the block succeeds.

    only_new: do not replace an existing folder; `folder` must not exist.
    On any error the new content is removed and `folder` is left unchanged. If `folder` was changed by another process
    since the start, it is also left unchanged and `FolderChanged` is raised: a process that was suspended must not
    overwrite newer work. A killed process leaves at most a sibling named NAME.new-... or, during the swap, NAME.old-...
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
    """Identify the folder itself, not its path; the inode alone is not enough because inodes are reused."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _put_aside(folder: Path, old: Path, before: tuple[int, ...]) -> None:
    """Move the folder aside, then compare it with `before`: after the move nobody can replace it."""
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
    """Restore the folder that was moved aside, unless a newer one has taken its place."""
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _changed(folder: Path) -> FolderChanged:
    return FolderChanged(
        f"{folder} was replaced or removed by another process in the meantime and was not changed; try again"
    )


def _sync(folder: Path) -> None:
    """Make directory entries durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
