"""Decide which rows may share a padded batch: those whose results do not depend on the other rows.

Two kinds of position embedding depend on the whole batch. Long-RoPE chooses between two sets of frequencies by
the longest row; dynamic NTK computes them from that row and keeps them for later batches. In addition, a
bidirectional model without a mask would attend to the padding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Given = TypeVar("Given")
Found = TypeVar("Found")


class BatchRule:
    """The batching rule of one model.

    sees_padding: whether padding changes a row's results, so that only rows of equal length share a batch. This
                  includes attention over the top-k tokens, where the width decides between ties.
    """

    def __init__(self, model: PreTrainedModel, *, sees_padding: bool = False) -> None:
        self.sees_padding = sees_padding or hasattr(model.config.get_text_config(), "index_topk")
        self._dynamic: list[tuple[Any, str]] = []
        #: Lengths beyond which long-RoPE switches its frequencies, and beyond which dynamic NTK varies them by length.
        self._steps: set[int] = set()
        self._slopes: set[int] = set()
        for module, kind, layer in _ropes(model):
            if "dynamic" in kind:
                self._dynamic.append((module, "" if layer is None else f"{layer}_"))
                self._slopes.add(int(module.original_max_seq_len))
            elif kind == "longrope":
                parameters = module.config.rope_parameters
                self._steps.add(int((parameters if layer is None else parameters[layer])[_ORIGINAL]))

    @property
    def same_up_to(self) -> int | None:
        """Rows of at most this many tokens may share a batch; None means any length."""
        return min(self._steps | self._slopes, default=None)

    def compute(
        self, rows: Sequence[Given], lengths: Sequence[int], forward: Callable[[Sequence[Given]], Sequence[Found]]
    ) -> list[Found]:
        """Apply `forward` to groups of rows that may share a batch; results are in the order of `rows`."""
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, length in enumerate(lengths):
            groups[self._kind(length)].append(i)
        found: dict[int, Found] = {}
        for places in groups.values():
            self.reset()
            found |= zip(places, forward([rows[i] for i in places]), strict=True)
        return [found[i] for i in range(len(rows))]

    def reset(self) -> None:
        """Discard the frequencies cached by an earlier batch."""
        for module, prefix in self._dynamic:
            device = getattr(module, f"{prefix}inv_freq").device
            original = getattr(module, f"{prefix}original_inv_freq").to(device)
            module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)

    def _kind(self, length: int) -> tuple[int, ...]:
        if self.sees_padding:
            return (length,)
        return (*(length > step for step in self._steps), *(max(length, slope) for slope in self._slopes))


_ORIGINAL = "original_max_position_embeddings"


def _ropes(model: nn.Module) -> Iterator[tuple[Any, str, str | None]]:
    """The model's rotary embeddings and their kinds; one entry per layer type with its own."""
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, str):
            yield module, kind, None
        elif isinstance(kind, dict):
            yield from ((module, each, layer) for layer, each in kind.items())
