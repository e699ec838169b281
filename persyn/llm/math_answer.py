"""Where a response states its final answer, and that answer as plain LaTeX.

Knows text, no algebra: every function here takes time linear in the text, or nearly so.
"""

from __future__ import annotations

import json
import re
from typing import Any

from latex2sympy2_extended.math_normalization import extract_boxed_content

#: An answer longer than this is none that could be compared, and is taken for no answer.
LONGEST = 1_000

_KEY = re.compile(r'"(?:final[_ ]?)?answer"\s*:\s*', re.IGNORECASE)
#: What a \u in JSON can name and no database's text can hold: NUL, and half of a surrogate pair.
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_RAW_VALUE = re.compile(r'"?((?:[^"\\\n]|\\.)*)')
_HASHES = re.compile(r"^\s*####[ \t]*(?![A-Za-z]{3})(\S.*)$", re.MULTILINE)
_FINAL = re.compile(r"\bfinal answer is\b[\s*_:]*(.+)", re.IGNORECASE)
_PHRASE = re.compile(r"\banswer\b[^.:=\n]{0,60}?(?:\bis\b\s*:?|[:=])[\s*_]*(.+)", re.IGNORECASE)
#: Where the answer ends in a sentence that goes on to explain it.
_STATED_END = re.compile(r"[.!?](?=\s|$)|,\s+(?=[a-z]{3,}\b(?<!and))|\s(?:because|since|which|where|so|meaning)\b")
_MATH = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|\$([^$\n]+?)\$", re.DOTALL)
_COMMAND = re.compile(r"\\(?:text\w*|mathrm|mathbf|mbox|operatorname|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{3,}|\b(?:an|at|by|he|if|is|it|no|of|so|to|we)\b", re.IGNORECASE)
#: Words that an expression may hold without being a sentence.
_MATH_WORDS = frozenset(
    {"and", "cos", "cot", "csc", "deg", "exp", "inf", "infinity", "lim", "log", "max", "min", "mod"}
    | {"pct", "percent", "percentage", "sec", "sin", "sqrt", "tan", "arccos", "arcsin", "arctan"}
)
_ORDINAL = re.compile(r"\d(?:st|nd|rd|th)\b")
_OPERATORS = frozenset({"+", "-", "*", "/", "^", "=", "\\times", "\\cdot", "\\div"})

_SYMBOLS = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "\N{EN DASH}": "-",
        "\N{MULTIPLICATION SIGN}": "\\times ",
        "\N{DIVISION SIGN}": "/",
        "\N{GREEK SMALL LETTER PI}": "\\pi ",
        "\N{SQUARE ROOT}": "\\sqrt ",
        "\N{INFINITY}": "\\infty ",
        "\N{LESS-THAN OR EQUAL TO}": "\\le ",
        "\N{GREATER-THAN OR EQUAL TO}": "\\ge ",
        "\N{DEGREE SIGN}": "^\\circ ",
        "\N{SUPERSCRIPT TWO}": "^2",
        "\N{SUPERSCRIPT THREE}": "^3",
        "\N{NO-BREAK SPACE}": " ",
    }
)
_REWRITES = [
    # An upright e or i is the constant; it would be taken for a unit.
    (re.compile(r"\\(?:mathrm|text|rm)\s*\{\s*([ei])\s*\}"), r"\1"),
    (re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?!\w)"), r"\1\\times 10^{\2}"),
    (re.compile(r"^(-?\d+)\s+(\d+)/(\d+)$"), r"\1\\frac{\2}{\3}"),
    (re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"\\?\$|[\N{EURO SIGN}\N{POUND SIGN}]"), ""),
    (re.compile(r"\*\*"), "^"),
]


def find(text: str) -> str:
    """The answer a text states, as LaTeX without delimiters; "" when it states none.

    What is marked as the answer counts, the last mark first: \\boxed{}, a JSON field "answer", a line
    that begins with ####, else "the answer is". Without a mark it is the last formula or number of
    the text, or a short text as a whole.
    """
    marked = _marked(text)
    answer = text if marked is None else marked
    if is_prose(answer):
        stated = _marked(answer) if marked is not None else None
        answer = _last_expression(answer if stated is None else stated) or ("" if marked is None else answer)
    answer = tidy(answer)
    return answer if len(answer) <= LONGEST else ""


def is_prose(text: str) -> bool:
    """Whether a text is a sentence rather than an expression."""
    if len(text) > LONGEST or "\n\n" in text.strip():
        return True
    words = [word for word in _WORD.findall(_COMMAND.sub(" ", text)) if word.lower() not in _MATH_WORDS]
    return len(words) > 1 or (len(words) == 1 and re.search(r"\d", text) is not None)


def tidy(text: str) -> str:
    """An expression as LaTeX: no delimiters, no mark-up, no currency, no closing full stop."""
    text = re.sub(r"\\?[\"`]", "", text).strip(" \t\n'")
    text = re.sub(r"^\*\*(.*?)\*\*$", r"\1", text, flags=re.DOTALL)
    text = re.sub(r"^\\[\[(](.*)\\[\])]\.?$", r"\1", text.rstrip(" .,;"), flags=re.DOTALL)
    text = text.translate(_SYMBOLS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip().lstrip(",;").rstrip(" \t\n.,;")


def _marked(text: str) -> str | None:
    marks = (_boxed(text), _json_field(text), _after(_HASHES, text), _after_phrase(_FINAL, text))
    found = [mark for mark in marks if mark is not None]
    last = max(found) if found else _after_phrase(_PHRASE, text)
    return None if last is None else last[1]


def _boxed(text: str) -> tuple[int, str] | None:
    at = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    if at < 0:
        return None
    content = extract_boxed_content(text, "last")
    # A box that is never closed ends with its line.
    return at, content.lstrip("{").split("\n")[0] if content.startswith("{") and "}" not in content else content


def _json_field(text: str) -> tuple[int, str] | None:
    keys = list(_KEY.finditer(text))
    if not keys:
        return None
    start = keys[-1].end()
    try:
        return start, _json_text(json.JSONDecoder(strict=False).raw_decode(text, start)[0])
    except RecursionError:
        return start, ""  # lists in lists, deeper than any answer
    except ValueError:
        # LaTeX that was not escaped, or a text cut off within the value.
        raw = _RAW_VALUE.match(text, start)
        return start, _json_text(raw[1].replace("\\\\", "\\").rstrip(" ,}") if raw else "")


def _json_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_json_text(item) for item in value)
    if isinstance(value, str):
        value = _UNSTORABLE.sub("\N{REPLACEMENT CHARACTER}", value)
        # "\frac" in a JSON string is a form feed and "rac": what a backslash meant is put back.
        return re.sub(r"[\b\t\n\f\r](?=[a-z])", lambda m: "\\" + "btnfr"["\b\t\n\f\r".index(m[0])], value)
    return "" if value is None or isinstance(value, dict) else str(value)


def _after(pattern: re.Pattern[str], text: str) -> tuple[int, str] | None:
    matches = list(pattern.finditer(text))
    return (matches[-1].start(), matches[-1][1]) if matches else None


def _after_phrase(pattern: re.Pattern[str], text: str) -> tuple[int, str] | None:
    found = _after(pattern, text)
    return found and (found[0], _STATED_END.split(found[1], maxsplit=1)[0].strip(" *_\"'`"))


def _last_expression(text: str) -> str:
    """The last formula or number of a text; "" when it has none."""
    text = text[-2 * LONGEST :]
    start, run = _last_run(text)
    formulas = [m for m in _MATH.finditer(text) if not is_prose(m[m.lastindex or 0])]
    if formulas and formulas[-1].end() > start:
        last = formulas[-1]
        return last[last.lastindex or 0]
    return run


def _last_run(text: str) -> tuple[int, str]:
    """The last run of words that can be one expression, and where its last word begins; (-1, "") without one."""
    start, run = -1, list[str]()
    for match in reversed(list(re.finditer(r"\S+", text))):
        word = match[0].strip("*_`\"'|")
        if run and not _continues(word, run):
            break
        if run or (_is_mathematical(word) and re.search(r"\d", word)):
            start = max(start, match.start())
            run.insert(0, word)
    return start, " ".join(run).rpartition("=")[2].strip("+*/ ")


def _continues(word: str, run: list[str]) -> bool:
    """Whether a word is part of the expression that goes on after it."""
    return _is_mathematical(word) and (word[-1] not in ".,;:!?" or _is_open(run))


def _is_open(words: list[str]) -> bool:
    """Whether words close a bracket that they do not open."""
    joined = "".join(words)
    return sum(map(joined.count, ")]}")) > sum(map(joined.count, "([{"))


def _is_mathematical(word: str) -> bool:
    bare = word.rstrip(".,;:!?")
    if bare in _OPERATORS:
        return True
    if re.search(r"\d", bare):
        return not is_prose(bare) and _ORDINAL.search(bare) is None
    return len(bare) == 1 and bare.isalpha() and bare not in "aAI"
