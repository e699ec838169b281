"""Reward-model logits agree with plain transformers, one row at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from persyn.errors import EngineError
from persyn.llm.protocols import Engine, Failed, Judge, Judged, Message, ModelSpec, Result
from persyn.llm.scorers import reward_model
from tests import tiny_models

RESPONSES = ["4", "Blue.", "Four, of course.", "I do not know.", "The sea is wide. " * 8, "No", "Yes, " * 20, "!"]


def ask(prompt: str) -> list[Message]:
    return [{"role": "user", "content": prompt}]


def requests() -> list[Judge]:
    return [Judge(i, ask("What is 2+2?"), response) for i, response in enumerate(RESPONSES)]


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return tiny_models.reward_model(tmp_path_factory.mktemp("reward"), tokenizer)


def load(folder: Path, **options: object) -> Engine:
    return reward_model.load(ModelSpec("reward_model", str(folder), options=options), lambda: None)


def values(engine: Engine, *asked: Judge) -> dict[int, float]:
    return {id: result.value for id, result in results(engine, *asked).items() if isinstance(result, Judged)}


def results(engine: Engine, *asked: Judge) -> dict[int, Result]:
    engine.submit(asked)
    found: dict[int, Result] = {}
    while engine.pending:
        found |= {result.id: result for result in engine.step()}
    return found


def plainly(folder: Path, rows: list[list[int]]) -> list[float]:
    """The logit of each row alone, read at its last token."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    model.config.pad_token_id = None
    with torch.inference_mode():
        return [model(torch.tensor([row])).logits[0, 0].item() for row in rows]


def test_the_value_is_the_plain_logit_of_the_chat(folder: Path, tokenizer: Any) -> None:
    rows = [
        tokenizer.apply_chat_template(
            [*request.messages, {"role": "assistant", "content": request.response}], return_dict=False
        )
        for request in requests()
    ]

    found = values(load(folder), *requests())

    assert [found[i] for i in range(8)] == pytest.approx(plainly(folder, rows), abs=1e-4)
    assert len({round(value, 3) for value in found.values()}) == 8


def test_a_batch_of_eight_judges_as_eight_batches_of_one(folder: Path) -> None:
    assert values(load(folder), *requests()) == pytest.approx(
        values(load(folder, batch_tokens=1), *requests()), abs=1e-4
    )


def test_the_last_token_counts_also_where_it_is_the_padding(tmp_path: Path, tokenizer: Any, smollm2: Path) -> None:
    # Without a template, a conversation ends with EOS, which is also SmolLM2's padding token.
    bare = AutoTokenizer.from_pretrained(smollm2)
    bare.chat_template = None
    folder = tiny_models.reward_model(tmp_path, bare, pad_token_id=bare.eos_token_id)
    rows = [
        bare(f"User: What is 2+2?\nAssistant: {response}", add_special_tokens=False)["input_ids"] + [bare.eos_token_id]
        for response in RESPONSES
    ]

    found = values(load(folder), *requests())

    assert [found[i] for i in range(8)] == pytest.approx(plainly(folder, rows), abs=1e-4)


def test_a_conversation_beyond_the_context_is_refused(folder: Path) -> None:
    found = results(load(folder), Judge(0, ask("Count."), "one two " * 300), requests()[1])

    assert isinstance(found[0], Failed)
    assert found[0].reason.startswith("too_long: 6")
    assert isinstance(found[1], Judged)


def test_the_detail_says_how_it_was_computed(folder: Path) -> None:
    (result,) = results(load(folder, dtype="bfloat16"), requests()[0]).values()

    assert isinstance(result, Judged)
    assert result.detail == {"dtype": "bfloat16", "attention": "sdpa"}


def test_a_classifier_of_several_labels_is_no_reward_model(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(EngineError, match="expected 1 label, found 2"):
        load(tiny_models.reward_model(tmp_path, tokenizer, num_labels=2))


def test_an_encoder_needs_a_template_that_writes_what_it_judges_at(tmp_path: Path, smollm2: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.save_pretrained(tmp_path / "templated")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = BertConfig(vocab_size=len(tokenizer), num_labels=1, **sizes)
    for folder in ("templated", "bare"):
        BertForSequenceClassification(config).save_pretrained(tmp_path / folder)

    with pytest.raises(EngineError, match=r"bare' is an encoder.*\[CLS\]; give its tokenizer a chat template"):
        load(tmp_path / "bare")
    assert values(load(tmp_path / "templated"), requests()[0]).keys() == {0}


@pytest.mark.model
def test_a_language_model_is_no_reward_model(smollm2: Path) -> None:
    with pytest.raises(EngineError, match="is not a reward model"):
        load(smollm2)


def test_an_unknown_option_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(EngineError, match=r"`batch`.*dtype, batch_tokens, add_bos"):
        load(folder, batch=3)
