"""Log-likelihoods of responses agree with the plain model, alone and in batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from persyn.errors import EngineError
from persyn.llm.chat import Chat, load_tokenizer
from persyn.llm.protocols import Engine, Failed, Judge, Judged, Message, ModelSpec, Result
from persyn.llm.scorers import log_likelihood
from persyn.llm.scorers.padding import TokenRow
from persyn.llm.template import Conversation

PROMPTS = ["What is 2+2?", "Name a colour.", "Write one sentence about the sea, please."]
RESPONSES = ["4", "Blue.", "The sea is wide and calm at night, and it is loud and grey in the morning."]


def ask(prompt: str) -> list[Message]:
    return [{"role": "user", "content": prompt}]


def requests() -> list[Judge]:
    return [Judge(i, ask(p), r) for i, (p, r) in enumerate(zip(PROMPTS, RESPONSES, strict=True))]


def results(engine: Engine, *asked: Judge) -> dict[int, Result]:
    engine.submit(asked)
    found: dict[int, Result] = {}
    while engine.pending:
        found |= {result.id: result for result in engine.step()}
    return found


def value(result: Result) -> float:
    assert isinstance(result, Judged), result
    return result.value


def load(folder: Path, **options: object) -> Engine:
    return log_likelihood.load(ModelSpec("log_likelihood", str(folder), options=options), lambda: None)


def plainly(model: torch.nn.Module, ids: list[int], start: int) -> float:
    """The sum of log-probabilities of ids[start:], from the full model's logits."""
    with torch.inference_mode():
        log_probabilities = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return sum(log_probabilities[i - 1, ids[i]].item() for i in range(start, len(ids)))


@pytest.fixture(scope="module", params=["smollm2", "gemma"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def student(folder: Path) -> Engine:
    return load(folder)


@pytest.mark.model
def test_the_value_is_that_of_the_plain_model(folder: Path, student: Engine) -> None:
    chat = Chat(load_tokenizer(ModelSpec("", str(folder))))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    found = results(student, *requests())

    for request in requests():
        ids, start, _ = chat.response_ids(Conversation(request.messages, request.response))
        assert value(found[request.id]) == pytest.approx(plainly(model, ids, start), abs=1e-3)
        # The end token is part of the response.
        assert found[request.id].n_tokens == len(ids) - start
        assert found[request.id].detail == {"dtype": "float32", "attention": "sdpa"}


@pytest.mark.model
def test_the_value_does_not_depend_on_the_company(student: Engine) -> None:
    together = results(student, *requests())

    for request in requests():
        alone = results(student, request)[request.id]
        assert value(alone) == pytest.approx(value(together[request.id]), abs=1e-3)


@pytest.mark.model
def test_what_follows_is_likelier_than_what_does_not(student: Engine) -> None:
    right, wrong = Judge(0, ask("What is the capital of France?"), "Paris"), Judge(1, ask("What is 2+2?"), "Paris")

    found = results(student, right, wrong)

    assert value(found[0]) > value(found[1])


@pytest.mark.model
def test_a_response_beyond_the_context_is_refused_not_cut(smollm2: Path) -> None:
    refused, judged = results(load(smollm2), Judge(0, ask("Count."), "one two " * 5_000), requests()[1]).values()

    assert isinstance(refused, Failed)
    assert refused.reason.startswith("too_long: 10,0")
    assert isinstance(judged, Judged)


@pytest.mark.model
def test_only_the_first_tokens_are_scored_where_an_option_says_so(smollm2: Path) -> None:
    chat = Chat(load_tokenizer(ModelSpec("", str(smollm2))))
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)

    found = results(load(smollm2, response_tokens=3), *requests())

    for request in requests():
        ids, start, _ = chat.response_ids(Conversation(request.messages, request.response))
        assert value(found[request.id]) == pytest.approx(plainly(model, ids[: start + 3], start), abs=1e-3)
    # "4" with its end token is shorter than the limit, so all its tokens count.
    assert [found[i].n_tokens for i in range(3)] == [2, 3, 3]


TINY = {
    "vocab_size": 99,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    "model",
    [
        Gemma2ForCausalLM(Gemma2Config(**TINY, head_dim=8, final_logit_softcapping=0.1)),
        GraniteForCausalLM(GraniteConfig(**TINY, logits_scaling=8.0)),
    ],
    ids=["soft-capped", "scaled"],
)
def test_logits_are_what_the_architecture_makes_of_them(model: Gemma2ForCausalLM | GraniteForCausalLM) -> None:
    ids = [int(token) for token in torch.randint(99, (40,), generator=torch.Generator().manual_seed(0))]
    rows = [TokenRow(0, ids, 5), TokenRow(1, ids[:20], 19)]

    judged = log_likelihood.StudentScorer(model.eval()).judge(rows)

    for row, result in zip(rows, judged, strict=True):
        assert result.value == pytest.approx(plainly(model, row.ids, row.start), abs=1e-3)
    assert [result.n_tokens for result in judged] == [35, 1]


def test_more_positions_than_the_head_takes_at_once() -> None:
    model = GraniteForCausalLM(GraniteConfig(**TINY, max_position_embeddings=4096)).eval()
    ids = [int(token) for token in torch.randint(99, (2_500,), generator=torch.Generator().manual_seed(0))]

    (result,) = log_likelihood.StudentScorer(model).judge([TokenRow(0, ids, 10)])

    assert result.value == pytest.approx(plainly(model, ids, 10), rel=1e-5)


def test_an_unknown_option_is_refused_by_name() -> None:
    valid = "dtype, batch_tokens, add_bos, chat_template_kwargs, response_tokens"
    with pytest.raises(EngineError, match=f"`batch`.*{valid}"):
        load(Path("nowhere"), batch=3)


def test_a_missing_model_is_an_engine_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no tokenizer"):
        load(tmp_path)
