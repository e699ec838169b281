"""Parse times of day, dates, versions and addresses: answers made of digits that are not arithmetic."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

Date: TypeAlias = tuple[int | None, int, int]
"""Year (None if unknown), month and day."""

_TIME = re.compile(
    r"(?P<hour>\d{1,2})(?:\s?[:h.]\s?(?P<minute>[0-5]\d)(?::(?P<second>[0-5]\d))?)?\s*(?P<half>[ap]\.?\s?m\b\.?)?"
    r"\s*(?P<clock>uhr|o'clock|hours|hrs|h)?(?:\s+in the (?P<part>morning|afternoon|evening))?",
    re.IGNORECASE,
)
_NAMED = {"noon": 12, "12 noon": 12, "midday": 12, "midnight": 0, "12 midnight": 0}
_CLOCK = re.compile(r"(?<![\d:.])\d{1,2}:[0-5]\d(?![\d:])(?:\s*[ap]\.?\s?m\b\.?)?", re.IGNORECASE)
_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_MONTH = r"(?P<month>jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_DATES = (
    re.compile(r"(?P<year>\d{4})[-/.](?P<m>\d{1,2})[-/.](?P<day>\d{1,2})(?!\d)"),
    re.compile(r"(?<!\d)(?P<first>\d{1,2})(?P<mark>[-/.])(?P<second>\d{1,2})(?P=mark)(?P<year>\d{4})(?!\d)"),
    re.compile(rf"{_MONTH}\s+(?P<day>\d{{1,2}})(?:st|nd|rd|th)?(?!\d)(?:,?\s+(?P<year>\d{{4}}))?", re.IGNORECASE),
    re.compile(rf"(?P<day>\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?{_MONTH}(?:,?\s+(?P<year>\d{{4}}))?", re.IGNORECASE),
)
_MARKED = re.compile(
    r"v?\d+(?:\.\d+){2,}[\w.+-]*|v\d+(?:\.\d+)*|\d{1,4}[-/.]\d{1,2}[-/.]\d{2,4}|\d{3,}(?:-\d{2,})+|[\da-f]{1,2}(?:[:-][\da-f]{1,2}){3,}"
    r"|(?=[\d:]*[a-f]|[\da-f:]*::)[\da-f]{1,4}(?:::?[\da-f]{1,4}){2,7}",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Time:
    """A time of day; without AM or PM it may be either, or on a 24-hour clock."""

    hour: int
    minute: int
    second: int
    has_half: bool


def time(text: str) -> Time | None:
    """Parse a text as a time of day, `3:30 PM` or `15:30`; None for anything else, such as the ratio 1:2."""
    text = re.sub(r"\\(?:text\w*|mathrm)\s*\{([^{}]*)\}|\\ |~", r" \1", text).replace("\\", "").strip(" $*.")
    if text.casefold() in _NAMED:
        return Time(_NAMED[text.casefold()], 0, 0, True)
    found = _TIME.fullmatch(re.sub(r"\s+", " ", text))
    if not found or int(found["hour"]) > 24:
        return None
    half = (found["half"] or {"morning": "a", "afternoon": "p", "evening": "p"}.get((found["part"] or "").lower(), ""))[
        :1
    ].lower()
    is_colon = re.search(r"\d:\d", text) is not None
    if not (
        half or is_colon or (found["clock"] or "").lower() in ("uhr", "o'clock") or re.fullmatch(r"\d{1,2}h\d\d", text)
    ):
        return None
    hour = int(found["hour"])
    if half:
        hour = hour % 12 + (12 if half == "p" else 0)
    return Time(hour, int(found["minute"] or 0), int(found["second"] or 0), bool(half))


def time_within(text: str) -> Time | None:
    """The only time of day with a colon in a sentence; None if there are none or several."""
    found = {time(match[0]) for match in _CLOCK.finditer(text)}
    return found.pop() if len(found) == 1 else None


def same_time(gold: Time, stated: Time) -> bool:
    """Whether two times agree; a reference without AM or PM agrees with either."""
    hours = 24 if gold.has_half or not stated.has_half else 12
    return (gold.hour - stated.hour) % hours == 0 and (gold.minute, gold.second) == (stated.minute, stated.second)


def dates(text: str) -> frozenset[Date]:
    """All possible readings, (year, month, day), of the only date in a text; empty for none or several."""
    found = {frozenset(_readings(m)) for pattern in _DATES for m in pattern.finditer(text)} - {frozenset()}
    with_year = {each[1:] for readings in found for each in readings if each[0]}
    found = {readings for readings in found if any(each[0] or each[1:] not in with_year for each in readings)}
    return found.pop() if len(found) == 1 else frozenset()


def _readings(match: re.Match[str]) -> Iterator[Date]:
    """The possible readings of a matched date; 3/8/2024 is in March or in August, depending on the convention."""
    groups = match.groupdict()
    year = int(groups["year"]) if groups.get("year") else None
    if groups.get("month"):
        yield year, _MONTHS.index(groups["month"].lower()) + 1, int(groups["day"])
    elif groups.get("m"):
        yield year, int(groups["m"]), int(groups["day"])
    else:
        first, second = int(groups["first"]), int(groups["second"])
        if first <= 12 and groups["mark"] == "/":
            yield year, first, second
        if second <= 12:
            yield year, second, first


def is_label(text: str) -> bool:
    """Whether a text is a version, an address or a numeric date, which equals only itself."""
    return _MARKED.fullmatch(text.strip()) is not None and not re.fullmatch(r"\d{1,3}(?:\.\d{3})+", text.strip())
