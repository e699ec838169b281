"""The router: a language model without its LM head, and a linear head that scores K teachers.

The head reads the hidden state of the prompt's last token, which has attended to the whole prompt; or,
for a frozen backbone, the mean state of the middle layer, which represents the prompt better than the
upper layers, which specialise in the next token. Score differences are log-odds (Bradley-Terry):
sigmoid(score of a - score of b) is the probability that teacher a's response has a higher reward than
teacher b's or, with weighted preferences, the share of such wins weighted by the reward difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from persyn.errors import EngineError, PermanentError
from persyn.llm import lean, options, scoring
from persyn.llm.batch_rule import BatchRule
from persyn.llm.chat import Chat
from persyn.llm.options import Dtype
from persyn.llm.protocols import Message, ModelSpec, Tick

Reads: TypeAlias = Literal["last", "middle"]
"""The last layer's state at the last token, or the mean over all tokens of the middle layer's states."""


class RouterModel(nn.Module):
    """A backbone and a float32 head of K outputs; K scores per prompt."""

    def __init__(self, backbone: Any, n_teachers: int, reads: Reads = "last") -> None:
        from persyn.llm import fidelity  # imports transformers

        super().__init__()
        self.reads = reads
        # An encoder attends to unmasked padding; a causal model does not, and is faster without a mask.
        self._mates = BatchRule(backbone, sees_padding=fidelity.looks_ahead(backbone))
        self.backbone = _lower_half(backbone) if reads == "middle" else backbone
        hidden_size = backbone.config.get_text_config().hidden_size
        self.head = nn.Linear(hidden_size, n_teachers, dtype=torch.float32, device=backbone.device)

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Map (B, L) right-padded prompts and their (B,) lengths to (B, K) scores."""
        return self.score(self.features(input_ids, lengths))

    def features(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Map (B, L) right-padded prompts and their (B,) lengths to (B, H) float32 states; see `Reads`."""
        rows = range(len(lengths))
        found: list[Tensor] = self._mates.compute(
            rows, lengths.tolist(), lambda some: list(self._features(input_ids, lengths, some))
        )
        return torch.stack(found)

    def _features(self, input_ids: Tensor, lengths: Tensor, rows: Sequence[int]) -> Tensor:
        places = torch.tensor(rows, device=lengths.device)
        lengths = lengths[places]
        input_ids = input_ids[places, : lengths.max()]
        states = self.backbone(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, L, H)
        if self.reads == "last":
            last: Tensor = states[torch.arange(len(lengths), device=lengths.device), lengths - 1]
            return last.float()
        is_prompt = torch.arange(states.shape[1], device=lengths.device) < lengths[:, None]  # (B, L)
        return torch.where(is_prompt[:, :, None], states.float(), 0.0).sum(dim=1) / lengths[:, None]

    def score(self, features: Tensor) -> Tensor:
        """Map (B, H) features to (B, K) scores, in float32 even if the backbone runs in bfloat16."""
        with torch.autocast(features.device.type, enabled=False):
            scores: Tensor = self.head(features)
        return scores


class Reader:
    """Turn a conversation into the token ids the router reads: the backbone's chat prompt, truncated.

    max_tokens: a longer prompt loses its middle; the task is mostly stated at the beginning or the end.
    """

    def __init__(self, chat: Chat, max_tokens: int) -> None:
        self._chat = chat
        self.max_tokens = max_tokens

    @property
    def tokenizer(self) -> Any:
        """The backbone's."""
        return self._chat.tokenizer

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt's token ids: at least one, at most `max_tokens`."""
        try:
            ids = self._chat.prompt_ids(messages)
        except TemplateError:
            # The router only reads: a conversation that its template rejects still needs a teacher.
            ids = self._chat.encode(self._chat.plain_text(messages))
        if len(ids) <= self.max_tokens:
            return ids
        head = self.max_tokens // 2
        return ids[:head] + ids[len(ids) - (self.max_tokens - head) :]


def load(spec: ModelSpec, dtype: Dtype, n_teachers: int, reads: Reads = "last") -> RouterModel:
    """Load a backbone in evaluation mode and put a new head on it; `EngineError` when it cannot be loaded."""
    lean.import_transformers()
    from transformers import AutoModel

    return RouterModel(scoring.load_weights(AutoModel, spec, options.ScorerOptions(dtype=dtype)), n_teachers, reads)


def _lower_half(backbone: Any) -> Any:
    """The backbone without the upper half of its layers; unchanged if its layers have another attribute name."""
    layers = getattr(backbone, "layers", None)
    if isinstance(layers, nn.ModuleList):
        backbone.layers = layers[: (len(layers) + 1) // 2]
    return backbone


def refuse_several_gpus(spec: ModelSpec) -> None:
    """Raise `PermanentError` for more than one GPU: backbone and head are on one device."""
    if spec.gpus > 1:
        raise PermanentError(f"a router runs on one GPU or on the CPU, got gpus = {spec.gpus}")


def precision(spec: ModelSpec, wanted: Dtype | None) -> Dtype:
    """The backbone's dtype: the requested one, or the device's default."""
    return wanted or ("bfloat16" if spec.gpus else "float32")


def pair_loss(scores: Tensor, weights: Tensor) -> Tensor:
    """Bradley-Terry loss: weighted mean of -log sigmoid(winner - loser) over all preferences of all prompts.

    scores:  (B, K).
    weights: (B, K, K) of winner over loser, 0 where there is none; see `persyn.method.rewards.preference_weights`.
    returns: a scalar, in nats; 0 without any preference.
    """
    total = weights.sum()
    return prompt_losses(scores, weights).sum() / torch.where(total > 0, total, 1.0)


def prompt_losses(scores: Tensor, weights: Tensor) -> Tensor:
    """(B,) weighted sums of the Bradley-Terry loss over each prompt's preferences, in nats; see `pair_loss`."""
    margins = scores[:, :, None] - scores[:, None, :]
    return (functional.softplus(-margins) * weights).sum(dim=(1, 2))


def pad(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded (B, L) token ids and their (B,) lengths, on the CPU."""
    input_ids = pad_sequence([torch.tensor(ids) for ids in prompts], batch_first=True)
    return input_ids, torch.tensor([len(ids) for ids in prompts])


def batches(prompts: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Yield indices of prompts of similar length, at most `batch_tokens` with padding (or one prompt).

    Longest first, so that a batch that does not fit in memory fails at once.
    """
    batch: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i)):
        if batch and (len(batch) + 1) * len(prompts[batch[0]]) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.no_grad()
def all_features(router: RouterModel, prompts: Sequence[Sequence[int]], batch_tokens: int, tick: Tick) -> Tensor:
    """(P, H) float32 features of P prompts, in their order, on the CPU; `tick` is called after each batch.

    Raises `EngineError` when a feature is not finite: the backbone's states exceed its dtype's range.
    """
    device = router.head.weight.device
    features = torch.empty(len(prompts), router.head.in_features)
    for batch in batches(prompts, batch_tokens):
        input_ids, lengths = pad([prompts[i] for i in batch])
        found = router.features(input_ids.to(device), lengths.to(device)).cpu()
        if not found.isfinite().all():
            raise EngineError(
                f"the backbone's states are not finite in {router.backbone.dtype}; "
                'set dtype = "bfloat16" or "float32" in [router] options'
            )
        features[batch] = found
        tick()
    return features
