from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from msgspec import structs

from persyn.errors import EngineError
from persyn.llm import fake
from persyn.llm.protocols import (
    Check,
    Checked,
    Engine,
    Failed,
    Fit,
    Fitted,
    Generate,
    Generated,
    Judge,
    Judged,
    ModelSpec,
    Request,
    Result,
    Route,
    Routed,
    Sampling,
)


def make(model: str = "small", **options: object) -> Engine:
    return fake.load(ModelSpec("fake", model, options=dict(options)), lambda: None)


def answer(engine: Engine, *requests: Request) -> list[Result]:
    engine.submit(requests)
    results: list[Result] = []
    while engine.pending:
        results += engine.step()
    return results


def ask(text: str, *, request_id: int = 1, seed: int = 0, max_tokens: int = 64) -> Generate:
    return Generate(request_id, [{"role": "user", "content": text}], Sampling(max_tokens=max_tokens), seed)


def text_of(result: Result) -> str:
    assert isinstance(result, Generated)
    return result.text


def test_a_response_depends_on_model_prompt_and_seed_and_on_nothing_else() -> None:
    alone = text_of(answer(make(), ask("a", request_id=7))[0])
    among = {
        r.id: text_of(r) for r in answer(make(concurrency=2), *[ask("abcdefg"[i], request_id=i) for i in range(7)])
    }

    assert among[0] == alone
    assert len(set(among.values())) == 7
    assert text_of(answer(make("large"), ask("a"))[0]) != alone
    assert text_of(answer(make(), ask("a", seed=1))[0]) != alone


def test_responses_have_the_asked_length_and_say_when_they_were_cut() -> None:
    full, cut = answer(make(response_words=40), ask("a", max_tokens=40), ask("b", max_tokens=3))

    assert isinstance(full, Generated)
    assert isinstance(cut, Generated)
    assert (len(full.text.split()), full.response_tokens, full.finish_reason) == (40, 40, "stop")
    assert (len(cut.text.split()), cut.response_tokens, cut.finish_reason) == (3, 3, "length")


def test_one_of_n_requests_fails_and_always_the_same_ones() -> None:
    requests = [ask(f"prompt {i}", request_id=i) for i in range(4000)]

    failed = {r.id for r in answer(make(fail_every=10), *requests) if isinstance(r, Failed)}
    again = {r.id for r in answer(make(fail_every=10, concurrency=7), *reversed(requests)) if isinstance(r, Failed)}

    # Mean 400, standard deviation 19.
    assert 300 < len(failed) < 500
    assert again == failed


def test_as_many_requests_as_concurrency_overlap() -> None:
    engine = make(latency_seconds=0.05, concurrency=4)
    began = time.monotonic()

    results = answer(engine, *[ask(str(i), request_id=i) for i in range(12)])

    assert {r.id for r in results} == set(range(12))
    assert 0.15 <= time.monotonic() - began < 0.5


def test_an_engine_gives_no_more_rows_in_a_second_however_many_it_has() -> None:
    engine = make(rows_per_second=40, concurrency=64)
    began = time.monotonic()

    assert len(answer(engine, *[ask(str(i), request_id=i) for i in range(12)])) == 12
    assert 0.3 <= time.monotonic() - began < 2


def test_judges_and_routes_like_for_like() -> None:
    turn = [{"role": "user", "content": "a"}]
    first, second = answer(make(), Judge(1, turn, "two words"), Judge(2, turn, "three words here"))
    (routed,) = answer(make(teachers=3), Route(3, turn))

    assert isinstance(first, Judged)
    assert isinstance(second, Judged)
    assert 0 <= first.value < 1
    assert first.value != second.value
    assert (first.n_tokens, second.n_tokens) == (2, 3)
    assert isinstance(routed, Routed)
    assert len(set(routed.scores)) == 3
    assert answer(make(teachers=3), Route(3, turn)) == [routed]


def test_a_fit_leaves_a_checkpoint_with_its_hash(tmp_path: Path) -> None:
    grid = ([[{"role": "user", "content": "a"}]] * 3, [[0.1, 0.2]] * 3, [False, False, True])
    fit = Fit(1, *grid, ["small", "large"], "head", 0, str(tmp_path / "router"))

    (fitted,) = answer(make(), fit)

    assert isinstance(fitted, Fitted)
    assert len(list((tmp_path / "router").iterdir())) == 1
    assert len(fitted.sha256) == 64
    assert fitted.metrics["n_holdout"] == 1


def test_a_check_finds_nothing_wrong() -> None:
    (checked,) = answer(make(), Check(1, ModelSpec("fake", "small"), [], 64))

    assert isinstance(checked, Checked)
    assert [finding.level for finding in checked.findings] == ["ok"]


def test_a_prompt_can_end_the_process() -> None:
    code = (
        "from persyn.llm import fake; from persyn.llm.protocols import *;"
        "e = fake.load(ModelSpec('fake', 'a', options={'crash_on': 'boom'}), lambda: None);"
        "e.submit([Generate(1, [{'role': 'user', 'content': 'go boom'}], Sampling(), 0)]); e.step()"
    )

    assert subprocess.run([sys.executable, "-c", code]).returncode == -9


def test_a_prompt_can_hang_the_engine() -> None:
    code = (
        "from persyn.llm import fake; from persyn.llm.protocols import *;"
        "e = fake.load(ModelSpec('fake', 'a', options={'hang_on': 'wait'}), lambda: None);"
        "e.submit([Generate(1, [{'role': 'user', 'content': 'go'}], Sampling(), 0)]);"
        "e.step(); print('ready', flush=True);"
        "e.submit([Generate(1, [{'role': 'user', 'content': 'wait'}], Sampling(), 0)]); e.step()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.kill()


def test_loading_takes_its_time_and_tells_that_it_lives() -> None:
    ticks: list[float] = []
    began = time.monotonic()

    fake.load(ModelSpec("fake", "a", options={"load_seconds": 0.5}), lambda: ticks.append(time.monotonic()))

    assert time.monotonic() - began >= 0.5
    assert len(ticks) >= 2


def test_an_unknown_option_is_named_with_those_there_are() -> None:
    with pytest.raises(EngineError, match=r"latency.*latency_seconds, concurrency"):
        make(latency=1)


def test_reasoning_comes_before_the_same_answer_and_counts() -> None:
    (plain,) = answer(make(response_words=4), ask("a"))
    (found,) = answer(make(response_words=4, reasoning_words=40), ask("a"))

    assert isinstance(plain, Generated)
    assert isinstance(found, Generated)
    assert found.text == plain.text
    assert plain.reasoning is None
    assert found.reasoning is not None
    assert len(found.reasoning.split()) == found.reasoning_tokens == 40
    assert found.response_tokens == 44


def test_reasoning_that_takes_every_token_is_unfinished_unless_it_is_limited() -> None:
    engine = make(response_words=4, reasoning_words=40)
    limited = structs.replace(ask("a"), sampling=Sampling(max_tokens=20, max_reasoning_tokens=5))

    cut, whole = answer(engine, ask("a", max_tokens=20), limited)

    assert isinstance(cut, Failed)
    assert cut.reason.startswith("unfinished_reasoning: 20 tokens of reasoning and no answer, finish reason length")
    assert isinstance(whole, Generated)
    assert (whole.reasoning_tokens, whole.response_tokens, whole.finish_reason) == (5, 9, "stop")
