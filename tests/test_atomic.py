"""A folder is replaced atomically or stays unchanged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from persyn.atomic import FolderChanged, replaced


def fill(folder: Path, text: str) -> None:
    with replaced(folder) as new:
        (new / "file").write_text(text)


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    fill(tmp_path / "out", "first")
    fill(tmp_path / "out", "second")
    assert (tmp_path / "out" / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_in_mid_swap_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "out", "first")
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if ".new-" in path.name:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "out", "second")
    assert (tmp_path / "out" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("before", [None, "first"])
def test_whoever_was_suspended_does_not_undo_what_another_did_meanwhile(tmp_path: Path, before: str | None) -> None:
    if before:
        fill(tmp_path / "out", before)

    def suspended() -> None:
        with replaced(tmp_path / "out") as new:
            (new / "file").write_text("late")
            fill(tmp_path / "out", "another's")

    with pytest.raises(FolderChanged, match="by another process"):
        suspended()
    assert (tmp_path / "out" / "file").read_text() == "another's"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_was_removed_meanwhile_stays_so(tmp_path: Path) -> None:
    fill(tmp_path / "out", "first")

    def suspended() -> None:
        with replaced(tmp_path / "out"):
            shutil.rmtree(tmp_path / "out")

    with pytest.raises(FolderChanged):
        suspended()
    assert list(tmp_path.iterdir()) == []


def test_what_is_made_once_replaces_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "out", "first")

    def again() -> None:
        with replaced(tmp_path / "out", only_new=True) as new:
            (new / "file").write_text("second")

    with pytest.raises(FolderChanged):
        again()
    assert (tmp_path / "out" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
