"""Compare encoding each prompt once with encoding it for each pair of teachers: time per step, at equal loss.

python -m benchmarks.router [--teachers 8 19] [--backbone FOLDER] [--gpus 0]
python -m benchmarks.router --kinds

The default backbone is a four-layer Llama with random weights: the ratio hardly depends on it. `--kinds` measures
instead how long fitting every kind of router takes, out-of-fold scores included, on made-up states and words.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, LlamaConfig, LlamaModel

from persyn.method.rewards import preference_weights
from persyn.router.kinds.base import Examples, Prompts
from persyn.router.kinds.crossfit import FOLDS, Bench, one_thread
from persyn.router.kinds.registry import ROUTERS
from persyn.router.model import RouterModel, pair_loss

_PROMPTS, _TOKENS = 4, 64
_ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", type=int, nargs="+", default=[8, 19])
    parser.add_argument("--backbone")
    parser.add_argument("--gpus", type=int, choices=(0, 1), default=0)
    parser.add_argument("--kinds", action="store_true")
    options = parser.parse_args()
    if options.kinds:
        _measure_kinds()
        return
    for n_teachers in options.teachers:
        _measure(n_teachers, options.backbone, torch.device("cuda" if options.gpus else "cpu"))


def _measure(n_teachers: int, folder: str | None, device: torch.device) -> None:
    torch.manual_seed(0)
    router = RouterModel(_backbone(folder).to(device), n_teachers)
    input_ids = torch.randint(0, router.backbone.config.vocab_size, (_PROMPTS, _TOKENS)).to(device)
    lengths = torch.full((_PROMPTS,), _TOKENS, device=device)
    rewards = torch.rand(_PROMPTS, n_teachers, dtype=torch.float64).to(device)
    took: dict[str, list[float]] = {"once": [], "pairs": []}
    losses: dict[str, float] = {}
    for _ in range(_ROUNDS):  # alternating, so that noise affects both
        for name, loss_of in (("once", _once), ("pairs", _by_pairs)):
            seconds, losses[name] = _step(router, lambda loss_of=loss_of: loss_of(router, input_ids, lengths, rewards))  # type: ignore[misc]
            took[name].append(seconds)
    once, pairs = min(took["once"]), min(took["pairs"])
    n_pairs = n_teachers * (n_teachers - 1) // 2
    print(
        f"K = {n_teachers}, {n_pairs} pairs per prompt: once {once:.3f} s, per pair {pairs:.2f} s for a step of "
        f"{_PROMPTS} prompts: {pairs / once:.1f} times; losses {losses['once']:.6f} and {losses['pairs']:.6f}",
        flush=True,
    )


def _measure_kinds(n_prompts: int = 2_500, n_teachers: int = 20, width: int = 576) -> None:
    chance = np.random.default_rng(0)
    topics = chance.normal(size=(n_prompts, n_teachers))
    states = topics @ chance.normal(size=(n_teachers, width)) + chance.normal(size=(n_prompts, width))
    right = 1 / (1 + np.exp(-topics - chance.normal(size=(n_prompts, 1)) - np.linspace(-1, 1, n_teachers)))
    texts = [" ".join(f"word{each}" for each in chance.zipf(1.3, 40) % 5_000) for _ in range(n_prompts)]
    bench = Bench(Prompts({"backbone": states}, texts), Examples((chance.random(right.shape) < right).astype(float)))
    with one_thread():
        for kind in ROUTERS.values():
            began, computed = time.perf_counter(), time.process_time()
            bench.fitted(kind)
            print(
                f"{kind.name}: {time.perf_counter() - began:.1f} s, {time.process_time() - computed:.1f} s of a core, "
                f"for {n_prompts:,} prompts x {n_teachers} teachers, fitted {1 + FOLDS} times",
                flush=True,
            )


def _backbone(folder: str | None) -> Any:
    if folder is not None:
        return AutoModel.from_pretrained(folder, dtype="float32")
    return LlamaModel(
        LlamaConfig(
            vocab_size=8192, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4
        )
    )


def _step(router: RouterModel, loss_of: Callable[[], float]) -> tuple[float, float]:
    router.zero_grad()
    began = time.perf_counter()
    loss = loss_of()
    return time.perf_counter() - began, loss


def _once(router: RouterModel, input_ids: Tensor, lengths: Tensor, rewards: Tensor) -> float:
    weights = torch.from_numpy(preference_weights(rewards.cpu().double().numpy(), "equal")).to(rewards)
    loss = pair_loss(router(input_ids, lengths), weights)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


def _by_pairs(router: RouterModel, input_ids: Tensor, lengths: Tensor, rewards: Tensor) -> float:
    """The usual method: every preference is its own row and encodes its prompt again."""
    better = (rewards[:, :, None] > rewards[:, None, :]).nonzero().tolist()
    total = 0.0
    for start in range(0, len(better), _PROMPTS):
        rows = better[start : start + _PROMPTS]  # a batch with as many rows as the other method has prompts
        prompt = torch.tensor([row[0] for row in rows])
        scores = router(input_ids[prompt], lengths[prompt])
        place = torch.arange(len(rows))
        margin = scores[place, [row[1] for row in rows]] - scores[place, [row[2] for row in rows]]
        loss = functional.softplus(-margin).sum() / len(better)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


if __name__ == "__main__":
    main()
