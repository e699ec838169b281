"""The extraction of final answers from texts."""

from __future__ import annotations

import pytest

from persyn.llm.scorers import math_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("42", "42"),
        ("  $x^2 + 1$. ", "x^2 + 1"),
        (r"\(\frac{1}{2}\)", r"\frac{1}{2}"),
        (r"We get \boxed{3}. That was wrong: \boxed{\frac{a}{b}}, hence done in 5 steps.", r"\frac{a}{b}"),
        (r"Roots: $\boxed{1}$ and $\boxed{2}$.", "1,2"),
        (r"cut off in \boxed{7", "7"),
        ("#### Step 3: add\nso 4\n#### 12", "12"),
        ("**Answer:** 12 apples", "12"),
        ("Answer:\n12", "12"),
        ("The final answer is $10,455. I hope it is correct.", "10,455"),
        (r"\boxed{255} was wrong. The final answer is 10.", "10"),
        ("The answer is 0, meaning that no x has f(x) = 3.", "0"),
        ('{"answer": "\\\\frac{1}{2}"}', r"\frac{1}{2}"),
        ('{"answer": "\\frac{1}{2}"}', r"\frac{1}{2}"),
        (r'{"answer": "\(3\)"}', "3"),
        ('{"reasoning": "\\\\boxed{1}", "answer": "2"}', "2"),
        ('{"answer": ["1", 2]}', "1, 2"),
        ('{"answer": "12 eggs in 3 boxes are 36 eggs"}', "36"),
        ('{"answer": "1', "1"),
        # Escaped characters that no database can store are replaced; other escapes are decoded.
        (r'{"answer": "5\u0000"}', "5\N{REPLACEMENT CHARACTER}"),
        (r'{"answer": ["\ud800", "\udc00 4"]}', "\N{REPLACEMENT CHARACTER}, \N{REPLACEMENT CHARACTER} 4"),
        (r'{"answer": "\ud83d\ude00"}', "\N{GRINNING FACE}"),
        (r'{"answer": "\u0035"}', "5"),
        # Deeper than Python's parser accepts, then deeper than the search descends.
        ('{"answer": ' + "[" * 3_000 + "5" + "]" * 3_000 + "}", ""),
        ('{"answer": ' + "[" * 900 + "5" + "]" * 900 + "}", ""),
        (r"\boxed{5} " + '{"answer": ' + "[" * 3_000, ""),
        ("She sells 9 eggs for $2 each and earns 9 * 2 = $18 a day.", "18"),
        ("Thus $x = 5$ holds.", "x = 5"),
        ("It is 3x + 2.", "3x + 2"),
        ("The 3rd try gave 8, at last.", "8"),
        ("nothing to see here", ""),
        ("", ""),
        ("1.5e-3", r"1.5\times 10^{-3}"),
        ("2 3/4", r"2\frac{3}{4}"),
        ("\N{MINUS SIGN}5\N{GREEK SMALL LETTER PI}", r"-5\pi"),
        ("x" * 1_001, ""),
    ],
)
def test_find(text: str, answer: str) -> None:
    assert math_answer.find(text) == answer


@pytest.mark.parametrize("text", ["3x + 2", r"12\text{ and }13", r"\frac{1}{2} \text{meters}", "sin(x) + 1", "Anna"])
def test_an_expression_is_no_prose(text: str) -> None:
    assert not math_answer.is_prose(text)


@pytest.mark.parametrize("text", ["about 18 dollars", "there is none", "3 apples"])
def test_a_sentence_is_prose(text: str) -> None:
    assert math_answer.is_prose(text)
