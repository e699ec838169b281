"""Train the models of the world of `skills` on first use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from persyn.atomic import replaced
from persyn.llm.protocols import ModelSpec
from persyn.llm.template import Conversation
from persyn.student import train
from persyn.student.train import TrainingSettings
from studies import skills
from studies.skills import DIGITS, LETTERS, SKILLS, WALKS, Teacher


def student(folder: Path) -> Path:
    """The student's folder; it knows the form of a response and how to process digits."""
    return _trained(_blank(folder / "blank"), skills.walking(8_000, seed=0), folder / "student", epochs=3)


def teacher(facts: Teacher, folder: Path) -> Path:
    """A teacher's folder; one that writes letters needs more training."""
    epochs = 4 if facts.alphabet == DIGITS else 10
    return _trained(student(folder), skills.responses(facts, 16_000, seed=1), folder / facts.name, epochs=epochs)


def _trained(begin: Path, rows: Iterator[Conversation], folder: Path, *, epochs: int) -> Path:
    """Train a model with PerSyn's own training of students, for teachers too."""
    spec = ModelSpec("", str(begin))
    settings = TrainingSettings(epochs=epochs, learning_rate=3e-3, batch_size=32)
    if not (folder / train.MODEL).exists():
        print(f"training {folder.name}", flush=True)
        train.prepare(spec, rows, settings, folder)
        train.train(spec, settings, folder, lambda done, total, loss: None)
    return folder / train.MODEL


def _blank(folder: Path) -> Path:
    """An untrained model of 100,000 weights with its tokenizer."""
    if folder.exists():
        return folder
    words = ["<pad>", "<end>", "?", ":", ",", "answer", *DIGITS, *LETTERS, *SKILLS, *WALKS]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="?", model_max_length=64
    )
    fast.chat_template = (
        "{% for turn in messages %}{{ turn.content }} {{ '? ' if turn.role == 'user' else '<end> ' }}{% endfor %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    with replaced(folder) as new:
        LlamaForCausalLM(config).save_pretrained(new)
        fast.save_pretrained(new)
    return folder
