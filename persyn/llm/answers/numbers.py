"""Numbers as people group their digits, as plain decimals."""

from __future__ import annotations

import re

_GAP = r"(?:\{,\}|\\[,!;: ]|[ '_])"
_SIGNED = r"(?P<sign>[-+]?)\s*"
#: 1,234,567.8 and, in India, 12,34,567.8; 1 234 567,8; 1'234'567.8; 1.234.567,8.
_COMMAS = re.compile(
    rf"{_SIGNED}(?P<whole>\d{{1,3}}(?:(?:,|\{{,\}}|,\\!)\d{{2,3}})*(?:,|\{{,\}}|,\\!)\d{{3}})(?P<rest>\.\d+)?"
)
_GAPS = re.compile(rf"{_SIGNED}(?P<whole>\d{{1,3}}(?:{_GAP}\d{{3}})+)(?P<rest>[.,]\d+)?")
_DOTS = re.compile(rf"{_SIGNED}(?P<whole>\d{{1,3}}(?:\.\d{{3}})+)(?P<rest>,\d+)?")
_DECIMAL_COMMA = re.compile(rf"{_SIGNED}(?P<whole>\d+)(?P<rest>(?:,|\{{,\}})\d+)")
_PLAIN = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")


def plain(text: str) -> str:
    """A number without the marks that group its digits, and with a point; another text as it is."""
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
    """What a number is to those who write a comma for the point, where that is another number; else ""."""
    text = text.strip()
    if _DOTS.fullmatch(text) and not text.lstrip("+-").startswith("0"):
        reading = _joined(_DOTS.fullmatch(text))
    elif _DECIMAL_COMMA.fullmatch(text):
        reading = _joined(_DECIMAL_COMMA.fullmatch(text))
    else:
        return ""
    return "" if reading == plain(text) else reading


def is_doubtful(text: str) -> bool:
    """Whether both readings of a number are common: 1.234 and 1,234, but neither 1,5 nor 1.234.567."""
    return re.fullmatch(r"[-+]?\d{1,3}[.,]\d{3}", text.strip()) is not None


def is_number(text: str) -> bool:
    """Whether a text is one number in digits."""
    return _PLAIN.fullmatch(plain(text)) is not None


def _joined(found: re.Match[str] | None) -> str:
    assert found is not None
    return (
        found["sign"]
        + re.sub(r"\D", "", found["whole"])
        + (re.sub(r"^\D+", ".", found["rest"]) if found["rest"] else "")
    )
