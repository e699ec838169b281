"""The statistics of a response's tokens are those of the plain model in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from persyn.llm.chat import Chat, Conversation
from persyn.llm.protocols import Judge, Judged, ModelSpec
from persyn.llm.scorers import log_likelihood
from persyn.llm.scorers.log_likelihood import StudentScorer
from persyn.llm.scorers.padding import TokenRow
from persyn.method import learnability
from tests.llm import small_models

#: Long enough for several windows; the second one reasoned.
ROWS = [
    TokenRow(0, small_models.ids(60, 0), 12),
    TokenRow(1, small_models.ids(50, 1), 4, 40),
    TokenRow(2, small_models.ids(6, 2), 3),
]


@pytest.fixture(scope="module")
def llama() -> Any:
    return small_models.make("llama", AutoModelForCausalLM, max_position_embeddings=256)


def tokenizer() -> Any:
    """One that writes w3 and w4 around a user's turn, and w1 and w2 around an assistant's."""
    made = small_models.tokenizer()
    made.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}w1 {{ m['content'] }} w2 {% else %}"
        "w3 {{ m['content'] }} w4 {% endif %}{% endfor %}{% if add_generation_prompt %}w1 {% endif %}"
    )
    return made


@torch.inference_mode()
def plainly(model: Any, ids: list[int], begin: int, end: int | None = None) -> Any:
    """(L, 3) log-probability, rank and entropy of ids[begin:end], from the full model's logits in float64."""
    (double,) = (each for each, _ in zip(small_models.in_float64(model, AutoModelForCausalLM), range(1), strict=False))
    log_p = double(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    rows = [
        (log_p[i - 1, ids[i]].item(), 1 + (log_p[i - 1] > log_p[i - 1, ids[i]]).sum().item(), entropy(log_p[i - 1]))
        for i in range(begin, len(ids) if end is None else end)
    ]
    return np.array(rows).reshape(-1, 3)


def entropy(log_p: torch.Tensor) -> float:
    return -sum(p.exp().item() * p.item() for p in log_p if p > -1e9)


def close(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value == pytest.approx(expected[name], abs=2e-3), name


def test_the_statistics_of_every_row_and_part_are_those_of_float64(llama: Any) -> None:
    judged = StudentScorer(llama).judge(ROWS)

    for row, found in zip(ROWS, judged, strict=True):
        assert found.statistics is not None
        answer = row.start if row.answer is None else row.answer
        close(found.statistics["answer"], learnability.summarise(plainly(llama, row.ids, answer, len(row.ids))))
        if row.answer is not None:
            close(found.statistics["reasoning"], learnability.summarise(plainly(llama, row.ids, row.start, row.answer)))
    assert [found.statistics.keys() for found in judged] == [{"answer"}, {"reasoning", "answer"}, {"answer"}]


def test_a_response_is_read_once_more_without_its_prompt_and_by_windows(llama: Any) -> None:
    frame = [90, 91]
    rows = [TokenRow(row.id, row.ids, row.start, row.answer, ("alone", "local"), frame) for row in ROWS]

    judged = StudentScorer(llama).judge(rows)

    for row, found in zip(rows, judged, strict=True):
        assert found.statistics is not None
        response, split = row.ids[row.start :], (row.answer or row.start) - row.start
        alone = plainly(llama, [*frame, *response], 2, 2 + len(response))[:, 0]
        local = np.concatenate(
            [
                plainly(llama, [*frame, *response[max(0, begin - 64) : begin + 32]], 2 + min(begin, 64))[:, 0]
                for begin in range(0, len(response), 32)
            ]
        )
        assert len(local) == len(response)
        for name, tokens in (("alone", alone), ("local", local)):
            assert found.statistics["answer"][name] == pytest.approx(tokens[split:].sum(), abs=1e-3)
            if row.answer is not None:
                assert found.statistics["reasoning"][name] == pytest.approx(tokens[:split].sum(), abs=1e-3)
    # The usual statistics do not depend on them.
    assert [each.value for each in judged] == pytest.approx([each.value for each in StudentScorer(llama).judge(ROWS)])


def test_without_a_frame_the_token_before_the_response_stands_before_it(llama: Any) -> None:
    row = TokenRow(0, ROWS[0].ids, 12, None, ("alone",))

    (found,) = StudentScorer(llama).judge([row])

    alone = plainly(llama, row.ids[11:], 1, len(row.ids) - 11)[:, 0]
    assert found.statistics is not None
    assert found.statistics["answer"]["alone"] == pytest.approx(alone.sum(), abs=1e-3)


def test_tokens_that_a_model_excludes_add_nothing_to_the_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf, -1.0], [2.0, 1.0, 0.0, 3.0]])
    p = logits.double().softmax(-1)

    measured = log_likelihood._measures(logits.clone(), torch.tensor([1, 2]))

    assert measured[:, 0].tolist() == pytest.approx([p[0, 1].log().item(), p[1, 2].log().item()], rel=1e-6)
    assert measured[:, 1].tolist() == [1, 4]  # an equal logit is not above
    expected = [-sum(q * np.log(q) for q in row if q > 0) for row in p.tolist()]
    assert measured[:, 2].tolist() == pytest.approx(expected, rel=1e-6)


def test_more_positions_than_the_head_takes_at_once(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = StudentScorer(llama).judge(ROWS)
    monkeypatch.setattr(log_likelihood, "_HEAD_ROWS", 7)
    monkeypatch.setattr(log_likelihood, "_CACHED", 3 * small_models.VOCABULARY)

    for one, other in zip(whole, StudentScorer(llama).judge(ROWS), strict=True):
        assert one.statistics is not None
        assert other.statistics is not None
        close(one.statistics["answer"], other.statistics["answer"])


def test_the_frame_is_what_the_template_writes_around_the_turns() -> None:
    chat = Chat(tokenizer())
    turns = [{"role": "user", "content": "w10 w11"}, {"role": "assistant", "content": "w12"}]

    frame = chat.frame_ids(Conversation([*turns, {"role": "user", "content": "w13"}], "w20 w21"))

    assert frame == [3, 4, 1, 2, 3, 4, 1]


def test_the_engine_reads_a_response_once_more_only_where_an_option_says_so(llama: Any, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    request = Judge(0, [{"role": "user", "content": small_models.text(9)}], small_models.text(12))

    def statistics(**options: Any) -> dict[str, float]:
        engine = log_likelihood.load(ModelSpec("log_likelihood", str(tmp_path), options=options), lambda: None)
        engine.submit([request])
        (found,) = [result for _ in range(2) for result in engine.step()]
        assert isinstance(found, Judged)
        assert found.statistics is not None
        return found.statistics["answer"]

    plain, more = statistics(), statistics(statistics=["alone"])

    assert more.keys() - plain.keys() == {"alone"}
    # The end token counts, in all of them.
    ids = [3, 4, 1, *small_models.ids(12), 2]
    assert more["alone"] == pytest.approx(plainly(llama, ids, 3)[:, 0].sum(), abs=1e-3)
