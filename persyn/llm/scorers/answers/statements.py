"""Find the answer in a sentence that states it: which number is meant, and where the answer ends."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from persyn.llm.scorers.answers import phrases, units
from persyn.llm.scorers.answers.characters import FOREIGN

#: A longer text is not an expression.
LONGEST = 1_000

_FORMULA = re.compile(r"\$\$.+?\$\$|\\\[.+?\\\]|\\\(.+?\\\)|\$[^$\n]+?\$(?!\d)", re.DOTALL)
#: The next possible end of a word: a space, or the beginning of a formula.
_WORD_END = re.compile(r"(?:[^\s$\\]|\\(?![\[(]))*")
_COMMAND = re.compile(r"\\(?:text\w*|mathrm|mathbf|mbox|operatorname|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(rf"[^\W\d_]{{3,}}|[{FOREIGN}]+|\b(?:an|at|by|he|if|is|it|no|of|so|to|we)\b", re.IGNORECASE)
#: Words that may occur in an expression.
_MATH_WORDS = frozenset(
    {"and", "cos", "cot", "csc", "deg", "exp", "inf", "infinity", "lim", "log", "max", "min", "mod"}
    | {"pct", "percent", "percentage", "sec", "sin", "sqrt", "tan", "arccos", "arcsin", "arctan"}
)
_ORDINAL = re.compile(r"\d(?:st|nd|rd|th)\b")
_OPERATORS = frozenset({"+", "-", "*", "/", "^", "=", "\\times", "\\cdot", "\\div", "\\pm", "\N{MULTIPLICATION SIGN}"})

_ABBREVIATION = re.compile(r"\b(Rs|approx|ca|circa|No|Nr)\.\s*(?=\d)", re.IGNORECASE)
_HALF_OF_DAY = re.compile(r"\b([ap])\.\s?m\b\.?", re.IGNORECASE)
_AND = phrases.any_of(phrases.AND, phrases.AND_JOINED)
_END = re.compile(
    rf"[.!?](?=\s|$)|;\s|,\s+(?!{_AND})(?=[^\W\d_]{{2,}}|[\u3040-\uffdc])|,?\s{{0,9}}{phrases.any_of(phrases.REASON)}|\s[—-]+\s(?=[^\W\d_]{{2,}})|—",
    re.IGNORECASE,
)
#: Parentheses after a space with words or a calculation: "12 (3 boxes of 4)", "20 (4*5)", but not "3 (x + 1)".
_ASIDE = re.compile(
    rf"(?<=\S)(?<!\sand)(?<!\sor)(?<!,)\s+\((?!\s*\w\s*\))(?=[^()]*(?:[^\W\d_]{{2,}}|[{FOREIGN}]|=)|[\d\s.,*/+×÷-]+\))[^()]*\)(?!\s*[-+*/^=(])|"
    rf"(?<=\d)\((?=[^()\\]*(?:[^\W\d_]{{3,}}|[{FOREIGN}]))[^()]*\)"
)
_FILLERS = rf"(?:[\s*_:]*{phrases.any_of(phrases.FILLER, phrases.FILLER)}|\s*(?:≈|~|\\approx|\\sim|\\simeq))*"
_BEFORE_VALUE = r"[\s*_]*(?=[-+±]?\s?(?:[^\W\d_]{0,3}[$€£¥₹₽₩]|Rs|USD|EUR)?\s?[-+]?\.?\d|\$|\\[(\[])"
_SAYS = re.compile(
    rf"(?:{phrases.any_of(f'{phrases.LINK}, {phrases.COUNTING}', phrases.LINK_JOINED)}|[:=]){_FILLERS}{_BEFORE_VALUE}",
    re.IGNORECASE,
)
_BEGINS = re.compile(rf"{_FILLERS}{_BEFORE_VALUE}", re.IGNORECASE)
#: Number of characters before a number that are searched for a negation.
_DENIAL = 30
_DENYING = re.compile(
    rf"{phrases.any_of(phrases.DENIAL, phrases.DENIAL_JOINED)}"
    rf"(?:\s*(?:{phrases.any_of(f'{phrases.LINK}, be, been, equal, exactly, to', phrases.LINK_JOINED)}))?[\s*$]*$",
    re.IGNORECASE,
)
_CUT_OFF = re.compile(
    r"(?<![^\W\d_])(?:and|or|the|an|of|to|by|with|for|from|is|are|was|we|then|so|because|which|that|plus|minus|times"
    r"|has|have|be|than|but|if|as|on|at|und|et|y|e)\s*$|(?<=\w)\s*[+=×÷]\s*$",
    re.IGNORECASE,
)
_DANGLING = re.compile(rf"(?<=\d)\s+{_AND}$", re.IGNORECASE)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True, slots=True)
class _Token:
    start: int
    text: str
    is_formula: bool


def is_prose(text: str) -> bool:
    """Whether a text is a sentence rather than an expression."""
    if len(text) > LONGEST or "\n\n" in text.strip():
        return True
    words = [word for word in _WORD.findall(_COMMAND.sub(" ", text)) if word.lower() not in _MATH_WORDS]
    return len(words) > 1 or (len(words) == 1 and re.search(r"\d", text) is not None)


def _without_point(abbreviation: re.Match[str]) -> str:
    return "number " if abbreviation[1].lower() in ("no", "nr") else f"{abbreviation[1]} "


def first_part(text: str) -> str:
    """Running text up to the end of its answer."""
    text = _HALF_OF_DAY.sub(r"\1m", _ABBREVIATION.sub(_without_point, text))
    text = _END.split(text, maxsplit=1)[0].strip(" *_\"'`").removesuffix("(").strip()
    return _DANGLING.sub("", text)


def without_aside(text: str) -> str:
    """The text without remarks in parentheses and citation numbers."""
    return re.sub(r"(?<=\d)\s+\[\d{1,2}\]$", "", _ASIDE.sub("", text)).strip()


def is_cut_off(text: str) -> bool:
    """Whether a text is truncated within a sentence, so that the answer may be missing."""
    return _CUT_OFF.search(text) is not None


def last_sentence(text: str) -> str:
    """The last sentence of a text that has any content."""
    sentences = [s for s in _SENTENCE.split(_HALF_OF_DAY.sub(r"\1m", text.strip())) if re.search(r"\w", s)]
    return sentences[-1] if sentences else ""


def predicate(text: str) -> str:
    """The predicate of a sentence; the whole sentence if it has no known verb, or is negated."""
    verb = list(re.finditer(phrases.any_of(phrases.LINK, phrases.LINK_JOINED) + r"|:\s", text, re.IGNORECASE))
    return text[verb[-1].end() :].strip() if verb and not _is_denied(text, verb[-1].end()) else text


def expression(text: str) -> str:
    """The number or formula that a text states; "" if there is none.

    In order of preference: what follows the last "is", "has" or "=", what the sentence begins with, the last one.
    """
    text = _HALF_OF_DAY.sub(r"\1m", _ABBREVIATION.sub(_without_point, text[-2 * LONGEST :]))
    tokens = list(_tokens(text))
    at, last = _last(tokens)
    if at < 0:
        return ""
    start = max((found.end() for found in _SENTENCE.finditer(text, 0, at)), default=0)
    if any(token.start < start < token.start + len(token.text) for token in tokens):
        return last
    told = _told([token for token in tokens if token.start >= start], text, start)
    return told or ("" if _is_denied(text, at) else last)


def _is_denied(text: str, at: int) -> bool:
    """Whether the value at this position is negated: "is not 5", "cannot be 5"."""
    return _DENYING.search(text[max(0, at - _DENIAL) : at]) is not None


def _told(tokens: Sequence[_Token], text: str, start: int) -> str:
    """What a sentence states explicitly: after its last verb followed by a number, or as its first word."""
    formulas = [(t.start, t.start + len(t.text)) for t in tokens if t.is_formula]
    says = [
        m.end()
        for m in _SAYS.finditer(text, start)
        if not any(a < m.start() < b for a, b in formulas) and not _is_denied(text, m.start())
    ]
    begins = _BEGINS.match(text, start)
    at = says[-1] if says else begins.end() if begins else -1
    return _first([token for token in tokens if token.start >= at]) if at >= 0 else ""


def _tokens(text: str) -> Iterator[_Token]:
    """Formulas and the words between them; a "formula" that contains a sentence, as between two prices, is words."""
    at = 0
    while found := re.compile(r"\S").search(text, at):
        start = found.start()
        if formula := _formula(text, start):
            at = start + len(formula)
            yield _Token(start, formula, True)
            continue
        at = _word_end(text, start)
        while at < len(text) and not text[at].isspace() and not _formula(text, at):
            at = _word_end(text, at)
        yield _Token(start, text[start:at], False)


def _formula(text: str, at: int) -> str:
    """The formula that begins at this position; "" for none."""
    found = _FORMULA.match(text, at)
    return found[0] if found and not is_prose(_inner(found[0])) else ""


def _word_end(text: str, at: int) -> int:
    found = _WORD_END.match(text, at + 1)
    return found.end() if found else at + 1


def _inner(formula: str) -> str:
    return formula.strip("$") if formula.startswith("$") else formula[2:-2]


def _first(tokens: Sequence[_Token]) -> str:
    """The expression that the tokens begin with, and its unit."""
    if tokens and tokens[0].is_formula and not is_prose(_inner(tokens[0].text)):
        return _with_unit(_inner(tokens[0].text), tokens[1:])
    run: list[str] = []
    for number, token in enumerate(tokens):
        word = token.text.strip("*_`\"'|")
        if token.is_formula or not _is_mathematical(word):
            return _with_unit(_of_run(run), tokens[number:])
        run.append(word)
        if word[-1:] in tuple(".,;:!?") and not _opens(run):
            break
    return _of_run(run)


def _with_unit(value: str, tokens: Sequence[_Token]) -> str:
    """A value with the following words, as far as they are a known unit."""
    if not value or value[-1] in ".,;:!?":
        return value
    words: list[str] = []
    best = 0
    for token in tokens[:6]:
        words.append(token.text.strip("*_`\"'|").rstrip(".,;:!?"))
        if units.is_known(" ".join(words)) and (words[-1] != "in" or len(words) == 1):
            best = len(words)
    return " ".join([value, *words[:best]])


def _last(tokens: Sequence[_Token]) -> tuple[int, str]:
    """The position and text of the last expression, a formula or a run of words; (-1, "") for none."""
    formulas = [t for t in tokens if t.is_formula and not is_prose(_inner(t.text))]
    words = [t for t in tokens if not t.is_formula]
    at, run, end = _last_run(tokens if not formulas else words)
    if formulas and formulas[-1].start > at:
        following = [t for t in tokens if t.start > formulas[-1].start]
        return formulas[-1].start, _with_unit(_inner(formulas[-1].text), following)
    return at, _with_unit(run, [t for t in words if t.start > end])


def _last_run(tokens: Sequence[_Token]) -> tuple[int, str, int]:
    """(start, text, start of the last word) of the last run of words that can be a single expression."""
    start, end, run = -1, -1, list[str]()
    for token in reversed(tokens):
        word = token.text.strip("*_`\"'|")
        if run and not _continues(word, run):
            break
        if run or (_is_mathematical(word) and re.search(r"\d", word)):
            end = max(end, token.start)
            start = token.start
            run.insert(0, word)
    return (end, _of_run(run), end) if start >= 0 else (-1, "", -1)


def _of_run(run: Sequence[str]) -> str:
    return " ".join(run).rpartition("=")[2].strip("+*/ ")


def _continues(word: str, run: list[str]) -> bool:
    """Whether a word belongs to the expression that continues after it."""
    return _is_mathematical(word) and (word[-1] not in ".,;:!?" or _closes(run))


def _closes(words: Sequence[str]) -> bool:
    """Whether words close a bracket that they do not open."""
    joined = "".join(words)
    return sum(map(joined.count, ")]}")) > sum(map(joined.count, "([{"))


def _opens(words: Sequence[str]) -> bool:
    joined = "".join(words)
    return sum(map(joined.count, ")]}")) < sum(map(joined.count, "([{"))


def _is_mathematical(word: str) -> bool:
    bare = word.rstrip(".,;:!?")
    if bare in _OPERATORS:
        return True
    if re.search(r"\d", bare):
        return not is_prose(bare) and _ORDINAL.search(bare) is None
    return len(bare) == 1 and bare.isalpha() and bare.isascii() and bare not in "aAI"
