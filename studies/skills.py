"""A small world of known truth: five skills, teachers that have some of them, and a student that has none.

A prompt names a skill and five digits below seven; a skill is a table of 7 x 7 of them, and a response works through
the digits from the left, one look into the table at a time. What a teacher believes of each table, and whether it
writes digits or letters, is all that it is; a model of two layers is trained to be it.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from persyn.llm.protocols import ModelSpec
from persyn.student import train
from persyn.student.examples import Conversation
from persyn.student.train import Settings

#: Each is a function of what came out so far and the next digit, modulo 7.
SKILLS = {
    "plus": lambda a, b: a + b,
    "minus": lambda a, b: a - b,
    "twice": lambda a, b: 2 * a + b,
    "thrice": lambda a, b: a + 3 * b,
    "fourth": lambda a, b: 4 * a + b + 1,
}
#: What every model has learned before anything else: to walk through digits, without any of the skills.
WALKS = {"first": lambda a, b: a, "max": max}
DIGITS, LETTERS = "0123456", "abcdefg"
#: Digits in a prompt.
LENGTH = 5
_BASE = len(DIGITS)
_PAIRS = [(a, b) for a in range(_BASE) for b in range(_BASE)]


@dataclass(frozen=True, slots=True)
class Teacher:
    """What a teacher is."""

    name: str
    #: It is said to have so many parameters, billions; strategies that go by strength go by it.
    params_b: float
    #: How likely each entry of a skill's table is wrong in its belief, by skill; an answer takes four entries.
    wrong: dict[str, float]
    #: What it writes its working in; the answer is always a digit.
    alphabet: str = DIGITS


def _all(wrong: float, **but: float) -> dict[str, float]:
    return {skill: but.get(skill, wrong) for skill in SKILLS}


#: The largest knows everything and writes what the student has never seen; `echo` writes what the student finds
#: likeliest, and knows nothing; two are right about two skills each, and the others about all, more or less.
TEACHERS = (
    Teacher("large", 32.0, _all(0.0), alphabet=LETTERS),
    Teacher("medium", 7.0, _all(0.09)),
    Teacher("small", 1.0, _all(0.18)),
    Teacher("adder", 3.0, _all(0.45, plus=0.0, minus=0.0)),
    Teacher("doubler", 3.0, _all(0.45, twice=0.0, thrice=0.0)),
    Teacher("echo", 2.0, {}),
)


def prompts(n: int, *, seed: int) -> list[tuple[str, list[int]]]:
    """Skills and digits, no two the same."""
    drawn = random.Random(seed)
    found: dict[tuple[str, ...], tuple[str, list[int]]] = {}
    while len(found) < n:
        skill, digits = _draw(drawn, list(SKILLS))
        found[(skill, *map(str, digits))] = skill, digits
    return list(found.values())


def text(skill: str, digits: Sequence[int]) -> str:
    """The prompt."""
    return f"{skill} {' '.join(map(str, digits))}"


def answer(skill: str, digits: Sequence[int]) -> int:
    """The right one."""
    return _walk(digits, _table(None, skill))[-1]


def conversation(facts: Teacher, skill: str, digits: Sequence[int]) -> Conversation:
    """A prompt, and what a teacher should say to it."""
    return _conversation(skill, digits, _table(facts, skill), facts.alphabet)


def student(folder: Path) -> Path:
    """The student's folder, made on first use: it knows the form of a response and how to walk through digits."""
    rows = (_conversation(*_draw(drawn, list(WALKS))) for drawn in [random.Random(0)] for _ in range(8_000))
    return _trained(_blank(folder / "blank"), rows, folder / "student", epochs=3)


def teacher(facts: Teacher, folder: Path) -> Path:
    """The teacher's folder, made on first use."""
    tables = {skill: _table(facts, skill) for skill in SKILLS}
    drawn = random.Random(1)
    rows = (
        _conversation(skill, digits, tables[skill], facts.alphabet)
        for skill, digits in (_draw(drawn, list(SKILLS)) for _ in range(16_000))
    )
    return _trained(student(folder), rows, folder / facts.name, epochs=4)


def _draw(drawn: random.Random, skills: Sequence[str]) -> tuple[str, list[int]]:
    return drawn.choice(skills), [drawn.randrange(_BASE) for _ in range(LENGTH)]


Table = dict[tuple[int, int], int]


def _table(facts: Teacher | None, skill: str) -> Table:
    """What a teacher believes of a skill; None knows it."""
    if facts is not None and not facts.wrong:
        return {(a, b): a for a, b in _PAIRS}
    right = {**SKILLS, **WALKS}[skill]
    table = {(a, b): right(a, b) % _BASE for a, b in _PAIRS}
    if facts is not None:
        drawn = random.Random(zlib.crc32(f"{facts.name} {skill}".encode()))
        for entry, value in table.items():
            if drawn.random() < facts.wrong[skill]:
                table[entry] = (value + drawn.randrange(1, _BASE)) % _BASE
    return table


def _walk(digits: Sequence[int], table: Table) -> list[int]:
    """What comes out after each digit, the first one included."""
    found = [digits[0]]
    for digit in digits[1:]:
        found.append(table[found[-1], digit])
    return found


def _conversation(
    skill: str, digits: Sequence[int], table: Table | None = None, alphabet: str = DIGITS
) -> Conversation:
    so_far = _walk(digits, table or _table(None, skill))
    steps = [
        f"{alphabet[before]} {alphabet[digit]} : {alphabet[after]}"
        for before, digit, after in zip(so_far, digits[1:], so_far[1:], strict=False)
    ]
    return [{"role": "user", "content": text(skill, digits)}], f"{' , '.join(steps)} answer {so_far[-1]}"


def _trained(begin: Path, rows: Iterator[Conversation], folder: Path, *, epochs: int) -> Path:
    """PerSyn's own training of students makes the teachers too."""
    spec = ModelSpec("", str(begin))
    settings = Settings(epochs=epochs, learning_rate=3e-3, batch_size=32)
    if not (folder / train.MODEL).exists():
        print(f"training {folder.name}", flush=True)
        train.prepare(spec, rows, settings, folder)
        train.train(spec, settings, folder, lambda done, total, loss: None)
    return folder / train.MODEL


def _blank(folder: Path) -> Path:
    """A model of 100,000 weights that knows nothing, and its words."""
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
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
