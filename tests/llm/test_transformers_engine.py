from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from persyn.config import RepetitionDetection
from persyn.errors import EngineError
from persyn.llm.chat import Chat, load_tokenizer
from persyn.llm.protocols import Engine, Generate, Generated, ModelSpec, Sampling
from persyn.llm.teachers import sampling, transformers_engine
from persyn.llm.teachers.generation import EncodedPrompt
from tests.llm.asking import answer, ask, generated, reason

CPU = torch.device("cpu")
QUESTIONS = ["What is 3 plus 4?", "Name a colour.", "Write one sentence about the sea, please.", "Hi!"]


def load(folder: Path, **options: Any) -> Engine:
    return transformers_engine.load(ModelSpec("transformers", str(folder), options=options), lambda: None)


@pytest.fixture(scope="module")
def teacher(smollm2: Path) -> Engine:
    return load(smollm2, batch_size=4, max_model_len=256)


def test_noise_makes_the_arg_max_a_draw_from_the_distribution() -> None:
    rows = 4000
    add_noise = sampling.SeededGumbelNoise(range(rows), CPU)
    scores = torch.tensor([[0.1, 0.2, 0.7, 0.0]]).log().expand(rows, 4)

    counts = Counter(add_noise(torch.empty(rows, 0), scores).argmax(1).tolist())

    # Standard deviations: 19, 25, 29.
    assert abs(counts[0] - 400) < 95
    assert abs(counts[1] - 800) < 125
    assert abs(counts[2] - 2800) < 145
    assert counts[3] == 0


def test_a_rows_noise_is_its_own() -> None:
    scores = torch.zeros(2, 50)
    alone = sampling.SeededGumbelNoise([8], CPU)
    together = sampling.SeededGumbelNoise([7, 8], CPU)

    for _ in range(3):
        noisy = together(torch.empty(2, 0), scores)
        assert torch.equal(alone(torch.empty(1, 0), scores[:1])[0], noisy[1])
        assert not torch.equal(noisy[0], noisy[1])


def test_the_penalty_sees_the_row_and_not_its_padding() -> None:
    how = Sampling(temperature=0, repetition_penalty=2.0)
    batch = [EncodedPrompt(Generate(i, [], how, seed=0), ids, max_tokens=8) for i, ids in enumerate([[1, 2, 3], [3]])]
    penalise: Any = sampling.processors(batch, CPU)
    # The second row is padded with token 0 on the left, and has generated a 4.
    ids = torch.tensor([[1, 2, 3, 4], [0, 0, 3, 4]])

    scores = penalise(ids, torch.tensor([[2.0, 2.0, 2.0, -2.0, 2.0]] * 2))

    assert scores.tolist() == [[2.0, 1.0, 1.0, -4.0, 1.0], [2.0, 2.0, 2.0, -4.0, 1.0]]


def test_tokens_of_the_response_are_penalised_once_and_as_often_as_they_occur() -> None:
    how = Sampling(temperature=0, presence_penalty=0.5, frequency_penalty=0.25)
    penalise: Any = sampling.processors([EncodedPrompt(Generate(1, [], how, seed=0), [1, 2], max_tokens=8)], CPU)

    # The prompt is 1 2; the response so far is 3 4 3.
    scores = penalise(torch.tensor([[1, 2, 3, 4, 3]]), torch.full((1, 5), 2.0))

    assert scores.tolist() == [[2.0, 2.0, 2.0, 1.0, 1.25]]


def test_min_p_excludes_by_the_share_of_the_likeliest_token() -> None:
    how = Sampling(temperature=1.0, min_p=0.5)
    draw: Any = sampling.processors([EncodedPrompt(Generate(1, [], how, seed=0), [1], max_tokens=8)], CPU)

    # Half of 0.5 is 0.25: 0.3 stays and 0.2 goes.
    scores = draw(torch.empty(1, 0), torch.tensor([[0.5, 0.3, 0.2]]).log())

    assert scores.isinf().tolist() == [[False, False, True]]


def test_a_response_that_repeats_itself_ends_there_and_fails(learned: Path) -> None:
    how = {"temperature": 0, "max_tokens": 30}
    detection = RepetitionDetection(max_pattern_size=2, min_count=3)
    engine = load(learned)

    results = answer(engine, ask("Hi!", 1, **how, repetition_detection=detection), ask("Hi!", 2, **how))

    assert reason(results[1]) == "repetition: the response repeats itself after 4 tokens"
    assert generated(results[2]).response_tokens == 30


@pytest.mark.model
def test_a_greedy_response_is_the_models_own_whatever_batch_it_is_in(teacher: Engine, smollm2: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    expected = []
    for question in QUESTIONS:
        turn = [{"role": "user", "content": question}]
        ids: Any = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        written = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        expected.append((tokenizer.decode(written, skip_special_tokens=True).strip(), ids.shape[1], len(written)))

    results = answer(teacher, *[ask(q, i, temperature=0, max_tokens=12) for i, q in enumerate(QUESTIONS)])

    got = [generated(results[i]) for i in range(len(QUESTIONS))]
    assert [(r.text, r.prompt_tokens, r.response_tokens) for r in got] == expected
    assert {r.finish_reason for r in got} == {"stop", "length"}
    for result in got:
        assert (result.finish_reason == "length") == (result.response_tokens == 12)


@pytest.mark.model
def test_a_sampled_response_follows_from_its_seed_alone(teacher: Engine) -> None:
    how = {"temperature": 1.0, "top_p": 0.95, "top_k": 50, "max_tokens": 10}
    alone = generated(answer(teacher, ask(QUESTIONS[2], 1, seed=11, **how))[1])
    others = [ask(q, 10 + i, seed=i, **how) for i, q in enumerate(QUESTIONS)]

    among = answer(teacher, *others, ask(QUESTIONS[2], 1, seed=11, **how), ask(QUESTIONS[2], 2, seed=12, **how))

    assert generated(among[1]).text == alone.text
    assert generated(among[2]).text != alone.text


@pytest.mark.model
def test_a_stop_text_ends_a_response_and_is_no_part_of_it(teacher: Engine) -> None:
    whole = generated(answer(teacher, ask(QUESTIONS[2], temperature=0, max_tokens=24))[0])
    stop = whole.text[10:16]

    cut = generated(answer(teacher, ask(QUESTIONS[2], temperature=0, max_tokens=24, stop=[stop]))[0])

    assert cut.text == whole.text[: whole.text.index(stop)].strip()
    assert cut.finish_reason == "stop"
    assert cut.response_tokens is not None
    assert cut.response_tokens < 12


@pytest.mark.model
def test_requests_of_different_sampling_are_served_together(teacher: Engine) -> None:
    results = answer(
        teacher,
        ask("Hi!", 1, temperature=0, max_tokens=3),
        ask("Hi!", 2, temperature=0, max_tokens=5),
        ask("Hi!", 3, temperature=0.8, max_tokens=4, stop=["zzz"]),
        ask("Hi!", 4, temperature=-1.0),
        ask("Hi!", 5, temperature=0, max_tokens=0),
    )

    assert [generated(results[i]).response_tokens for i in (1, 2, 3)] == [3, 5, 4]
    assert generated(results[2]).text.startswith(generated(results[1]).text)
    assert reason(results[4]).startswith("bad_request: ")
    assert reason(results[5]).startswith("bad_request: max_tokens must be at least 1")


@pytest.mark.model
def test_what_does_not_fit_fails_and_what_barely_fits_is_cut(teacher: Engine) -> None:
    def padded(words: int, request_id: int, max_tokens: int) -> Generate:
        turns = [("user", "Read this." + " sea" * words), ("assistant", "I have read it."), ("user", QUESTIONS[2])]
        messages = [{"role": role, "content": content} for role, content in turns]
        return Generate(request_id, messages, Sampling(temperature=0, max_tokens=max_tokens), seed=0)

    unpadded = generated(answer(teacher, padded(0, 0, 3))[0]).prompt_tokens
    assert unpadded is not None
    requests = [padded(300, 1, 50), padded(253 - unpadded, 2, 50), padded(0, 3, 4)]

    results = answer(teacher, *requests)

    assert reason(results[1]).startswith("too_long: ")
    assert reason(results[1]).endswith("the model takes 256 including the response")
    assert generated(results[2]).prompt_tokens == 253
    assert (generated(results[2]).response_tokens, generated(results[2]).finish_reason) == (3, "length")
    assert isinstance(results[3], Generated)


@pytest.fixture
def learned(smollm2: Path, tmp_path: Path) -> Path:
    """A GPT-2 with random weights and a maximum of 64 positions."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=49152, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(tmp_path)
    return tmp_path


def test_a_long_prompt_is_not_carried_past_the_models_positions_by_a_short_one(learned: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(learned)
    chat = Chat(load_tokenizer(ModelSpec("", str(learned))))
    engine = transformers_engine.TransformersEngine(model.eval(), chat, batch_size=4, context=None, tick=lambda: None)
    requests = [ask("Hi!", 0, temperature=0, max_tokens=12), ask("Hi!" + " sea" * 20, 1, temperature=0, max_tokens=12)]
    requests += [ask("Hi!" + " sea" * 28, 2, temperature=0, max_tokens=99)]
    lengths = [len(chat.prompt_ids(request.messages)) for request in requests]
    assert lengths == [32, 52, 60]

    batches = list(engine.compute(requests))

    # 60 tokens leave room for 4; 52 and 12 fit exactly.
    assert [[result.id for result in batch] for batch in batches] == [[2], [1, 0]]
    assert [generated(result).response_tokens for batch in batches for result in batch] == [4, 12, 12]


@pytest.mark.model
def test_a_conversation_the_template_refuses_fails_alone(teacher: Engine) -> None:
    bad = Generate(1, [{"role": "user"}], Sampling(), 0)

    results = answer(teacher, bad, ask("Hi!", 2, max_tokens=2))

    assert reason(results[1]).startswith("bad_request: the chat template rejects the conversation")
    assert isinstance(results[2], Generated)


@pytest.mark.model
def test_nothing_but_space_is_an_empty_response(teacher: Engine) -> None:
    (result,) = answer(teacher, ask(QUESTIONS[2], temperature=0, stop=[" ", "a", "e", "i", "o", "T"])).values()

    assert reason(result).startswith("empty: ")


@pytest.mark.model
def test_a_base_model_begins_with_bos_and_ends_before_the_next_turn(gemma: Path) -> None:
    shots = []
    for number in (2, 4, 6, 8):
        shots += [
            {"role": "user", "content": f"{number} plus 1?"},
            {"role": "assistant", "content": f"{number + 1}"},
        ]
    request = Generate(1, [*shots, {"role": "user", "content": "5 plus 1?"}], Sampling(max_tokens=40, temperature=0), 0)

    result = generated(answer(load(gemma), request)[1])

    assert result.finish_reason == "stop"
    assert result.text.isdigit()
    assert "User" not in result.text


@pytest.mark.model
def test_reasoning_that_its_template_opens_is_limited_and_split(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "reasoner")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if add_generation_prompt %}<think>\n{% endif %}")
    asked = [ask(q, i, temperature=1.0, max_tokens=16) for i, q in enumerate(QUESTIONS[:2])]
    limits = [structs.replace(asked[1].sampling, max_reasoning_tokens=n) for n in (0, 5)]
    asked += [structs.replace(asked[1], id=10 + i, sampling=how) for i, how in enumerate(limits)]

    results = answer(load(folder), *asked)

    # The random model never closes its reasoning by itself, and the rows of a batch have their own limits.
    assert reason(results[1]).startswith("unfinished_reasoning: 16 tokens of reasoning and no answer")
    n_closing = len(AutoTokenizer.from_pretrained(folder)("</think>")["input_ids"])
    none, some = generated(results[10]), generated(results[11])
    assert (none.reasoning, none.reasoning_tokens) == (None, n_closing)
    assert some.reasoning_tokens == 5 + n_closing
    assert some.reasoning
    assert some.response_tokens == none.response_tokens == 16
    assert "think" not in some.text + none.text


@pytest.mark.model
def test_an_engine_tells_what_it_was_given_wrongly(smollm2: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"batch.*valid options: dtype, batch_size"):
        load(smollm2, batch=3)
    with pytest.raises(EngineError, match="no tokenizer"):
        load(tmp_path)
