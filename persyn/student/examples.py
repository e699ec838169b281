"""Tokenise a dataset for training, stored on disk so that memory does not grow with the dataset."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from persyn.llm.chat import Chat
from persyn.llm.template import Conversation

#: The label of a token that the loss ignores.
IGNORED = -100
_COUNTS = "counts.json"


@dataclass(frozen=True, slots=True)
class Counts:
    """The number of rows and tokens in a tokenised dataset."""

    rows: int
    #: Conversations above the length limit, or rejected by the chat template.
    left_out: int
    #: Response tokens, on which the loss is computed, per epoch.
    response_tokens: int


class StudentExamples(Dataset[dict[str, list[int]]]):
    """Rows of token ids on disk, in order; the labels are the response's tokens, and `IGNORED` elsewhere."""

    def __init__(self, folder: Path) -> None:
        self._ends = np.load(folder / "ends.npy", allow_pickle=False)  # (N,)
        self._starts = np.load(folder / "starts.npy", allow_pickle=False)  # (N,) start of the response within its row
        self._ids: NDArray[np.int32] = np.memmap(folder / "ids.bin", dtype=np.int32, mode="r")
        self.counts = msgspec.json.decode((folder / _COUNTS).read_bytes(), type=Counts)

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def lengths(self) -> list[int]:
        """The number of tokens in each row."""
        found: list[int] = np.diff(self._ends, prepend=0).tolist()
        return found

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        begin = int(self._ends[index - 1]) if index else 0
        ids = self._ids[begin : self._ends[index]].tolist()
        start = int(self._starts[index])
        return {"input_ids": ids, "labels": [IGNORED] * start + ids[start:]}


def write(folder: Path, conversations: Iterable[Conversation], chat: Chat, *, max_tokens: int) -> Counts:
    """Write a dataset's tokens into a folder, tokenised exactly as for the log-likelihood of a response.

    max_tokens: limit of a whole conversation; longer ones are left out, never truncated.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts: list[int] = []
    ends: list[int] = []
    left_out = written = 0
    with (folder / "ids.bin").open("wb") as file:
        for row in _tokens(conversations, chat):
            if row is None or len(row[0]) > max_tokens:
                left_out += 1
                continue
            ids, start = row
            file.write(np.array(ids, dtype=np.int32).tobytes())
            written += len(ids)
            starts.append(start)
            ends.append(written)
    np.save(folder / "starts.npy", np.array(starts, dtype=np.int64))
    np.save(folder / "ends.npy", np.array(ends, dtype=np.int64))
    counts = Counts(len(starts), left_out, written - sum(starts))
    (folder / _COUNTS).write_bytes(msgspec.json.encode(counts))
    return counts


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Collate rows to (B, L) tensors, padded on the right, with an attention mask."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in values])

    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": padded(ids, 0),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
        "labels": padded([row["labels"] for row in rows], IGNORED),
    }


def _tokens(conversations: Iterable[Conversation], chat: Chat) -> Iterator[tuple[list[int], int] | None]:
    for conversation in conversations:
        try:
            found = chat.response_ids(conversation)
            yield found.ids, found.start
        except TemplateError:
            yield None
