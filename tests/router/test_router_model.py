"""The loss over all pairs of a batch, and the router's input for a prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModel

from persyn.llm.chat import Chat, load_tokenizer
from persyn.llm.protocols import ModelSpec
from persyn.method.rewards import preference_weights
from persyn.router import model
from persyn.router.model import Reader, RouterModel, pair_loss

NAN = float("nan")
PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
REWARDS = torch.tensor([[0.9, 0.1, 0.5, 0.1], [NAN, 0.2, 0.7, 0.2], [0.3, 0.3, NAN, 0.3]], dtype=torch.float64)


def weigh(rewards: list[list[float]], preferences: str) -> torch.Tensor:
    return torch.from_numpy(preference_weights(np.array(rewards), preferences))


@pytest.fixture
def router(tiny: Path) -> RouterModel:
    torch.manual_seed(1)
    return model.load(ModelSpec("router_fit", str(tiny)), "float32", 4)


def test_the_loss_as_worked_by_hand() -> None:
    scores = torch.tensor([[1.0, 0.0, 3.0]])

    # 0 over 1 with a margin of 1, 0 over 2 with one of -2
    expected = (torch.log1p(torch.exp(torch.tensor(-1.0))) + torch.log1p(torch.exp(torch.tensor(2.0)))) / 2

    found = pair_loss(scores, weigh([[0.5, 0.2, 0.2]], "equal"))
    assert found.item() == pytest.approx(expected.item())


def test_a_preference_weighs_as_much_as_its_rewards_differ() -> None:
    scores = torch.tensor([[1.0, 0.0, 3.0]])
    rewards = [[0.9, 0.8, 0.2]]

    # 0 over 1 with a margin of 1 and weight 0.1, 0 over 2 with -2 and 0.7, 1 over 2 with -3 and 0.6
    losses = torch.log1p(torch.exp(torch.tensor([-1.0, 2.0, 3.0])))
    expected = (losses * torch.tensor([0.1, 0.7, 0.6])).sum() / 1.4

    assert pair_loss(scores, weigh(rewards, "weighted")).item() == pytest.approx(expected.item())


def test_the_loss_of_no_preference_is_zero_and_can_be_stepped_on() -> None:
    scores = torch.zeros(1, 3, requires_grad=True)

    loss = pair_loss(scores, weigh([[1.0, NAN, 1.0]], "weighted"))
    loss.backward()

    assert loss.item() == 0.0
    assert scores.grad is not None
    assert not scores.grad.any()


@pytest.mark.parametrize("preferences", ["weighted", "equal"])
def test_one_pass_over_a_prompt_gives_the_loss_and_gradient_of_each_of_its_pairs(
    router: RouterModel, preferences: str
) -> None:
    once = pair_loss(router(*model.pad(PROMPTS)), weigh(REWARDS.tolist(), preferences))
    once.backward()
    found = {name: p.grad.clone() for name, p in router.named_parameters() if p.grad is not None}
    router.zero_grad()

    losses, weights = [], []
    for ids, rewards in zip(PROMPTS, REWARDS.tolist(), strict=True):
        for winner in range(4):
            for loser in range(4):
                if rewards[winner] > rewards[loser]:
                    scores = router(torch.tensor([ids]), torch.tensor([len(ids)]))[0]
                    losses.append(-functional.logsigmoid(scores[winner] - scores[loser]))
                    weights.append(rewards[winner] - rewards[loser] if preferences == "weighted" else 1.0)
    assert len(losses) == 5 + 2
    loss = (torch.stack(losses) * torch.tensor(weights)).sum() / sum(weights)
    loss.backward()

    assert once.item() == pytest.approx(loss.item(), rel=1e-5)
    assert {"head.weight", "backbone.layers.0.self_attn.q_proj.weight"} <= found.keys()
    for name, parameter in router.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_frozen_backbone_is_read_half_way_up_over_all_tokens_of_the_prompt(tiny: Path) -> None:
    whole = AutoModel.from_pretrained(tiny, dtype=torch.float32)
    router = model.load(ModelSpec("router_fit", str(tiny)), "float32", 4, "middle")

    with torch.no_grad():
        found = router.features(*model.pad(PROMPTS))  # of different lengths

        assert len(router.backbone.layers) == 1  # of two: the upper ones are not computed
        for ids, row in zip(PROMPTS, found, strict=True):
            states = whole(torch.tensor([ids]), output_hidden_states=True).hidden_states[1]
            torch.testing.assert_close(row, whole.norm(states)[0].mean(dim=0), rtol=0, atol=1e-5)


def test_a_prompt_scores_the_same_alone_and_in_a_batch(router: RouterModel) -> None:
    together = router(*model.pad(PROMPTS))

    for i, ids in enumerate(PROMPTS):
        torch.testing.assert_close(router(*model.pad([ids]))[0], together[i], rtol=0, atol=1e-5)


def test_features_come_in_the_order_of_the_prompts_however_they_are_batched(router: RouterModel) -> None:
    ticks: list[int] = []

    features = model.all_features(router, PROMPTS, 5, lambda: ticks.append(1))

    torch.testing.assert_close(features, router.features(*model.pad(PROMPTS)), rtol=0, atol=1e-5)
    assert len(ticks) == 3


def test_batches_are_longest_first_and_bounded_with_their_padding() -> None:
    prompts = [[0] * n for n in (2, 9, 3, 4, 3)]

    assert list(model.batches(prompts, 8)) == [[1], [3, 2], [4, 0]]
    assert list(model.batches([], 8)) == []


def test_a_long_prompt_keeps_its_head_and_its_tail(tiny: Path) -> None:
    chat = Chat(load_tokenizer(ModelSpec("router", str(tiny))))
    messages = [{"role": "user", "content": "Begin. " + "word " * 500 + "End?"}]
    whole = chat.prompt_ids(messages)

    assert Reader(chat, 51).ids(messages) == whole[:25] + whole[-26:]
    assert Reader(chat, 1).ids(messages) == whole[-1:]
    assert Reader(chat, len(whole)).ids(messages) == whole


def test_a_conversation_that_the_template_refuses_is_read_as_plain_text(tiny: Path) -> None:
    tokenizer = load_tokenizer(ModelSpec("router", str(tiny)))
    tokenizer.chat_template = "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}!"
    messages = [{"role": "user", "content": "1 + 2?"}, {"role": "user", "content": "3 + 4?"}]

    ids = Reader(Chat(tokenizer), 100).ids(messages)

    assert tokenizer.decode(ids) == "User: 1 + 2?\nUser: 3 + 4?\nAssistant:"


def test_the_head_stays_float32_over_a_bfloat16_backbone(tiny: Path) -> None:
    router = model.load(ModelSpec("router_fit", str(tiny)), "bfloat16", 4)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = router(*model.pad(PROMPTS))

    assert router.backbone.dtype == torch.bfloat16
    assert scores.dtype == torch.float32
