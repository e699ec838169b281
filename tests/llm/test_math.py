"""The answer checker judges typical answers of models, and survives answers that would hang or crash it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from persyn.errors import EngineError
from persyn.llm import options
from persyn.llm.protocols import Engine, Failed, Judge, Judged, ModelSpec, Result
from persyn.llm.scorers import math_scorer


def load(**options: object) -> Engine:
    return math_scorer.load(ModelSpec("math", "", options=options), lambda: None)


def results(engine: Engine, *cases: tuple[str | None, str]) -> list[Result]:
    engine.submit([Judge(i, [], response, gold) for i, (gold, response) in enumerate(cases)])
    found: dict[int, Result] = {}
    while engine.pending:
        found |= {result.id: result for result in engine.step()}
    return [found[i] for i in range(len(cases))]


def value(engine: Engine, gold: str, response: str) -> float:
    (result,) = results(engine, (gold, response))
    assert isinstance(result, Judged), result
    return result.value


@pytest.fixture(scope="module")
def checker() -> Iterator[Engine]:
    return load()


@pytest.fixture(scope="module")
def hasty() -> Iterator[Engine]:
    return load(timeout_seconds=0.7)


@pytest.fixture(scope="module")
def small() -> math_scorer.Child:
    """A child with a low memory limit, which must not depend on the memory of its parent."""
    held = bytearray(b"x") * 700_000_000
    child = math_scorer.Child(options.MathOptions(memory_mb=512, timeout_seconds=60), lambda: None)
    child.start()
    del held
    return child


@pytest.mark.parametrize(
    ("gold", "response"),
    [
        ("42", "42"),
        ("42", "The answer is 42."),
        ("42", "6 * 7 = 42\n#### 42"),
        ("42", 'Sure!\n```json\n{"reasoning": "7 sixes", "answer": "42"}\n```'),
        ("42", '{"reasoning": "7 sixes", "answer": 42}'),
        ("six sevens are 42\n#### 42", r"so \boxed{42}"),
        ("1,234", "1234"),
        ("1234", "It costs $1,234.00 in all."),
        (r"\frac{1}{2}", "0.5"),
        ("1/3", "0.333333"),
        ("0.333333", r"\boxed{\frac13}"),
        ("3 1/2", r"$\frac{7}{2}$"),
        ("28%", r"\boxed{28\%}"),
        ("1e-7", r"$10^{-7}$"),
        (r"2\pi", "The area is 2*pi square meters."),
        (r"x^2+2x+1", r"\boxed{(x+1)^2}"),
        ("x=5", r"$5$"),
        ("5", r"\boxed{x = 5}"),
        (r"\{1, 2\}", r"The roots are $\boxed{2}$ and $\boxed{1}$."),
        ("(1, 2)", r"the point $\left(1, \frac{4}{2}\right)$"),
        (r"\text{Anna}", r"\boxed{Anna}"),
        ("B", "The answer is (B)."),
        ("no solution", "The answer is no solution."),
        (r"\begin{pmatrix}1 & 2\end{pmatrix}", r"$\begin{pmatrix}1 & \frac{6}{3}\end{pmatrix}$"),
        (r"1+1/\mathrm{e}", r"\boxed{1+e^{-1}}"),
        ("125", r"\boxed{125\text{ miles}}"),
        (r"6\sqrt{2}", '{"answer": "6 * sqrt(2)"}'),
    ],
)
def test_the_same_answer_in_other_words_is_right(checker: Engine, gold: str, response: str) -> None:
    assert value(checker, gold, response) == 1.0


@pytest.mark.parametrize(
    ("gold", "response"),
    [
        ("42", "41"),
        ("42", "First 42, then more: the answer is 43."),
        ("1/2^98", "1/2^99"),
        (r"\frac{1}{2^{98}}", r"\boxed{\frac{1}{2^{99}}}"),
        (r"\frac{\sqrt{2}}{10^{20}}", r"\boxed{\frac{\sqrt{3}}{10^{20}}}"),
        ("0.0000001", "0.0000002"),
        (r"$1+1/\mathrm{e}$", r"$1-1/\mathrm{e}$"),
        ("1", r"$1-1/\mathrm{e}$"),
        ("3x-4", r"\boxed{3x-4c}"),
        ("3", "Therefore the result is 3x+2."),
        ("(1,2)", "$1 < x < 2$"),
        ("1", r"\boxed{1\sqrt{19}}"),
        ("no solution", "The answer is 3."),
        (r"6\sqrt{2}", '{"answer": "6 * sqrt(3)"}'),
    ],
)
def test_another_answer_is_wrong(checker: Engine, gold: str, response: str) -> None:
    assert value(checker, gold, response) == 0.0


@pytest.mark.parametrize("response", ["", "I do not know.", r"\boxed{}", '{"answer": null}'])
def test_a_response_without_an_answer_is_wrong_and_says_so(checker: Engine, response: str) -> None:
    (result,) = results(checker, ("42", response))

    assert isinstance(result, Judged)
    assert (result.value, result.detail["parsed"]) == (0.0, None)


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        (r'"5\u0000"', {"parsed": None, "unparsed": "5\N{REPLACEMENT CHARACTER}"}),
        (r'"\ud8005"', {"parsed": None, "unparsed": "\N{REPLACEMENT CHARACTER}5"}),
        ("[" * 3_000 + "5" + "]" * 3_000, {"parsed": None}),
    ],
    ids=["a NUL", "half a pair", "lists in lists"],
)
def test_an_answer_that_no_database_holds_is_wrong_and_can_be_stored(
    checker: Engine, answer: str, detail: dict[str, str | None]
) -> None:
    hostile, next_one = results(checker, ("5", f'{{"answer": {answer}}}'), ("5", r'{"answer": "\u0035"}'))

    assert isinstance(hostile, Judged), hostile
    assert hostile.value == 0.0
    assert hostile.detail.items() >= detail.items()
    assert isinstance(next_one, Judged)
    assert next_one.value == 1.0


def test_a_verdict_can_be_retraced(checker: Engine) -> None:
    (result,) = results(checker, (r"\frac{1}{2}", "0.5"))

    assert isinstance(result, Judged)
    assert result.detail == {
        "gold": "1/2",
        "parsed": "0.500000000000000",
        "method": "math",
        "version": "math-verify 0.9.0",
    }


@pytest.mark.parametrize("gold", [None, "", "  "])
def test_without_a_reference_there_is_no_verdict(checker: Engine, gold: str | None) -> None:
    missing, judged = results(checker, (gold, "42"), ("42", "42"))

    assert missing == Failed(0, "no_reference_answer")
    assert isinstance(judged, Judged)


@pytest.mark.parametrize(
    "response",
    [
        "5^(5^(5^(5^5)))",
        "{" * 100_000,
        r"\boxed{" + "{" * 100_000,
        "9" * 100_000,
        r"\boxed{" + r"\log(" * 100 + "5" + ")" * 100 + "}",
        r"\boxed{" + r"\log(" * 400 + "5" + ")" * 400 + "}",
        "$" + r"\frac{1}{" * 60 + "2" + "}" * 60 + "$",
        "$" * 100_000,
        "1 2 " * 25_000,
        "answer: " * 12_000,
    ],
    ids=lambda text: text[:12],
)
def test_a_hostile_response_is_not_right_and_later_ones_are_served(hasty: Engine, response: str) -> None:
    hostile, next_one = results(hasty, ("5", response), ("5", "5"))

    assert isinstance(hostile, Failed) or hostile.value == 0.0
    assert next_one.value == 1.0


def test_what_takes_for_ever_fails_and_is_not_called_wrong(hasty: Engine) -> None:
    before, hostile, after = results(hasty, ("5", "4"), ("5", r"\boxed{5^{5^{5^{5^5}}}}"), ("5", "5"))

    assert hostile == Failed(1, "timeout: not decided within 0.7 s")
    assert (before.value, after.value) == (0.0, 1.0)


def test_what_takes_all_memory_fails_and_is_not_called_wrong(small: math_scorer.Child) -> None:
    asked = [Judge(1, [], r"\boxed{(x+y+z+w+v)^{3^{13}}}", "5"), Judge(2, [], "5", "5")]

    found = small.judge(asked)
    hostile, after = [*found, *small.judge(asked[len(found) :])]

    assert isinstance(hostile, Failed)
    assert hostile.reason.startswith("crashed")
    assert isinstance(after, Judged)
    assert after.value == 1.0


def test_a_child_that_was_killed_is_replaced(small: math_scorer.Child) -> None:
    os.kill(small._process.pid, signal.SIGKILL)
    asked = [Judge(1, [], "5", "5"), Judge(2, [], "5", "5")]

    (lost,) = small.judge(asked)

    assert isinstance(lost, Failed)
    assert lost.reason.startswith("crashed")
    assert [result.id for result in small.judge(asked[1:])] == [2]


def test_an_unknown_option_is_refused_by_name() -> None:
    with pytest.raises(EngineError, match=r"`timeout`.*timeout_seconds, memory_mb"):
        load(timeout=3)
