"""Compare a response's stated answer with the reference, by the kind of answer."""

from __future__ import annotations

import re
from collections.abc import Collection
from fractions import Fraction
from importlib.metadata import version
from typing import Any

from persyn.llm.scorers import math_answer
from persyn.llm.scorers.answers import algebra, choices, clock, marks, numbers, phrases, statements, units
from persyn.llm.scorers.math_answer import Stated
from persyn.llm.scorers.math_scorer import Case, Verdict

VERSION = f"math-verify {version('math-verify')}"
_LONGEST_DETAIL = 200

_WRAPPED = re.compile(r"\\(?:text\w*|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
_RATIO = re.compile(r"\$?\s*\d+(?:\s*(?::|\\colon)\s*\d+)+\s*\$?")
_RATIO_IN_WORDS = re.compile(r"(\d+)\s+(?:is\s+)?to\s+(\d+)")
#: A half-open or infinite interval or a union, which cannot be a point in the plane.
_INTERVAL = re.compile(r"\\infty|\\cup|\([^()\[\]]*,[^()\[\]]*\]|\[[^()\[\]]*,[^()\[\]]*[)\]]")
#: Stating that a variable is in an interval is equivalent to stating the interval.
_MEMBER = re.compile(r"^[A-Za-z]\s*\\in\s*(?=\\left|[(\[])")
_FACTORIAL = re.compile(r"[\w)}]!\s*\$?$")
_APPROXIMATE = re.compile(r"\\approx(?![A-Za-z])|\\simeq(?![A-Za-z])|[≈≃≅≒]")
_NO_WORDS = phrases.FUNCTIONS | set(phrases.entries(phrases.AND))
_TRUTH = re.compile(
    r"(?P<denied>\b(?:not|never)\s+|n't\s+)?\b(?:(?P<yes>true|correct|right|yes)|false|untrue|incorrect|wrong|no)\b",
    re.IGNORECASE,
)
_OPERATOR = re.compile(r"[=+*^<>|\\/()]")


def judge(case: Case) -> Verdict:
    """Compare the answer a response states with the one a reference states."""
    gold, response = reference(case.gold), case.response
    if _RATIO.fullmatch(gold):
        response = _RATIO_IN_WORDS.sub(r"\1:\2", response)
    stated = math_answer.stated(response)
    for compare in (_as_choice, _as_words):
        verdict = compare(gold, stated)
        if verdict is not None:
            return verdict
    return _as_formula(gold, stated)


def reference(text: str) -> str:
    """The answer of a reference: its marked answer, else the number its sentence states, else the whole text."""
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
    """The verdict if the reference is the letter of an option, or several letters."""
    text = math_answer.trim(stated.text)
    several = choices.several(gold) or (choices.joined(gold) if choices.several(text) else None)
    if several:
        given = choices.several(text) or choices.joined(text) or frozenset()
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
        or next(filter(None, map(choices.concluded, texts)), "")
        or choices.named(stated.response.split("\n", 1)[0])
    )
    return choices.Choice(letter) if letter else None


def _by_content(choice: choices.Choice, stated: Stated) -> Verdict | None:
    """If the response names no letter, compare the content of the reference's option."""
    if choice.content:
        return judge(Case(choice.content, stated.response))
    return Verdict(False, _detail(choice.letter, _or_none(stated.expression() or _short_text(stated)), "choice"))


# Words, times, dates, versions


def _as_words(gold: str, stated: Stated) -> Verdict | None:
    """The verdict if the reference is not a formula; also True if both are the same text."""
    if (time := clock.time(gold)) and (given := _time_of(stated)):
        return Verdict(clock.same_time(time, given), _detail(gold, stated.text, "time"))
    texts = stated.sentences()
    sign = _infinity(gold)
    for text in texts:
        if _same_text(gold, text) or (sign and _infinity(text) == sign):
            return Verdict(True, _detail(gold, text, "text"))
    ranges = [numbers.interval(text) for text in (gold, *texts)]
    if ranges[0] and any(ranges[1:]):
        return Verdict(ranges[0] in ranges[1:], _detail(gold, texts[-1], "range"))
    if (dates := clock.dates(gold)) and len(gold.split()) <= 4:
        return Verdict(_same_date(dates, texts), _detail(gold, texts[-1], "date"))
    if gold.casefold().strip(" .") in phrases.YES_OR_NO:
        return Verdict(_agrees(gold, stated), _detail(gold, _or_none(_short_text(stated)), "text"))
    if (_is_words(gold) and not numbers.spelled(gold, nouns=0)) or clock.is_label(gold):
        texts = [*texts, statements.last_sentence(stated.text)]
        ends = any(says(text, gold) for text in texts for says in (_ends_with, _ends_as, _begins_with))
        return Verdict(ends, _detail(gold, _or_none(_short_text(stated)), "text"))
    return None


def _time_of(stated: Stated) -> clock.Time | None:
    for text in (*stated.sentences(), stated.expression()):
        if time := clock.time(text):
            return time
    return clock.time_within(stated.sentences()[-1])


def _same_date(gold: Collection[clock.Date], texts: list[str]) -> bool:
    given = next(filter(None, map(clock.dates, texts)), frozenset())
    return any(one[1:] == other[1:] and one[0] in (None, other[0]) for one in gold for other in given)


def _agrees(gold: str, stated: Stated) -> bool:
    """Whether a response's yes or no, at the beginning of its first or last sentence, is the reference's."""
    meant = _meant(gold)
    for text in (*stated.sentences(), stated.text):
        first = re.match(r"[\s*_]*([^\W\d_]+(?:'t)?)", text)
        if first and _meant(first[1]) in phrases.SAME_TEXT[3:5]:
            return _meant(first[1]) == meant
    said = list(_TRUTH.finditer(stated.sentences()[-1])) or list(_TRUTH.finditer(stated.text))
    is_true = bool(said) and (said[-1]["yes"] is not None) == (said[-1]["denied"] is None)
    return bool(said) and is_true == (meant == phrases.SAME_TEXT[3])


def _meant(word: str) -> frozenset[str]:
    word = _normal(word)
    return next((group for group in phrases.SAME_TEXT if word in group), frozenset({word}))


def _ends_with(text: str, gold: str) -> bool:
    """Whether a short sentence ends with the reference and contains no negation."""
    whole, end = _normal(text), _normal(gold)
    if len(whole.split()) > 15 or not whole.endswith(f" {end}"):
        return False
    before = whole[: -len(end)]
    if re.search(r"(?:than|unlike|except|without|instead of) $", before):
        return False
    return (
        not re.search(phrases.any_of(f"{phrases.NOT}, {phrases.AND}", phrases.NOT_JOINED), before, re.IGNORECASE)
        and "-" not in before[-1:]
    )


def _begins_with(text: str, gold: str) -> bool:
    """Whether a sentence names the reference as the answer: "Anna is the tallest"."""
    whole, name = _normal(text), _normal(gold)
    return (
        bool(name) and re.match(rf"{re.escape(name)} (?:is|was|are|were) the (?!same|only one not)", whole) is not None
    )


def _ends_as(text: str, gold: str) -> bool:
    """Whether a short sentence ends with a phrase that means the same as the reference, such as "has no solution"."""
    said, meant = _normal(text), _meant(gold)
    before = [said[: -len(entry)] for entry in meant if said.endswith(f" {entry}")]
    is_denied = re.compile(phrases.any_of(phrases.DENIAL, phrases.DENIAL_JOINED)).search
    return len(meant) > 1 and len(said.split()) <= 15 and any(not is_denied(words) for words in before)


def _same_text(gold: str, text: str) -> bool:
    if _FACTORIAL.search(gold) and not _FACTORIAL.search(text):
        return False
    if math_plain(gold) == math_plain(text):
        return bool(math_plain(gold))
    return _normal(gold) != "" and (_normal(gold) == _normal(text) or _meant(gold) == _meant(text))


def _normal(text: str) -> str:
    """A text as plain words: no markup, articles, surrounding punctuation or case."""
    text = re.sub(r"[*_`\"$]|\\(?=[ ,;!])", " ", _WRAPPED.sub(r"\1", text)).casefold()
    text = re.sub(r"\s+", " ", text).strip(" .,;:!?'")
    return re.sub(r"^(?:the|a|an) ", "", text)


def _is_words(text: str) -> bool:
    """Whether a text is words, which must not be parsed as a product of variables."""
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
    gold = numbers.spelled(gold, nouns=0) or gold
    given = stated.expression()
    if not re.search(r"\d", given):
        given = next(filter(None, (numbers.spelled(_WRAPPED.sub(r"\1", text)) for text in stated.sentences())), given)
    if not math_answer.tidy(given):
        return Verdict(False, {"gold": _short(gold), "parsed": None, "version": VERSION})
    verdict = compare(gold, given)
    if verdict.is_right is False and given.endswith("!") and "!" not in gold:
        return compare(gold, given.rstrip("!"))  # an exclamation mark at the end of a sentence
    if verdict.is_right is False and "," in gold:
        parts = ",".join(marks.boxes(stated.response))
        verdict = compare(gold, parts) if parts and parts != given else verdict
    return verdict


def compare(gold: str, given: str) -> Verdict:
    """Compare two expressions, each with its unit."""
    quantities = units.split(gold), units.split(given)
    dimensions = [each.unit.dimensions for each in quantities]
    if all(dimensions) and dimensions[0] != dimensions[1]:
        return Verdict(False, _detail(quantities[0].value, quantities[1].value, "unit"))
    if math_plain(math_answer.tidy(gold)) == math_plain(math_answer.tidy(given)):
        return Verdict(True, _detail(math_answer.tidy(gold), math_answer.tidy(given), "text"))
    sides = [side for side in _APPROXIMATE.split(given) if side.strip()]
    if len(sides) > 1:
        # An exact value and its decimal approximation: either may match.
        verdicts = [compare(gold, side) for side in sides]
        return next((verdict for verdict in verdicts if verdict.is_right), verdicts[0])
    if (signs := (_infinity(gold), _infinity(given))) != ("", ""):
        return Verdict(signs[0] == signs[1], _detail(gold, given, "text"))
    if _is_other_kind(gold, given):
        return Verdict(False, _detail(gold, given, "text"))
    choice = choices.read(given)
    if choice and choice.content:
        given = choice.content
    return _by_value(units.split(gold), units.split(given))


def _is_other_kind(gold: str, given: str) -> bool:
    """Whether the two cannot be equal because one of them is a time, a version or words."""
    if clock.is_label(gold) or clock.is_label(given) or _is_words(given):
        return True
    is_ratio = any(re.search(r":|\\colon", text) and not clock.time(text) for text in (gold, given))
    return (clock.time(gold) or clock.time(given)) is not None and not is_ratio


def _by_value(gold: units.Quantity, given: units.Quantity) -> Verdict:
    if gold.may_be_variable and not given.has_unit:
        return Verdict(False, _detail(gold.value, given.value, "unit"))
    is_convertible = gold.unit.dimensions and gold.unit.dimensions == given.unit.dimensions
    factor = given.unit.scale / gold.unit.scale * (given.unit.factor / gold.unit.factor if is_convertible else 1)
    texts = [_MEMBER.sub("", numbers.plain(_latex(each.value))) for each in (gold, given)]
    gold_parsed, parsed = algebra.parse_reference(texts[0]), algebra.parse(texts[1])
    if gold_parsed is None:
        return Verdict(None, failure="unparsed: the reference is neither a formula nor words")
    if parsed is None:
        return Verdict(False, _detail(gold.value, given.value, "text") | {"parsed": None, "unparsed": _short(texts[1])})
    detail = _detail(gold_parsed, parsed, "math")
    is_interval = _INTERVAL.search(gold.value) is not None or _MEMBER.search(gold.value) is not None
    if algebra.equal(gold=gold_parsed, stated=algebra.times(parsed, factor), with_relations=is_interval):
        return Verdict(True, detail)
    comma = "" if "," in gold.value or numbers.is_doubtful(given.value) else numbers.other_reading(given.value)
    if comma and algebra.equal(gold=gold_parsed, stated=algebra.times(algebra.parse(comma), factor)):
        return Verdict(True, detail)
    return _by_other_reading(gold.value, given.value, detail)


def _by_other_reading(gold: str, given: str, detail: dict[str, Any]) -> Verdict:
    """The verdict on two numbers that may be equal if a comma is read as a decimal point or vice versa."""
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
    """The sign of an infinite answer; "" for a finite one."""
    bare = re.sub(r"\s+", " ", _WRAPPED.sub(r"\1", text).replace("$", "")).strip(" .").casefold()
    names = "|".join(map(re.escape, phrases.entries(phrases.INFINITY)))
    minus, plus = (phrases.any_of(table, table) for table in (phrases.MINUS, phrases.PLUS))
    found = re.fullmatch(rf"(?:(?P<minus>-|{minus})|\+|{plus})?\s*(?:{names})", bare)
    return ("-" if found["minus"] else "+") if found else ""


def math_plain(text: str) -> str:
    """Normalise a text so that differences in typesetting disappear."""
    text = re.sub(r"\\(?:text\w*|mathrm|mathbf|mbox)\s*\{([^{}]*)\}|\\(?:left|right|displaystyle|[!,;: ])", r"\1", text)
    return re.sub(r"(?<!\d)[\s$]+|[\s$]+(?!\d)", "", text.replace("dfrac", "frac").replace("tfrac", "frac")).casefold()


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
