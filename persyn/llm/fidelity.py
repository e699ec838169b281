"""Whether a loaded model computes what its makers meant, found out with a few tokens.

PyTorch's fused attention (SDPA) drops without a word what it has no argument for: Gemma 2's soft cap, attention
sinks. Models that read from both sides, or that translate one text into another, give no likelihood of a response.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from persyn.errors import PermanentError

#: What models hand to their attention that changes nothing: the mask already holds it, or it is for other kernels.
_HARMLESS = frozenset(
    {"sliding_window", "position_ids", "cache_position", "indices", "block_indices"}
    | {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
)
_KNOWN = frozenset(inspect.signature(sdpa_attention_forward).parameters) | _HARMLESS
#: Families whose attention is drawn at random each time.
_RANDOM = frozenset({"reformer"})


def choose_attention(model: PreTrainedModel) -> None:
    """Have a model that hands SDPA what it does not take compute attention itself ("eager")."""
    if model.config.get_text_config()._attn_implementation != "sdpa":
        return
    with _recorded() as handed:
        _run(model, [[1, 2, 3, 4]])
    if handed - _KNOWN:
        model.set_attn_implementation("eager")


def require_causal(model: PreTrainedModel) -> None:
    """`PermanentError` for a model that does not write from left to right, one token after the other."""
    name = type(model).__name__
    if model.config.model_type in _RANDOM:
        raise PermanentError(f"cannot use a {name}: its attention is random, so a response has no one likelihood")
    if looks_ahead(model):
        raise PermanentError(f"cannot use a {name} as a causal language model: it also reads what comes after a token")


def looks_ahead(model: PreTrainedModel) -> bool:
    """Whether what a model makes of a token depends on later ones; not where it makes no numbers of them."""
    start, ends = [1, 2, 3, 4], ([5, 6, 7, 8] * 3, [9, 10, 11, 12] * 3)
    first, second = _run(model, [[*start, *end] for end in ends])[:, : len(start)]
    # Weights that are no numbers are reported as such when something is scored.
    has_numbers = bool(first.isfinite().all() and second.isfinite().all())
    return has_numbers and not is_alike(first, second)


def is_alike(first: Tensor, second: Tensor) -> bool:
    """Whether two results are one but for rounding, to 2 % of the largest number."""
    first, second = first.float(), second.float()
    return bool((first - second).abs().max() <= 0.02 * first.abs().max())


def without_cache(model: PreTrainedModel) -> dict[str, bool]:
    """What tells a model's `forward` to keep no cache; nothing for an encoder, which knows of none."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


@torch.inference_mode()
def _run(model: PreTrainedModel, ids: list[list[int]]) -> Tensor:
    """What a model makes of (B, L) tokens: logits, or hidden states where it has no head."""
    found: Tensor = model(input_ids=torch.tensor(ids, device=model.device), **without_cache(model))[0]
    return found


@contextmanager
def _recorded() -> Iterator[set[str]]:
    """The names of what models hand to SDPA meanwhile."""
    handed: set[str] = set()

    def attend(*arguments: Any, **more: Any) -> Any:
        # What is true or false asks for something to be returned.
        handed.update(name for name, value in more.items() if not isinstance(value, bool | None))
        return sdpa_attention_forward(*arguments, **more)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield handed
    finally:
        ALL_ATTENTION_FUNCTIONS.pop("sdpa")
