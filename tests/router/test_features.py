"""Features of a frozen backbone are computed once, whatever happens to their cache folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from persyn.router import features


class Backbone:
    """Counts its calls; the features of a prompt are the sum and the number of its token ids."""

    def __init__(self) -> None:
        self.asked: list[Sequence[int]] = []

    def __call__(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        self.asked += prompts
        return torch.tensor([[float(sum(ids)), float(len(ids))] for ids in prompts])


def test_a_prompt_is_computed_once_and_comes_back_in_its_place(tmp_path: Path) -> None:
    backbone = Backbone()
    first = features.cached(tmp_path, [[1, 2], [3]], backbone)
    again = features.cached(tmp_path, [[3], [4, 5, 6], [1, 2], [3]], backbone)

    assert first.tolist() == [[3, 2], [3, 1]]
    assert again.tolist() == [[3, 1], [15, 3], [3, 2], [3, 1]]
    assert backbone.asked == [[1, 2], [3], [4, 5, 6]]


def test_a_damaged_piece_is_made_again(tmp_path: Path) -> None:
    backbone = Backbone()
    features.cached(tmp_path, [[1, 2]], backbone)
    (piece,) = tmp_path.iterdir()
    piece.write_bytes(b"half a fi")
    (tmp_path / "cut.unfinished").write_bytes(b"never ended")

    assert features.cached(tmp_path, [[1, 2]], backbone).tolist() == [[3, 2]]
    assert len(backbone.asked) == 2
    assert features.cached(tmp_path, [[1, 2]], backbone).tolist() == [[3, 2]]
    assert len(backbone.asked) == 2


def test_where_nothing_can_be_kept_it_is_computed_each_time(tmp_path: Path) -> None:
    backbone, place = Backbone(), tmp_path / "file"
    place.write_text("in the way")
    for _ in range(2):
        assert features.cached(place, [[1, 2]], backbone).tolist() == [[3, 2]]
    assert len(backbone.asked) == 2


def test_other_weights_have_another_folder(tmp_path: Path) -> None:
    folders = {
        features.folder(tmp_path, "a", "1", "float32", "last"),
        features.folder(tmp_path, "b", "1", "float32", "last"),
        features.folder(tmp_path, "a", "2", "float32", "last"),
        features.folder(tmp_path, "a", "1", "bfloat16", "last"),
        features.folder(tmp_path, "a", "1", "float32", "middle"),
    }
    assert len(folders) == 5
