"""Parse numbers with digit grouping, ranges and English number words into plain decimals."""

from __future__ import annotations

import re
from fractions import Fraction

_GAP = r"(?:\{,\}|\\[,!;: ]|[ '_])"
_SIGNED = r"(?P<sign>[-+]?)\s*"
#: 1,234,567.8 and, in India, 12,34,567.8; 1 234 567,8; 1'234'567.8; 1.234.567,8.
_COMMAS = re.compile(
    rf"{_SIGNED}(?P<whole>\d{{1,3}}(?:(?:,|\{{,\}}|,\\!)\d{{2,3}})*(?:,|\{{,\}}|,\\!)\d{{3}})(?P<rest>\.\d+)?"
)
_GAPS = re.compile(rf"{_SIGNED}(?P<whole>\d{{1,3}}(?:{_GAP}\d{{3}})+)(?P<rest>[.,]\d+)?")
_DOTS = re.compile(rf"{_SIGNED}(?P<whole>\d{{1,3}}(?:\.\d{{3}})+)(?P<rest>,\d+)?")
_DECIMAL_COMMA = re.compile(rf"{_SIGNED}(?P<whole>\d+)(?P<rest>(?:,|\{{,\}})\d+)")
_AMOUNT = r"\d[\d,]*(?:\.\d+)?"
_RANGE = re.compile(
    rf"(?:between\s+(?P<low>{_AMOUNT})\s+and\s+(?P<high>{_AMOUNT})|"
    rf"(?:from\s+)?(?P<from>{_AMOUNT})\s*(?:-|--|to|~)\s*(?P<to>{_AMOUNT}))(?:\s+[^\W\d_]+){{0,3}}",
    re.IGNORECASE,
)
_PLAIN = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")

_SMALL = {
    **{"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9},
    **{"ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16},
    **{"seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50},
    **{"sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90},
}
#: Maximum number of words after a spelled-out number: what it counts, and where.
_NOUNS = 5
_LARGE = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_PARTS = {"half": 2, "quarter": 4, "third": 3, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8} | {
    "ninth": 9,
    "tenth": 10,
}


def plain(text: str) -> str:
    """A number without digit grouping and with a decimal point; other texts are unchanged."""
    text = text.strip()
    if _COMMAS.fullmatch(text) and not text.lstrip("+-").startswith("0,"):
        return _joined(_COMMAS.fullmatch(text))
    if _GAPS.fullmatch(text):
        return _joined(_GAPS.fullmatch(text))
    dots = _DOTS.fullmatch(text)
    if dots and (dots["rest"] or dots["whole"].count(".") > 1):
        return _joined(dots)
    return text


def other_reading(text: str) -> str:
    """The number's value if read with a decimal comma, where that differs; else ""."""
    text = text.strip()
    if _DOTS.fullmatch(text) and not text.lstrip("+-").startswith("0"):
        reading = _joined(_DOTS.fullmatch(text))
    elif _DECIMAL_COMMA.fullmatch(text):
        reading = _joined(_DECIMAL_COMMA.fullmatch(text))
    else:
        return ""
    return "" if reading == plain(text) else reading


def is_doubtful(text: str) -> bool:
    """Whether both readings of a number are common, as for 1.234 and 1,234, but not for 1,5 or 1.234.567."""
    return re.fullmatch(r"[-+]?\d{1,3}[.,]\d{3}", text.strip()) is not None


def interval(text: str) -> tuple[Fraction, Fraction] | None:
    """The bounds of a range, `5-10`, `5 to 10` or `between 5 and 10`; None for anything else."""
    found = _RANGE.fullmatch(text.strip(" .$"))
    if not found:
        return None
    low, high = (Fraction(plain(found[a] or found[b]).replace(",", "")) for a, b in (("low", "from"), ("high", "to")))
    return (low, high) if low < high else None


def is_number(text: str) -> bool:
    """Whether a text is a single number in digits."""
    return _PLAIN.fullmatch(plain(text)) is not None


def spelled(text: str, *, nouns: int = _NOUNS) -> str:
    """The number, in digits, that a short text begins with in English words; "" for none.

    "Twenty-one apples" is 21, "minus two thirds" -2/3; "one of the two that are left" is too long to be a number.
    """
    words = re.sub(r"(?<=[a-z])-(?=[a-z])", " ", text.casefold()).split()
    sign = "-" if words[:1] in (["minus"], ["negative"]) else ""
    words = [word.strip(".,;:!?*'\"") for word in words[bool(sign) :]]
    known = next((n for n, word in enumerate(words) if not _is_number_word(word, at=n)), len(words))
    while known and words[known - 1] in ("and", "a"):
        known -= 1
    if not known or len(words) - known > nouns or words[known : known + 1] == ["of"]:
        return ""
    value = _value_of(words[:known])
    return f"{sign}{value}" if value is not None else ""


def _is_number_word(word: str, *, at: int) -> bool:
    is_part = word in _PARTS or word.removesuffix("s") in _PARTS or word == "halves"
    return word in _SMALL or word in _LARGE or word == "a" or (at > 0 and word == "and") or is_part


def _value_of(words: list[str]) -> Fraction | None:
    """The value of number words; None if they are not a number, e.g. "three and" or "four five"."""
    part = "half" if words[-1] == "halves" else words[-1] if words[-1] in _PARTS else words[-1].removesuffix("s")
    if part not in _PARTS:
        return _whole(words)
    before = words[:-1]
    wholes: list[str] = []
    if "and" in before:
        cut = len(before) - before[::-1].index("and")
        wholes, before = before[: cut - 1], before[cut:]
    whole = _whole(wholes) if wholes else Fraction(0)
    count = _whole(before) if before else Fraction(1) if part == "half" else None
    return None if whole is None or count is None else whole + count / _PARTS[part]


def _whole(words: list[str]) -> Fraction | None:
    total = group = 0
    last = 10**12
    for word in (word for word in words if word != "and"):
        if word in _LARGE:
            group = (group or 1) * _LARGE[word]
            if _LARGE[word] > 100:
                total, group = total + group, 0
            last = _LARGE[word]
        elif word == "a":
            group, last = group + 1, 1
        elif word in _SMALL:
            size = 1 if _SMALL[word] < 20 else 10
            if last <= size or (last == 10 and _SMALL[word] > 9):
                return None
            group, last = group + _SMALL[word], size
        else:
            return None
    return Fraction(total + group) if words else None


def _joined(found: re.Match[str] | None) -> str:
    assert found is not None
    return (
        found["sign"]
        + re.sub(r"\D", "", found["whole"])
        + (re.sub(r"^\D+", ".", found["rest"]) if found["rest"] else "")
    )
