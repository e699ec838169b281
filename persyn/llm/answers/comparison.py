"""Whether the answer that a response states is the reference's: each kind of answer in its own way."""

from __future__ import annotations

import re
from fractions import Fraction
from importlib.metadata import version
from typing import Any

from persyn.llm import math_answer
from persyn.llm.answers import algebra, choices, clock, marks, numbers, phrases, statements, units
from persyn.llm.math import Case, Verdict
from persyn.llm.math_answer import Stated

VERSION = f"math-verify {version('math-verify')}"
_LONGEST_DETAIL = 200

_WRAPPED = re.compile(r"\\(?:text\w*|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
_NO_WORDS = phrases.FUNCTIONS | set(phrases.entries(phrases.AND))
_OPERATOR = re.compile(r"[=+*^<>|\\/()]")


def judge(case: Case) -> Verdict:
    """Compare the answer a response states with the one a reference states."""
    gold, stated = reference(case.gold), math_answer.stated(case.response)
    for compare in (_as_choice, _as_words):
        verdict = compare(gold, stated)
        if verdict is not None:
            return verdict
    return _as_formula(gold, stated)


def reference(text: str) -> str:
    """The answer of a reference: what it marks, else the number that a sentence of it tells, else the whole of it."""
    stated = math_answer.stated(text)
    if stated.is_marked:
        return (
            stated.text
            if _is_words(stated.text) and not statements.is_prose(stated.text)
            else stated.expression() or text.strip()
        )
    bare = math_answer.trim(stated.text)
    is_sentence = len(bare.split()) > 4 and statements.is_prose(bare) and not units.split(bare).has_unit
    return stated.expression() or bare if is_sentence else bare


# Letters of multiple choice


def _as_choice(gold: str, stated: Stated) -> Verdict | None:
    """The verdict where the reference is the letter of a choice, or several."""
    several = choices.several(gold)
    if several:
        given = choices.several(math_answer.trim(stated.text)) or frozenset()
        return Verdict(given == several, _detail(sorted(several), sorted(given), "choice"))
    choice = choices.read(gold)
    if choice is None or (gold.strip().islower() and len(gold.strip()) == 1):
        return None
    given_choice = _choice_of(stated)
    if given_choice is None:
        return _by_content(choice, stated)
    return Verdict(given_choice.letter == choice.letter, _detail(choice.letter, given_choice.letter, "choice"))


def _choice_of(stated: Stated) -> choices.Choice | None:
    texts = stated.sentences()
    for text in texts:
        if choices.several(text):
            return choices.Choice("".join(sorted(choices.several(text) or ())))
        if read := choices.read(text):
            return read
    letter = choices.named(texts[1]) if stated.is_marked else ""
    letter = (
        letter
        or choices.chosen(stated.text)
        or choices.named(texts[-1])
        or choices.named(stated.response.split("\n", 1)[0])
    )
    return choices.Choice(letter) if letter else None


def _by_content(choice: choices.Choice, stated: Stated) -> Verdict | None:
    """Without a letter, a response is right that says what stands behind the reference's."""
    if choice.content:
        return judge(Case(choice.content, stated.response))
    return Verdict(False, _detail(choice.letter, _or_none(stated.expression() or _short_text(stated)), "choice"))


# Words, times, dates, versions


def _as_words(gold: str, stated: Stated) -> Verdict | None:
    """The verdict where the reference is no formula; True too where both are the same text."""
    if (time := clock.time(gold)) and (given := _time_of(stated)):
        return Verdict(clock.same_time(time, given), _detail(gold, stated.text, "time"))
    texts = stated.sentences()
    sign = _infinity(gold)
    for text in texts:
        if _same_text(gold, text) or (sign and _infinity(text) == sign):
            return Verdict(True, _detail(gold, text, "text"))
    if (date := clock.date(gold)) and len(gold.split()) <= 4:
        return Verdict(_same_date(date, texts), _detail(gold, texts[-1], "date"))
    if gold.casefold().strip(" .") in phrases.YES_OR_NO:
        return Verdict(_agrees(gold, stated), _detail(gold, _or_none(_short_text(stated)), "text"))
    if _is_words(gold) or clock.is_label(gold):
        ends = any(_ends_with(text, gold) for text in texts)
        return Verdict(ends, _detail(gold, _or_none(_short_text(stated)), "text"))
    return None


def _time_of(stated: Stated) -> clock.Time | None:
    for text in (*stated.sentences(), stated.expression()):
        if time := clock.time(text):
            return time
    return None


def _same_date(gold: tuple[int | None, int, int], texts: list[str]) -> bool:
    for text in texts:
        if given := clock.date(text):
            return given[1:] == gold[1:] and (gold[0] is None or given[0] == gold[0])
    return False


def _agrees(gold: str, stated: Stated) -> bool:
    """Whether a response says yes where the reference does; its first or last sentence begins with the word."""
    meant = _meant(gold)
    for text in (*stated.sentences(), stated.text):
        first = re.match(r"[\s*_]*([^\W\d_]+(?:'t)?)", text)
        if first and _meant(first[1]) in phrases.SAME_TEXT[3:5]:
            return _meant(first[1]) == meant
    return False


def _meant(word: str) -> frozenset[str]:
    word = _normal(word)
    return next((group for group in phrases.SAME_TEXT if word in group), frozenset({word}))


def _ends_with(text: str, gold: str) -> bool:
    """Whether a short sentence ends with the reference, and denies nothing."""
    whole, end = _normal(text), _normal(gold)
    if len(whole.split()) > 15 or not whole.endswith(f" {end}"):
        return False
    before = whole[: -len(end)]
    return (
        not re.search(phrases.any_of(f"{phrases.NOT}, {phrases.AND}", phrases.NOT_JOINED), before, re.IGNORECASE)
        and "-" not in before[-1:]
    )


def _same_text(gold: str, text: str) -> bool:
    if math_plain(gold) == math_plain(text):
        return bool(math_plain(gold))
    return _normal(gold) != "" and (_normal(gold) == _normal(text) or _meant(gold) == _meant(text))


def _normal(text: str) -> str:
    """A text as words: no mark-up, no article, no punctuation at its ends, no difference of case."""
    text = re.sub(r"[*_`\"$]|\\(?=[ ,;!])", " ", _WRAPPED.sub(r"\1", text)).casefold()
    text = re.sub(r"\s+", " ", text).strip(" .,;:!?'")
    return re.sub(r"^(?:the|a|an) ", "", text)


def _is_words(text: str) -> bool:
    """Whether a text is words, of which no product may be made."""
    bare = _WRAPPED.sub(r"\1", text)
    if _OPERATOR.search(bare.replace("\\ ", " ")) or units.split(text).has_unit:
        return False
    runs = [run for run in re.findall(r"(?<![\d])[^\W\d_]+", bare) if run.lower() not in _NO_WORDS]
    return any(
        (len(run) >= 3 and not set(run) <= set("xyz")) or (len(run) >= 2 and run.isupper()) or ord(run[0]) >= 0x400
        for run in runs
    )


# Numbers and formulas


def _as_formula(gold: str, stated: Stated) -> Verdict:
    given = stated.expression()
    if not math_answer.tidy(given):
        return Verdict(False, {"gold": _short(gold), "parsed": None, "version": VERSION})
    verdict = compare(gold, given)
    if verdict.is_right is False and "," in gold:
        parts = ",".join(marks.boxes(stated.response))
        verdict = compare(gold, parts) if parts and parts != given else verdict
    return verdict


def compare(gold: str, given: str) -> Verdict:
    """Compare two expressions, each with its unit."""
    if math_plain(math_answer.tidy(gold)) == math_plain(math_answer.tidy(given)):
        return Verdict(True, _detail(math_answer.tidy(gold), math_answer.tidy(given), "text"))
    if (signs := (_infinity(gold), _infinity(given))) != ("", ""):
        return Verdict(signs[0] == signs[1], _detail(gold, given, "text"))
    if _is_other_kind(gold, given):
        return Verdict(False, _detail(gold, given, "text"))
    choice = choices.read(given)
    if choice and choice.content:
        given = choice.content
    return _by_value(units.split(gold), units.split(given))


def _is_other_kind(gold: str, given: str) -> bool:
    """Whether one of the two is a time, a version or words, and so is not what the other is."""
    if clock.is_label(gold) or clock.is_label(given) or _is_words(given):
        return True
    is_ratio = any(re.search(r":|\\colon", text) and not clock.time(text) for text in (gold, given))
    return (clock.time(gold) or clock.time(given)) is not None and not is_ratio


def _by_value(gold: units.Quantity, given: units.Quantity) -> Verdict:
    if gold.unit.dimensions and given.unit.dimensions and gold.unit.dimensions != given.unit.dimensions:
        return Verdict(False, _detail(gold.value, given.value, "unit"))
    if gold.may_be_variable and not given.has_unit:
        return Verdict(False, _detail(gold.value, given.value, "unit"))
    is_convertible = gold.unit.dimensions and gold.unit.dimensions == given.unit.dimensions
    factor = given.unit.scale / gold.unit.scale * (given.unit.factor / gold.unit.factor if is_convertible else 1)
    texts = [numbers.plain(_latex(each.value)) for each in (gold, given)]
    gold_parsed, parsed = algebra.parse_reference(texts[0]), algebra.parse(texts[1])
    if gold_parsed is None:
        return Verdict(None, failure="unparsed: the reference is neither a formula nor words")
    if parsed is None:
        return Verdict(False, _detail(gold.value, given.value, "text") | {"parsed": None, "unparsed": _short(texts[1])})
    detail = _detail(gold_parsed, parsed, "math")
    if algebra.equal(gold=gold_parsed, stated=algebra.times(parsed, factor)):
        return Verdict(True, detail)
    return _by_other_reading(gold.value, given.value, detail)


def _by_other_reading(gold: str, given: str, detail: dict[str, Any]) -> Verdict:
    """The verdict on two numbers that may be equal if a comma in one of them is a point, or a point a comma."""
    for first, second in ((gold, given), (given, gold)):
        other = numbers.other_reading(first)
        if other and numbers.is_number(second) and Fraction(other) == Fraction(numbers.plain(second)):
            if numbers.is_doubtful(first):
                return Verdict(None, failure=f"ambiguous: {first} may be {other} or {numbers.plain(first)}")
            return Verdict(True, detail)
    return Verdict(False, detail)


def _latex(text: str) -> str:
    return math_answer.tidy(numbers.plain(text.strip()))


def _infinity(text: str) -> str:
    """The sign of an answer that is infinite; "" for a finite one."""
    bare = re.sub(r"\s+", " ", _WRAPPED.sub(r"\1", text).replace("$", "")).strip(" .").casefold()
    names = "|".join(map(re.escape, phrases.entries(phrases.INFINITY)))
    minus, plus = (phrases.any_of(table, table) for table in (phrases.MINUS, phrases.PLUS))
    found = re.fullmatch(rf"(?:(?P<minus>-|{minus})|\+|{plus})?\s*(?:{names})", bare)
    return ("-" if found["minus"] else "+") if found else ""


def math_plain(text: str) -> str:
    """What two texts have in common that differ only in how they are set."""
    text = re.sub(r"\\(?:text\w*|mathrm|mathbf|mbox)\s*\{([^{}]*)\}|\\(?:left|right|displaystyle|[!,;: ])", r"\1", text)
    return re.sub(r"[\s$]+", "", text.replace("dfrac", "frac").replace("tfrac", "frac")).casefold()


# What is kept of a verdict


def _short_text(stated: Stated) -> str:
    texts = stated.sentences()
    return texts[-1] or texts[0]


def _or_none(text: str) -> str | None:
    return text or None


def _detail(gold: Any, parsed: Any, method: str) -> dict[str, Any]:
    return {
        "gold": _short(gold),
        "parsed": None if parsed is None else _short(parsed),
        "method": method,
        "version": VERSION,
    }


def _short(value: Any) -> str:
    try:
        return str(value)[:_LONGEST_DETAIL]
    except ValueError:
        return "a number too long to print"
