"""Extract the final answer of a response and convert it to plain LaTeX.

Text only, no algebra; every function runs in roughly linear time.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from persyn.llm.scorers.answers import characters, marks, phrases, statements, units
from persyn.llm.scorers.answers.statements import LONGEST, is_prose

__all__ = ["LONGEST", "Stated", "find", "is_prose", "stated", "tidy"]

_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SYMBOLS = str.maketrans(
    {
        "\N{MULTIPLICATION SIGN}": "\\times ",
        "\N{MIDDLE DOT}": "\\cdot ",
        "\N{DOT OPERATOR}": "\\cdot ",
        "\N{DIVISION SIGN}": "/",
        "\N{GREEK SMALL LETTER PI}": "\\pi ",
        "\N{INFINITY}": "\\infty ",
        "\N{LESS-THAN OR EQUAL TO}": "\\le ",
        "\N{GREATER-THAN OR EQUAL TO}": "\\ge ",
        "\N{NOT EQUAL TO}": "\\ne ",
        "\N{UNION}": "\\cup ",
        "\N{INTERSECTION}": "\\cap ",
        "\N{ELEMENT OF}": "\\in ",
        "\N{EMPTY SET}": "\\emptyset ",
        "\N{DOUBLE-STRUCK CAPITAL R}": "\\mathbb{R}",
        "\N{PLUS-MINUS SIGN}": "\\pm ",
        "\N{DEGREE SIGN}": "^\\circ ",
        "\N{NO-BREAK SPACE}": " ",
    }
)


def _as_matrix(found: re.Match[str]) -> str:
    """Convert rows in brackets, [[1, 2], [3, 4]], to a LaTeX matrix."""
    rows = (row.replace(",", " & ") for row in re.findall(r"\[([^\[\]]*)\]", found[1]))
    return r"\begin{pmatrix}" + r" \\ ".join(rows) + r"\end{pmatrix}"


_REWRITES: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"√\s*(\d+(?:\.\d+)?|[A-Za-z])"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<=[A-Za-z])([₀-₉]+)"), lambda m: f"_{{{m[1].translate(_SUBSCRIPTS)}}}"),
    # An upright e or i is a constant, and would be parsed as a unit.
    (re.compile(r"\\(?:mathrm|text|rm)\s*\{\s*([ei])\s*\}"), r"\1"),
    (re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?!\w)"), r"\1\\times 10^{\2}"),
    (re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)|(?<=\d)\s+[xX]\s+(?=\d)"), r"\\times "),
    (re.compile(r"^([-+]?\d+)\s+(?:and\s+)?(\d+)/(\d+)$"), r"\1\\frac{\2}{\3}"),
    (re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"\\?\$|[\N{EURO SIGN}\N{POUND SIGN}]"), ""),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\^\s*(-\d+)"), r"^{\1}"),
    (re.compile(r"(?<=[)\]}])\s*,?\s*and\s*(?=[(\[{])"), ", "),
    (re.compile(r"^\[\s*(\[[^\[\]]*\](?:\s*,\s*\[[^\[\]]*\])*)\s*\]$"), _as_matrix),
]
_APPROXIMATE = re.compile(
    r"^(?:[→⇒]|(?:in|on|at|by)\s+(?=\d)|=|≈|≃|≅|≒|\\approx\b|\\simeq\b|\\thickapprox\b|\\sim\b|~|\s)+"
)
#: Long runs of whitespace mean nothing and cost time.
_BLANKS = re.compile(r"[^\S\n]{3,}")
_NEW_LINES = re.compile(r"(?:[^\S\n]{0,2}\n){3,}")
#: "Minus 8" alone or after a verb; "6 minus 8" is a difference.
_MINUS = re.compile(
    rf"(^|(?:{phrases.any_of(phrases.LINK)}|[=:])\s*){phrases.any_of(phrases.MINUS)}\s+(?=\d)", re.IGNORECASE
)
#: Precedes two alternatives; "7 or 8" states both.
_EITHER = re.compile(r"\b(?:either|entweder|soit)\s+(?=\d)", re.IGNORECASE)
_REPEATING = re.compile(
    r"(?<![\d.,])(?P<whole>\d{0,15})\.(?P<fixed>\d{0,15}?)"
    r"(?:(?:\\(?:overline|bar|dot)\s*\{?|\()(?P<cycle>\d{1,15})(?:\}|\)|(?!\d))"
    r"|(?P<dots>(?P<digit>\d)(?P=digit){2,15})(?:\.\.\.|…|\s*\\[lc]?dots))"
)
_PERCENT = re.compile(rf"(?<=\d)\s*{phrases.any_of(phrases.PERCENT)}", re.IGNORECASE)
_WRAPPED = re.compile(r"\\(?:text\w*|mbox)\s*\{([^{}]*)\}")
_NESTED = 3


@dataclass(frozen=True, slots=True)
class Stated:
    """The answer a response states; without a mark, the whole response."""

    text: str
    is_marked: bool
    response: str

    def expression(self) -> str:
        """The answer as a number or formula with its unit; "" if there is none."""
        if not self.is_marked and statements.is_cut_off(self.text):
            return ""
        text = _open_mark(self.text) if self.is_marked else self.text
        text = statements.without_aside(text)
        if is_prose(text) and not units.split(text).has_unit:
            text = statements.expression(text) or (text if self.is_marked else "")
        text = trim(text)
        return text if len(text) <= LONGEST else ""

    def sentences(self) -> list[str]:
        """Candidates for an answer in words: what is marked, or what the last sentence states."""
        if self.is_marked:
            text = _open_mark(self.text)
            return [text, statements.without_aside(text), statements.first_part(text)]
        last = statements.first_part(statements.last_sentence(self.text))
        return [self.text.strip(), last, statements.predicate(last)]


def stated(text: str) -> Stated:
    """Locate the answer in a text.

    A marked answer counts, the last mark first: \\boxed{}, a tag such as <answer>, a JSON field "answer", a line
    that begins with ####, else "the answer is" in any of many languages. Reasoning is ignored.
    """
    text = characters.plain(characters.without_reasoning(text)).strip()
    text = _NEW_LINES.sub("\n\n", _BLANKS.sub("  ", text))
    text = _EITHER.sub("", _MINUS.sub(r"\1-", text))
    mark = marks.last(text)
    if mark is None:
        return Stated(text, False, text)
    return Stated(statements.first_part(mark.text) if mark.is_running else mark.text.strip(), True, text)


def find(text: str) -> str:
    """The answer a text states, as LaTeX without delimiters; "" if it states none.

    Without a mark it is the last formula or number of the text, or a short text as a whole.
    """
    found = units.split(stated(text).expression())
    return tidy(found.value)


def tidy(text: str) -> str:
    """Clean up an expression as LaTeX: no delimiters, markup, currency or final full stop."""
    text = trim(text).translate(_SYMBOLS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip().lstrip(",;").rstrip(" \t\n.,;")


def trim(text: str) -> str:
    """Strip an expression's delimiters, markup, leading equals sign and final full stop."""
    text = _REPEATING.sub(_as_fraction, re.sub(r"\\?[\"`]", "", text).strip(" \t\n'"))
    text = re.sub(r"^\*\*(.*?)\*\*$", r"\1", text, flags=re.DOTALL)
    text = text.rstrip(" .,;")
    text = re.sub(r"^\\[\[(](.*)\\[\])]\.?$|^\$\$?([^$]*)\$\$?$", r"\1\2", text, flags=re.DOTALL)
    if "\\begin" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z]{2})", r"\\", text)  # a doubly escaped backslash
    return _APPROXIMATE.sub("", _PERCENT.sub(r"\\%", text)).strip().rstrip(" .,;")


def _as_fraction(found: re.Match[str]) -> str:
    """Convert a repeating decimal, such as 0.1(6), to a fraction."""
    whole, fixed, cycle = found["whole"] or "0", found["fixed"], found["cycle"] or found["dots"]
    digits = 10 ** len(fixed)
    value = Fraction(int(whole + fixed)) / digits + Fraction(int(cycle), (10 ** len(cycle) - 1) * digits)
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _open_mark(text: str) -> str:
    """The content of a nested mark, such as a box in a tag."""
    for _ in range(_NESTED):
        said = _WRAPPED.sub(r"\1", text)
        mark = marks.last(characters.plain(said))
        if mark is None or not mark.text or (not is_prose(said) and "boxed" not in text):
            break
        text = statements.first_part(mark.text) if mark.is_running else mark.text.strip()
    return text
