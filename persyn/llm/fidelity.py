"""Check with a few tokens that a loaded model computes what its authors intended.

PyTorch's fused attention (SDPA) silently ignores features it has no argument for, such as Gemma 2's soft cap and
attention sinks. Bidirectional and encoder-decoder models give no likelihood of a response.
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

#: Attention arguments without effect: they are already in the mask, or are for other kernels.
_HARMLESS = frozenset(
    {"sliding_window", "position_ids", "cache_position", "indices", "block_indices"}
    | {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
)
_KNOWN = frozenset(inspect.signature(sdpa_attention_forward).parameters) | _HARMLESS
#: Model families with randomised attention.
_RANDOM = frozenset({"reformer"})


def choose_attention(model: PreTrainedModel) -> None:
    """Switch a model to "eager" attention if it passes SDPA arguments that SDPA ignores."""
    if model.config.get_text_config()._attn_implementation != "sdpa":
        return
    with _recorded() as handed:
        _run(model, [[1, 2, 3, 4]])
    if handed - _KNOWN:
        model.set_attn_implementation("eager")


def require_causal(model: PreTrainedModel) -> None:
    """Raise `PermanentError` for a model that does not generate left to right, token by token."""
    name = type(model).__name__
    if model.config.model_type in _RANDOM:
        raise PermanentError(
            f"cannot use a {name}: its attention is random, so the likelihood of a response is not unique"
        )
    if looks_ahead(model):
        raise PermanentError(f"cannot use a {name} as a causal language model: it also attends to later tokens")


def looks_ahead(model: PreTrainedModel) -> bool:
    """Whether a token's output depends on later tokens; False if the outputs are not finite."""
    start, ends = [1, 2, 3, 4], ([5, 6, 7, 8] * 3, [9, 10, 11, 12] * 3)
    first, second = _run(model, [[*start, *end] for end in ends])[:, : len(start)]
    # Weights that are not finite are reported when something is scored.
    has_numbers = bool(first.isfinite().all() and second.isfinite().all())
    return has_numbers and not is_alike(first, second)


def is_alike(first: Tensor, second: Tensor) -> bool:
    """Whether two results are equal up to rounding, 2% of the largest value."""
    first, second = first.float(), second.float()
    return bool((first - second).abs().max() <= 0.02 * first.abs().max())


def without_cache(model: PreTrainedModel) -> dict[str, bool]:
    """Keyword arguments that disable a model's cache; none for an encoder, which has no such argument."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


@torch.inference_mode()
def _run(model: PreTrainedModel, ids: list[list[int]]) -> Tensor:
    """A model's output for (B, L) tokens: logits, or hidden states if it has no head."""
    found: Tensor = model(input_ids=torch.tensor(ids, device=model.device), **without_cache(model))[0]
    return found


@contextmanager
def _recorded() -> Iterator[set[str]]:
    """Collect the names of the arguments that models pass to SDPA within the block."""
    handed: set[str] = set()

    def attend(*arguments: Any, **more: Any) -> Any:
        # Booleans only request additional outputs.
        handed.update(name for name, value in more.items() if not isinstance(value, bool | None))
        return sdpa_attention_forward(*arguments, **more)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield handed
    finally:
        ALL_ATTENTION_FUNCTIONS.pop("sdpa")
