"""The router: a language model without its LM head, and a linear head that scores K teachers.

The scores are read at the last token of the prompt, where the model has seen all of it and is
about to answer. Their differences are log-odds: sigmoid(score of a - score of b) is the
probability that teacher a's response is rewarded more than teacher b's (Bradley-Terry).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, PreTrainedModel

from persyn.errors import EngineError
from persyn.llm.chat import Chat
from persyn.llm.protocols import Message, Tick

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Router(nn.Module):
    """A backbone and a float32 head of K outputs; K scores per prompt."""

    def __init__(self, backbone: Any, n_teachers: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.config.get_text_config().hidden_size, n_teachers, dtype=torch.float32)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) right-padded prompts to (B, K) scores."""
        return self.score(self.features(input_ids, attention_mask))

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) right-padded prompts to the (B, H) float32 hidden state of each one's last token."""
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        hidden: Tensor = output.last_hidden_state[rows, attention_mask.sum(dim=1) - 1]
        return hidden.float()

    def score(self, features: Tensor) -> Tensor:
        """(B, H) features to (B, K) scores, in float32 also where the backbone runs in bfloat16."""
        with torch.autocast(features.device.type, enabled=False):
            scores: Tensor = self.head(features)
        return scores


class Reader:
    """How the router reads a conversation: as the backbone's own chat prompt, of bounded length.

    max_tokens: a longer prompt loses its middle; what is asked mostly stands at either end.
    """

    def __init__(self, chat: Chat, max_tokens: int) -> None:
        self._chat = chat
        self.max_tokens = max_tokens

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt's token ids, at most `max_tokens` of them and never none."""
        ids = self._chat.prompt_ids(messages)
        if len(ids) <= self.max_tokens:
            return ids
        head = self.max_tokens // 2
        return ids[:head] + ids[len(ids) - (self.max_tokens - head) :]


def load_backbone(model: str, revision: str | None, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The language model without its LM head, in evaluation mode; `EngineError` when it cannot be loaded."""
    try:
        backbone: PreTrainedModel = AutoModel.from_pretrained(
            model, revision=revision, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise EngineError(f"the router's backbone {model!r} cannot be loaded: {error}") from error
    return backbone.to(device).eval()  # type: ignore[arg-type]


def context_of(backbone: PreTrainedModel, wanted: int) -> int:
    """The prompt length the router reads: `wanted`, or less where the backbone's context is smaller."""
    limit = getattr(backbone.config.get_text_config(), "max_position_embeddings", None)
    return min(wanted, limit) if limit else wanted


def pair_loss(scores: Tensor, rewards: Tensor) -> Tensor:
    """The Bradley-Terry loss, the mean of -log sigmoid(winner - loser) over all preferences of all prompts.

    Each preference weighs the same, so a prompt weighs as much as it has preferences.

    scores:  (B, K).
    rewards: (B, K), NaN where missing; equal rewards are no preference.
    returns: a scalar, in nats; 0 without any preference.
    """
    better = rewards[:, :, None] > rewards[:, None, :]  # never true of NaN
    margins = (scores[:, :, None] - scores[:, None, :])[better]
    return functional.softplus(-margins).sum() / max(len(margins), 1)


def pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded (B, L) token ids and their attention mask; no attention reaches what pads."""
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in prompts], device=device)
    lengths = torch.tensor([len(ids) for ids in prompts], device=device)
    return input_ids, (torch.arange(longest, device=device) < lengths[:, None]).long()


def batches(prompts: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of prompts of like length, at most `batch_tokens` with padding (or one prompt), longest first.

    Longest first, so that a batch that does not fit the memory shows at once.
    """
    batch: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i)):
        if batch and (len(batch) + 1) * len(prompts[batch[0]]) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def all_features(router: Router, prompts: Sequence[Sequence[int]], batch_tokens: int, tick: Tick) -> Tensor:
    """(P, H) float32 features of P prompts, in their order, on the CPU; `tick` after each batch."""
    device = router.head.weight.device
    features = torch.empty(len(prompts), router.head.in_features)
    for batch in batches(prompts, batch_tokens):
        features[batch] = router.features(*pad([prompts[i] for i in batch], device)).cpu()
        tick()
    return features
