"""Real vLLM in this process, loaded once for all tests."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from msgspec import structs

from persyn.config import RepetitionDetection
from persyn.errors import EngineError, HostLacks, PermanentError
from persyn.llm import host
from persyn.llm.chat import Chat, load_tokenizer
from persyn.llm.options import VllmOptions
from persyn.llm.protocols import Engine, Generate, Generated, ModelSpec, Sampling
from persyn.llm.teachers import generation, transformers_engine, vllm_engine, vllm_reasoning
from persyn.llm.tool_forms import Said
from tests import tiny_models
from tests.llm import lora, reasoning_families
from tests.llm.asking import answer, ask, generated, reason
from tests.llm.families import tokenizer
from tests.llm.reasoning_families import FAMILIES
from tests.llm.test_tool_template import TOOLS, call_of
from tests.llm.tool_families import HERMES

pytestmark = [
    pytest.mark.model,
    pytest.mark.vllm,
    # vLLM warns at import and load about its own dependencies.
    pytest.mark.filterwarnings("ignore"),
]

REASONS = {"reasoning_effort": "high", "max_reasoning_tokens": 5}
QUESTIONS = ["What is 3 plus 4?", "Name a colour.", "Write one sentence about the sea, please.", "Hi!"]


class Complaints(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture(scope="module")
def complaints() -> Iterator[list[logging.LogRecord]]:
    """vLLM's warnings."""
    pytest.importorskip("vllm")
    handler = Complaints()
    logging.getLogger("vllm").addHandler(handler)
    yield handler.records
    logging.getLogger("vllm").removeHandler(handler)


@pytest.fixture(scope="module")
def reasoner(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with a template that opens a block of reasoning for an effort, and closes it for the effort `none`."""
    folder = tmp_path_factory.mktemp("reasoner")
    for file in smollm2.iterdir():
        (folder / file.name).symlink_to(file)
    template = folder / "chat_template.jinja"
    text = template.read_text()
    template.unlink()
    block = "<think>\n{{ '\n</think>\n\n' if reasoning_effort == 'none' }}"
    template.write_text(text + "{% if add_generation_prompt and reasoning_effort %}" + block + "{% endif %}")
    return folder


@pytest.fixture(scope="module")
def teacher(reasoner: Path, complaints: list[logging.LogRecord]) -> Engine:
    lengths = {"max_model_len": 256, "max_num_batched_tokens": 256, "max_num_seqs": 4}
    options = {**lengths, "kv_cache_gib": 0.5, "enforce_eager": True, "dtype": "float32"}
    options["engine_args"] = {"block_size": 32, "enable_prefix_caching": False}
    return vllm_engine.load(ModelSpec("vllm", str(reasoner), options=options), lambda: None)


@pytest.fixture(scope="module")
def other(reasoner: Path) -> Engine:
    """The same model on transformers."""
    return transformers_engine.load(ModelSpec("transformers", str(reasoner)), lambda: None)


def test_it_writes_what_transformers_writes(teacher: Engine, other: Engine) -> None:
    requests = [ask(q, i, temperature=0, max_tokens=10) for i, q in enumerate(QUESTIONS)]
    # Its reasoning is closed after five tokens, and then it ends its turn.
    requests.append(ask(QUESTIONS[0], 9, temperature=0, max_tokens=14, **REASONS))
    expected = answer(other, *requests)

    results = answer(teacher, *requests)

    for request in requests[:4]:
        ours, theirs = generated(results[request.id]), generated(expected[request.id])
        assert structs.replace(ours, seconds=0.0) == structs.replace(theirs, seconds=0.0)
    # vLLM may write one token more than the limit; the closing marker has three.
    assert reason(expected[9]).startswith(
        "unfinished_reasoning: 8 tokens of reasoning and no answer, finish reason stop"
    )
    assert re.match("unfinished_reasoning: [89] tokens of reasoning and no answer, finish", reason(results[9]))


def test_adapters_share_a_batch_and_write_what_they_write_on_transformers(smollm2: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    base = tiny_models.served_model(tmp_path / "base", load_tokenizer(ModelSpec("vllm", str(smollm2))))
    adapters = [str(lora.make(base, tmp_path / f"rank {rank}", seed=rank, rank=rank)) for rank in (4, 8)]
    request = ask(QUESTIONS[2], temperature=0, max_tokens=6)
    asked = [structs.replace(request, id=n, adapter=each) for n, each in enumerate([None, *adapters])]
    size = {"max_model_len": 64, "max_num_batched_tokens": 64, "max_num_seqs": 4, "kv_cache_gib": 0.1}
    options = {**size, "enforce_eager": True, "dtype": "float32"}

    # In a process of its own: vLLM keeps one model per process, and the end of another one would end the teacher.
    served = ModelSpec("vllm", str(base), None, 0, options, adapters)
    results = host.ask(served, asked, tmp_path, load_seconds=300, stall_seconds=300)
    ours = {result.id: result for result in results}

    spec = ModelSpec("transformers", str(base), adapters=adapters)
    theirs = answer(transformers_engine.load(spec, lambda: None), *asked)
    # With random weights, the model alone may write nothing but space.
    texts, others = ([getattr(found[n], "text", "") for n in range(3)] for found in (ours, theirs))
    assert texts == others
    assert len({*texts}) == 3


def test_vllms_own_arguments_reach_it(teacher: Engine, smollm2: Path) -> None:
    assert isinstance(teacher, vllm_engine.VllmEngine)
    cache = teacher._engine.vllm_config.cache_config
    assert (cache.block_size, cache.enable_prefix_caching) == (32, False)

    spec = ModelSpec("vllm", str(smollm2), options={"engine_args": {"swap_space": 4}})
    with pytest.raises(HostLacks, match=r"engine_args\.swap_space is unknown to vLLM"):
        vllm_engine.load(spec, lambda: None)


def test_short_responses_leave_before_long_ones_and_the_batch_refills(teacher: Engine) -> None:
    assert teacher.window == 8
    lengths = [40, 2, 2, 2, 2, 2]
    teacher.submit([ask("Tell me a story.", i, temperature=0, max_tokens=n) for i, n in enumerate(lengths)])
    order = []
    while teacher.pending:
        order += [result.id for result in teacher.step()]

    # Four at a time: the last two are added while the first is being generated.
    assert order[-1] == 0
    assert sorted(order) == list(range(6))


def test_a_sampled_response_follows_from_its_seed(teacher: Engine) -> None:
    how = {"temperature": 1.0, "top_p": 0.95, "top_k": 50, "max_tokens": 10}
    alone = generated(answer(teacher, ask(QUESTIONS[2], 1, seed=11, **how))[1])

    among = answer(teacher, *[ask(QUESTIONS[2], i, seed=10 + i, **how) for i in range(4)])

    assert generated(among[1]).text == alone.text
    assert len({generated(result).text for result in among.values()}) == 4


def test_penalties_and_repetitions_are_those_of_transformers(teacher: Engine, other: Engine) -> None:
    how = {"temperature": 0, "max_tokens": 24}
    penalties = {"presence_penalty": 1.5, "frequency_penalty": 1.0, "repetition_penalty": 1.1}
    detection = RepetitionDetection(max_pattern_size=12, min_count=2)
    asked = [
        ask(QUESTIONS[2], 1, **how, **penalties),
        ask(QUESTIONS[2], 2, **how, frequency_penalty=-2.0, repetition_detection=detection),
        ask(QUESTIONS[2], 3, **how),
    ]

    ours, theirs = answer(teacher, *asked), answer(other, *asked)

    assert generated(ours[1]).text == generated(theirs[1]).text != generated(ours[3]).text
    assert reason(ours[2]) == reason(theirs[2])
    assert reason(ours[2]).startswith("repetition: ")


def test_a_stop_text_ends_a_response_and_is_no_part_of_it(teacher: Engine) -> None:
    whole = generated(answer(teacher, ask(QUESTIONS[2], temperature=0, max_tokens=24))[0])
    stop = whole.text[10:16]

    cut = generated(answer(teacher, ask(QUESTIONS[2], temperature=0, max_tokens=24, stop=[stop]))[0])

    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)].strip(), "stop")


def test_a_response_keeps_to_its_schema_and_writes_no_blanks(teacher: Engine) -> None:
    kind = {"type": "integer", "enum": list(range(1, 6))}
    schema = {"type": "object", "properties": {"rating": kind}, "required": ["rating"], "additionalProperties": False}
    how = {"temperature": 0, "max_tokens": 12, "reasoning_effort": "none"}
    asked = [ask(question, i, **how) for i, question in enumerate(QUESTIONS)]

    held = answer(teacher, *[structs.replace(request, schema=schema) for request in asked])
    free = answer(teacher, *asked)

    forms = {f'{{"rating":{rating}}}' for rating in range(1, 6)}
    assert {generated(result).text for result in held.values()} <= forms
    assert not forms & {generated(result).text for result in free.values()}


def test_what_cannot_be_served_fails_alone(teacher: Engine) -> None:
    results = answer(
        teacher,
        ask("sea " * 300, 1),
        Generate(2, [{"role": "user"}], Sampling(), 0),
        ask("Hi!", 3, temperature=-1.0),
        ask("Hi!", 4, top_p=2.0),
        ask("Hi!", 5, temperature=0, max_tokens=2),
        ask(QUESTIONS[2], 6, temperature=0, stop=[" ", "a", "e", "i", "o", "T"]),
    )

    assert reason(results[1]).startswith("too_long: ")
    assert reason(results[2]).startswith("bad_request: the chat template")
    assert reason(results[3]).startswith("bad_request: ")
    assert reason(results[4]).startswith("bad_request: ")
    assert generated(results[5]).response_tokens == 2
    assert reason(results[6]).startswith("empty: ")


def test_max_tokens_is_lowered_to_what_the_context_leaves(teacher: Engine) -> None:
    turns = [("user", "Read this." + " sea" * 190), ("assistant", "I have read it."), ("user", QUESTIONS[2])]
    messages = [{"role": role, "content": content} for role, content in turns]
    request = Generate(1, messages, Sampling(temperature=0, max_tokens=500), 0)

    result = generated(answer(teacher, request)[1])

    assert result.finish_reason == "length"
    assert result.prompt_tokens is not None
    assert result.response_tokens is not None
    assert result.prompt_tokens + result.response_tokens == 256


def test_reasoning_that_fills_the_response_is_no_answer(teacher: Engine) -> None:
    (result,) = answer(teacher, ask(QUESTIONS[2], temperature=0, max_tokens=6, reasoning_effort="high")).values()

    assert reason(result).startswith("unfinished_reasoning: 6 tokens of reasoning and no answer, finish reason length")


def test_a_schema_binds_the_answer_and_not_the_reasoning(teacher: Engine) -> None:
    kind = {"type": "integer", "enum": list(range(1, 6))}
    schema = {"type": "object", "properties": {"rating": kind}, "required": ["rating"], "additionalProperties": False}
    hostile = f"</think> {QUESTIONS[2]} <think>"
    asked = [ask(text, i, temperature=0, max_tokens=40, **REASONS) for i, text in enumerate([QUESTIONS[2], hostile])]

    results = answer(teacher, *[structs.replace(request, schema=schema) for request in asked])

    for result in map(generated, results.values()):
        assert result.text in {f'{{"rating":{rating}}}' for rating in range(1, 6)}
        assert result.reasoning
        assert "{" not in result.reasoning
        assert result.finish_reason == "stop"


@pytest.mark.parametrize(
    ("parser", "family"),
    [
        ("deepseek_r1", "qwen 3 thinking"),
        ("qwen3", "qwen 3"),
        ("glm45", "glm 4.5"),
        ("granite", "granite 3.2"),
        ("gemma4", "gemma 4"),
        ("seed_oss", "seed-oss"),
    ],
)
def test_vllms_own_parsers_split_as_the_markers_do(parser: str, family: str) -> None:
    pytest.importorskip("vllm")
    form = FAMILIES[family]
    chat = Chat(reasoning_families.tokenizer(form), variables=form.variables)
    chosen = VllmOptions(reasoning_parser=parser, chat_template_kwargs=form.variables)
    text = f"{form.opening}We add.\n\nIs it so?{form.closing}It is four."
    ids, tail = chat.encode(text), chat.prompt_text([{"role": "user", "content": "2+2?"}]).rpartition("2+2?")[2]

    theirs = vllm_reasoning.reader(chosen, chat).read(ids, tail, [])
    ours = vllm_reasoning.reader(VllmOptions(), chat).read(ids, tail, [])

    assert ours.reasoning == "We add.\n\nIs it so?"
    assert (theirs.reasoning or "").strip() == ours.reasoning
    assert theirs.answer == ours.answer == "It is four."
    # What follows the marker counts as the answer's.
    assert theirs.reasoning_tokens is None or abs(theirs.reasoning_tokens - (ours.reasoning_tokens or 0)) <= 2


@pytest.mark.parametrize(
    ("parser", "family"),
    # The first two say that no token is the answer's, the third that all are.
    [("olmo3", "smollm 3"), ("hunyuan_a13b", "hunyuan"), ("gemma4", "gemma 4"), ("seed_oss", "seed-oss")],
)
def test_a_named_parser_leaves_calls_in_the_answer_and_mentions_of_them_in_the_reasoning(
    parser: str, family: str
) -> None:
    pytest.importorskip("vllm")
    form = FAMILIES[family]
    made = reasoning_families.tokenizer(form)
    made.add_tokens([token for token in ("</", "Ġ</", "think") if parser == "olmo3"])
    chat = Chat(made, variables=form.variables)
    splits = vllm_reasoning.reader(VllmOptions(reasoning_parser=parser), chat)
    call = '<tool_call>{{"name": "weather", "arguments": {{"city": "{}"}}}}</tool_call>'

    def read(answer: str) -> Generated:
        text = f"{form.opening}We could write {call.format('Rome')} here.{form.closing}{answer}"
        ids = chat.encode(text + ("\n</answer>" if family == "hunyuan" else ""))
        parts = splits.read(ids, "", [])
        prompt = generation.EncodedPrompt(ask("Is it warm?", 1), [], 1000)
        written = generation.finished(prompt, parts, "stop", len(ids), 0.0)
        raw = generation.raw_answer(chat, ids, parts, splits.markers, [])
        return generated(generation.with_calls(written, generation.call_reader(chat, "hermes"), raw, TOOLS))

    mentioned, called = read("It is warm."), read(call.format("Paris"))

    assert (mentioned.text, mentioned.tool_calls) == ("It is warm.", None)
    assert (called.text, called.tool_calls) == ("", [call_of("weather", '{"city": "Paris"}')])
    for found in (mentioned, called):
        assert found.reasoning is not None
        assert "Rome" in found.reasoning
        assert found.reasoning_tokens is None or 0 < found.reasoning_tokens < found.response_tokens


def test_a_parser_believes_a_prompt_that_has_closed_the_reasoning() -> None:
    pytest.importorskip("vllm")
    form = FAMILIES["qwen 3, off"]
    chat = Chat(reasoning_families.tokenizer(form))
    tail = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

    splits = vllm_reasoning.reader(VllmOptions(reasoning_parser="deepseek_r1"), chat)
    parts = splits.read(chat.encode("It is four."), tail, [])

    assert (parts.reasoning, parts.answer, parts.reasoning_tokens) == (None, "It is four.", 0)


def test_a_text_is_kept_whole_if_the_parser_is_off() -> None:
    form = FAMILIES["qwen 3"]
    chat = Chat(reasoning_families.tokenizer(form))
    text = "<think>\nWe add.\n</think>\n\nFour."

    parts = vllm_reasoning.reader(VllmOptions(reasoning_parser="off"), chat).read(chat.encode(text), "", [])

    assert (parts.reasoning, parts.answer, parts.reasoning_tokens) == (None, text, 0)


def test_a_parser_that_is_unknown_or_does_not_suit_is_refused_before_loading(smollm2: Path) -> None:
    def load(parser: str) -> None:
        vllm_engine.load(ModelSpec("vllm", str(smollm2), options={"reasoning_parser": parser}), lambda: None)

    with pytest.raises(EngineError, match=r"no reasoning parser 'qwen_3'.*deepseek_r1, .*qwen3, .*or to 'off'"):
        load("qwen_3")
    with pytest.raises(EngineError, match=r"'deepseek_r1' does not suit this model: .*could not locate think"):
        load("deepseek_r1")


def test_what_cannot_be_loaded_is_an_engine_error(smollm2: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"max_len.*valid options: dtype, max_model_len"):
        vllm_engine.load(ModelSpec("vllm", str(smollm2), options={"max_len": 5}), lambda: None)
    with pytest.raises(EngineError, match="no tokenizer"):
        vllm_engine.load(ModelSpec("vllm", str(tmp_path)), lambda: None)


def test_long_prompts_that_wait_are_sampled(teacher: Engine) -> None:
    # Together more than vLLM computes per step: one would be split, and its random numbers drawn again.
    asked = [ask(f"{i}. " + "The sea is wide. " * 25, i, seed=i, temperature=0.7, max_tokens=3) for i in range(4)]

    results = answer(teacher, *asked)

    assert sum(generated(result).prompt_tokens or 0 for result in results.values()) > 256


def test_nothing_is_used_that_vllm_will_drop(teacher: Engine, complaints: list[logging.LogRecord]) -> None:
    # vLLM reports this once per process, perhaps during another test.
    answer(teacher, ask("Hi!", temperature=0, max_tokens=2))

    assert complaints
    assert not [each.getMessage() for each in complaints if "deprecated" in each.getMessage()]


def test_a_named_parser_reads_the_calls() -> None:
    chat = Chat(tokenizer(HERMES))
    read = vllm_engine._call_reader(chat, "hermes")
    assert read is not None

    text = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    assert read(f"Hm.\n{text}", TOOLS) == Said("Hm.", [call_of("weather", '{"city": "Rome"}')])
    assert read("Hm.", TOOLS) is None
    with pytest.raises(PermanentError, match="vLLM has no tool_parser 'nope'; known: "):
        vllm_engine._call_reader(chat, "nope")
    with pytest.raises(PermanentError, match="tool_parser 'mistral' does not suit the model"):
        vllm_engine._call_reader(chat, "mistral")


@pytest.mark.timeout(600)
def test_a_killed_engine_core_is_noticed_at_once(smollm2: Path, tmp_path: Path) -> None:
    tiny_models.served_model(tmp_path / "model", load_tokenizer(ModelSpec("vllm", str(smollm2))))
    started = [sys.executable, "-m", "tests.llm.engine_core", str(tmp_path / "model")]
    with (
        (tmp_path / "log").open("w+") as log,
        subprocess.Popen(started, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True) as engine,
    ):
        try:
            assert engine.stdout is not None
            while "writing" not in (line := engine.stdout.readline()):
                assert line, (tmp_path / "log").read_text()[-2000:]
            children = {" ".join(each.cmdline()): each for each in psutil.Process(engine.pid).children()}
            core = next((each for said, each in children.items() if "EngineCore" in said or "spawn_main" in said), None)
            assert core is not None, [*children]
            core.kill()
            began = time.monotonic()

            assert engine.wait(timeout=60) == 1
            assert time.monotonic() - began < 20
            assert "vLLM's process ended: EngineCore" in (tmp_path / "log").read_text()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(engine.pid, signal.SIGKILL)
