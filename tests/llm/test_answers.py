"""Verdicts on final answers, kind by kind: what says the same, what does not, and what cannot be told."""

from __future__ import annotations

import pytest

from persyn.llm.answers import characters, comparison, units
from persyn.llm.math import Case

LANGUAGES = [
    ("36", "La respuesta es 36 manzanas."),
    ("36", "Respuesta final: **36**"),
    ("36", "La réponse est donc : 36 pommes pour les 4 enfants."),
    ("36", "Die Antwort lautet 36 Äpfel."),
    ("36", "Das Ergebnis ist 36."),
    ("36", "La risposta finale è 36."),
    ("36", "A resposta é 36 reais."),
    ("36", "Het antwoord is 36 euro."),
    ("36", "Ответ: 36 рублей за 4 дня"),
    ("36", "Окончательный ответ — 36."),
    ("36", "Odpowiedź: 36 zł"),
    ("36", "Cevap: 36"),
    ("36", "Cevap 36'dır."),
    ("36", "Đáp án là 36 quả táo."),
    ("36", "उत्तर: ३६"),
    ("36", "अंतिम उत्तर 36 है।"),
    ("36", "الإجابة هي ٣٦."),
    ("36", "הת\u05e9ובה היא 36."),
    ("36", "所以，一共有36个苹果。"),
    ("36", "答案为36元，分给4个人。"),
    ("36", "最終的な答えは３６個です。"),
    ("36", "答え：36"),
    ("36", "따라서 정답은 36개입니다."),
    ("36", "คำตอบคือ ๓๖"),
    ("36", "Svaret är 36 kronor."),
    ("36", "Η απάντηση είναι 36."),
    ("Rom", "Die Antwort ist Rom."),
    ("北京", "答案是北京。"),
]

MARKS = [
    ("8", "<answer>8</answer>"),
    ("8", "First 5 of the 9.\n<final_answer>8 pens</final_answer>\nI used 2 steps."),
    ("8", "<result>\n\\boxed{8}\n</result>"),
    ("8", "[ANSWER] 8 [/ANSWER]"),
    ("8", "So we get\n<answer>8"),
    ("8", "<answer>7</answer> No: <answer>8</answer>"),
    ("8", "【答案】8"),
    ("8", "## Final Answer\n\n8"),
    ("8", "**Answer**: 8\n\n**Check**: 4 * 2 is right."),
    ("8", "Result: 8\n\nNote: rounded to 3 digits."),
    ("8", "{'final_answer': 8}"),
    ("8 cm", '{"answer": {"value": 8, "unit": "cm"}}'),
    ("8", '```json\n{"result": "8"}\n```'),
    ("8", "The answer is not 5. The answer is 8."),
    ("8", "\\boxed{5} would be too few, so \\boxed{8}."),
    ("4, 8", "For a: \\boxed{4}.\nThe other part needs more work. For b: \\boxed{8}."),
]

REASONING = [
    ("8", "<think>Is it \\boxed{5}? No.</think>It is 8."),
    ("8", "<thinking>5, or 6</thinking>\n<answer>8</answer>"),
    ("8", "perhaps \\boxed{5}\n</think>\n\n8"),
    ("8", "[THINK]The answer is 5.[/THINK]The answer is 8."),
    ("8", "<reasoning>\n\\boxed{5}\n</reasoning>\n8"),
    ("8", "<|channel|>analysis<|message|>Answer: 5<|end|><|start|>assistant<|channel|>final<|message|>Answer: 8"),
]

SENTENCES = [
    ("6", "The answer is 6 pens for the 2 girls."),
    ("21", "Answer: $21 every week for 3 shifts"),
    ("6", "Answer: 6 (because 2*3 = 6)"),
    ("6", "The final answer is 6 (see line 4)."),
    ("30", "Answer: 30 pupils (5 rows of 6)"),
    ("30", "Answer = 30 (5*6)"),
    ("6", "**Answer: 6** (out of 9)"),
    ("2/3", "The answer is 2/3 of the 12 pieces."),
    ("40", "8 boxes of 5 pens are 40 pens."),
    ("40", "He has 40 pens after giving 3 away."),
    ("40", "So the total is 8 * 5 = $40 for 2 days."),
    ("40", "= 40"),
    ("40", "The answer is approximately 40, given that 3 of them are new."),
    ("40", "\\approx 40"),
    ("40", "about 40"),
    ("40", "~40"),
]

UNITS = [
    ("7", "7 m"),
    ("7", "7 L"),
    ("7", "7 kg"),
    ("7", "7\\text{ cm}"),
    ("7", "\\boxed{7\\,\\mathrm{m/s^2}}"),
    ("7", "7 m/s²"),
    ("7", "7 square metres"),
    ("7", "7cm"),
    ("7", "7 km per hour"),
    ("7 km/h", "7 kilometers per hour"),
    ("7 m", "700 cm"),
    ("7", "Rs. 7"),
    ("7", "7€"),
    ("7", "US$ 7.00"),
    ("7", "７円"),
    ("$0.50", "50 cents"),
    ("0.35", "35％"),
    ("35%", "35 percent"),
    ("90", "90°"),
    ("7", "7 slices of pizza"),
    ("7", "y = 7 kg"),
    ("7", "$7/hour"),
    ("7", "The answer is 7 [2]."),
    ("3000000", "$3 million"),
    ("30000", "3万"),
]

NUMBERS = [
    ("2500000", "2,500,000"),
    ("2500000", "25,00,000"),
    ("2500000", "2.500.000"),
    ("2500000", "2 500 000"),
    ("2500000", "2'500'000"),
    ("2500000.5", "2.500.000,5"),
    ("2500", "2\\,500"),
    ("2500", "٢٬٥٠٠"),
    ("2.5", "2,5"),
    ("2.5", "2½"),
    ("2 1/2", "2.5"),
    ("2500", "2.5 x 10^3"),
    ("2500", "2.5 × 10³"),
    ("2500", "2.5E3"),
    ("\\infty", "The limit is infinity."),
    ("-\\infty", "negative infinity"),
    ("+\\infty", "$\\infty$"),
    ("\\pm 4", "4, -4"),
    ("x = 4", "4"),
    ("\\frac{3}{4}", "$\\\\frac{3}{4}$"),
]

CHOICES = [
    ("C", "(C)"),
    ("C", "C. 17"),
    ("C", "**C**"),
    ("C", "Option C"),
    ("(C)", "The correct option is C) 17"),
    ("C", "\\boxed{\\textbf{(C)}\\ 17}"),
    ("C", "$\\boxed{\\text{C}}$"),
    ("C", "I choose C because A is wrong."),
    ("C", "C is the correct answer, since 17 is prime."),
    ("C", "故选C。"),
    ("C", "La opción C es la correcta."),
    ("C", "<answer>c</answer>"),
    ("17", "\\boxed{\\textbf{(C)}\\ 17}"),
    ("A, C", "C and A"),
]

WORDS = [
    ("Oslo", "The capital of Norway is Oslo."),
    ("no", "No, 9 is not a prime."),
    ("True", "**true**"),
    ("Yes", "Yes. Every step holds."),
    ("no solution", "$\\emptyset$"),
    ("March 8", "It falls on March 8."),
    ("March 8", "8th of March"),
    ("2024-03-08", "March 8, 2024"),
    ("4:45 PM", "16:45"),
    ("4:45 PM", "The train leaves at 4:45 p.m."),
    ("4:45", "4:45 PM"),
    ("2:3", "4:6"),
    ("2:3", "2/3"),
    ("xy", "yx"),
    ("ABC", "\\text{abc}"),
]


@pytest.mark.parametrize(
    ("gold", "response"),
    LANGUAGES + MARKS + REASONING + SENTENCES + UNITS + NUMBERS + CHOICES + WORDS,
)
def test_the_same_answer_is_right(gold: str, response: str) -> None:
    assert comparison.judge(Case(gold, response)).is_right is True


@pytest.mark.parametrize(
    ("gold", "response"),
    [
        ("5", "<think>\\boxed{5}</think>So it is 8."),
        ("5", "<think>The answer is 5."),
        ("5", "The answer is 5.</thinking>I cannot tell."),
        ("3", "The answer is 6 pens for the 3 girls."),
        ("3", "6 pens for 3 girls, so the answer is 2."),
        ("3", "**Final answer:** He has 3 pens. However, two were asked for, so the answer is 6 pens."),
        ("4", "\\boxed{4} or \\boxed{8}"),
        ("4, 8", "\\boxed{4}, then \\boxed{9}"),
        ("4", "4x"),
        ("4 m", "4 cm"),
        ("4 kg", "4 m"),
        ("$4", "4 cents"),
        ("4 cm^2", "4 cm"),
        ("0.5", "50 cents"),
        ("2", "2 million"),
        ("5", "\\boxed{50\\%}"),
        ("25", "2.5 × 10³"),
        ("\\infty", "-\\infty"),
        ("\\infty", "12"),
        ("12", "infinity"),
        ("4", "\\pm 4"),
        ("C", "D"),
        ("C", "The answer is (B)."),
        ("C", "\\boxed{\\textbf{(D)}\\ 17}"),
        ("C", "Option C is wrong, so B is correct."),
        ("C", "A, C"),
        ("CBA", "ABC"),
        ("BC", "CB"),
        ("stale", "least"),
        ("192.168.0.1", "192.168.1.0"),
        ("v1.2.3", "v3.2.1"),
        ("H2O", "HO2"),
        ("2024-03-08", "2024-03-09"),
        ("2024-03-08", "2024-08-03"),
        ("March 8", "April 8"),
        ("March 8", "8"),
        ("4:45 PM", "4:45 AM"),
        ("4:45", "4:54"),
        ("4:30", "2:15"),
        ("16:00", "16"),
        ("between 4 and 9", "9"),
        ("Oslo", "It is not Oslo."),
        ("even", "neither odd nor even"),
        ("yes", "No."),
        ("True", "False"),
        ("(2, 4)", "(4, 2)"),
        ("(2, 4)", "[2, 4]"),
        ("1.25", "1.3"),
        ("10.0.0.7", "0"),
    ],
)
def test_another_answer_is_wrong(gold: str, response: str) -> None:
    assert comparison.judge(Case(gold, response)).is_right is False


@pytest.mark.parametrize(
    ("gold", "response", "reason"),
    [
        ("1234", "1.234", "ambiguous: 1.234 may be 1234 or 1.234"),
        ("\\frac{1}{", "5", "unparsed: the reference is neither a formula nor words"),
    ],
)
def test_what_cannot_be_told_has_no_verdict_and_a_reason(gold: str, response: str, reason: str) -> None:
    verdict = comparison.judge(Case(gold, response))

    assert (verdict.is_right, verdict.failure) == (None, reason)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a<think>b</think>c", "ac"),
        ("b</think>c", "c"),
        ("a<think>b", "a"),
        ("<think>a<think>b</think>c</think>d", "d"),
        ("<Thinking>a</Thinking>b", "b"),
        ("a < b and c > d", "a < b and c > d"),
    ],
)
def test_reasoning_is_not_what_a_response_says(text: str, said: str) -> None:
    assert characters.without_reasoning(text) == said


@pytest.mark.parametrize("text", ["12 apples and 3 pears", "3x", "4 + 5i", "2\\pi r", "sin 30", "5 y + 1"])
def test_what_follows_a_number_may_be_no_unit(text: str) -> None:
    assert not units.split(text).has_unit
