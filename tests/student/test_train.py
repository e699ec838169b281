"""Training a student: the tokens in the loss, resuming after interruptions, and the remaining files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from persyn.errors import EngineError, UsageError
from persyn.llm.chat import Chat, load_tokenizer
from persyn.llm.protocols import ModelSpec
from persyn.llm.template import Conversation
from persyn.student import examples, train
from persyn.student.examples import IGNORED, StudentExamples
from persyn.student.train import Notes, TrainingSettings
from tests.four_gpus import OnFourGpus

#: A random two-layer model tolerates larger steps than a real one.
FAST = TrainingSettings(epochs=4, learning_rate=1e-2, batch_size=4)

CONVERSATIONS = [Conversation([{"role": "user", "content": f"What is {n}?"}], f"It is number {n}.") for n in range(12)]


def silent(done: int, total: int, loss: float | None) -> None:
    """Progress that nobody observes."""


def spec_of(folder: Path) -> ModelSpec:
    return ModelSpec("", str(folder))


def trained(tiny: Path, folder: Path, settings: TrainingSettings = FAST, **more: float) -> Notes:
    train.prepare(spec_of(tiny), CONVERSATIONS, settings, folder)
    return train.train(spec_of(tiny), settings, folder, silent, **more)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder / train.MODEL, dtype=torch.float32).state_dict())


def test_only_the_response_and_its_end_are_learned(tiny: Path, tmp_path: Path) -> None:
    chat = Chat(load_tokenizer(spec_of(tiny)))

    counts = examples.write(tmp_path, CONVERSATIONS[:2], chat, max_tokens=100)
    rows = StudentExamples(tmp_path)

    for row, (messages, response, *_) in zip(rows, CONVERSATIONS[:2], strict=True):
        learned = [token for token in row["labels"] if token != IGNORED]
        assert chat.tokenizer.decode(learned) == f"{response}<|im_end|>"
        assert row["input_ids"][: -len(learned)] == chat.prompt_ids(messages)
    assert (counts.rows, counts.left_out) == (2, 0)
    assert counts.response_tokens == sum(token != IGNORED for row in rows for token in row["labels"])


def test_padding_is_neither_read_nor_learned() -> None:
    batch = examples.collate([{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [8]}])

    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]


def test_a_long_conversation_is_left_out_and_counted(tiny: Path, tmp_path: Path) -> None:
    long = Conversation([{"role": "user", "content": "Count."}], "one two " * 100)

    train.prepare(spec_of(tiny), [*CONVERSATIONS, long], FAST, tmp_path)  # the model takes 128 tokens

    assert StudentExamples(tmp_path / train.DATA).counts.left_out == 1
    with pytest.raises(UsageError, match="none of 1 rows fits into 128 tokens"):
        train.prepare(spec_of(tiny), [long], FAST, tmp_path)


def test_training_makes_the_responses_likelier(tiny: Path, tmp_path: Path) -> None:
    notes = trained(tiny, tmp_path)

    assert notes.steps == 12
    assert [step for step, _ in notes.losses] == list(range(1, 13))
    assert notes.losses[-1][1] < notes.losses[0][1] - 1.0
    assert {path.name for path in tmp_path.iterdir()} == {train.MODEL}


def test_a_finished_training_is_not_done_again(tiny: Path, tmp_path: Path) -> None:
    once = trained(tiny, tmp_path)

    again = train.train(spec_of(tiny), FAST, tmp_path, lambda *_: pytest.fail("trained again"))

    assert again == once


class Killed(Exception):
    """The process was killed here."""


def test_a_killed_training_goes_on_and_comes_to_the_same_weights(tiny: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trained(tiny, whole)
    steps: list[int] = []

    def kill_at_seven(done: int, total: int, loss: float | None) -> None:
        steps.append(done)
        if done == 7:
            raise Killed

    train.prepare(spec_of(tiny), CONVERSATIONS, FAST, cut)
    with pytest.raises(Killed):
        train.train(spec_of(tiny), FAST, cut, kill_at_seven, save_seconds=0.0)
    # The last checkpoint is incomplete, so the previous one is used.
    (cut / train.CHECKPOINTS / "checkpoint-6" / "trainer_state.json").write_text('{"global_')
    steps.clear()
    notes = train.train(spec_of(tiny), FAST, cut, lambda done, total, loss: steps.append(done))

    assert steps == list(range(6, 13))
    assert [step for step, _ in notes.losses] == list(range(1, 13))
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(cut)[name]), name


def test_adapters_are_merged_so_that_any_engine_can_serve_the_student(tiny: Path, tmp_path: Path) -> None:
    notes = trained(
        tiny, tmp_path, TrainingSettings(tune="lora", epochs=4, learning_rate=1e-2, batch_size=4, lora_rank=4)
    )

    before = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).state_dict()
    after = weights(tmp_path)
    assert after.keys() == before.keys()
    assert not torch.equal(after["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert notes.losses[-1][1] < notes.losses[0][1]


def test_a_step_may_be_taken_in_parts(tiny: Path, tmp_path: Path) -> None:
    at_once = trained(tiny, tmp_path / "a", TrainingSettings(epochs=1, learning_rate=1e-2, batch_size=4))
    in_parts = trained(
        tiny, tmp_path / "b", TrainingSettings(epochs=1, learning_rate=1e-2, batch_size=4, micro_batch=2)
    )

    assert in_parts.steps == at_once.steps == 3
    assert in_parts.losses[0][1] == pytest.approx(at_once.losses[0][1], rel=1e-4)


def test_further_gpus_of_the_host_make_no_larger_steps(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "TrainingArguments", OnFourGpus)

    assert trained(tiny, tmp_path, TrainingSettings(epochs=1, batch_size=4)).steps == 3  # 12 conversations


def generation(folder: Path, **said: Any) -> dict[str, Any]:
    """A model's generation configuration, optionally overwritten with `said`."""
    file = folder / "generation_config.json"
    if said:
        file.write_text(json.dumps(said))
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_student_whose_makers_name_a_temperature_is_saved(tiny: Path, tmp_path: Path, tune: Any) -> None:
    shutil.copytree(tiny, tmp_path / "student")
    # An invalid combination: a temperature requires sampling.
    generation(tmp_path / "student", temperature=0.6, top_p=0.9, eos_token_id=0)
    settings = TrainingSettings(tune=tune, epochs=1, batch_size=4)

    trained(tmp_path / "student", tmp_path / "training", settings, save_seconds=0.0)

    assert "temperature" not in generation(tmp_path / "training" / train.MODEL)


@pytest.mark.parametrize(
    ("named", "ends"),
    [(0, [0, 2]), ([5, 0], [0, 2, 5]), ([2, 0], [0, 2]), (None, [2])],
    ids=["one", "several", "already among them", "none"],
)
def test_who_serves_a_student_stops_where_it_was_taught_to(tiny: Path, tmp_path: Path, named: Any, ends: Any) -> None:
    shutil.copytree(tiny, tmp_path / "student")
    generation(tmp_path / "student", bos_token_id=1, pad_token_id=7, eos_token_id=named)

    trained(tmp_path / "student", tmp_path, TrainingSettings(epochs=1, batch_size=12))

    found = GenerationConfig.from_pretrained(tmp_path / train.MODEL)
    # <|im_end|>, with which the template ends a response, is token 2; <|endoftext|> is 0.
    assert (found.bos_token_id, found.pad_token_id, found.eos_token_id) == (1, 7, ends)


def test_a_training_that_comes_to_nothing_leaves_no_weights(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="the loss is nan; try a lower learning rate"):
        trained(tiny, tmp_path, TrainingSettings(epochs=4, learning_rate=1e18, batch_size=4))

    assert not (tmp_path / train.MODEL).exists()


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 16 is not a multiple of micro_batch 5"):
        TrainingSettings(micro_batch=5)
