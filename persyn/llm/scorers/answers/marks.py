"""Find marked answers in a response: boxes, tags, JSON fields, #### and phrases such as "the answer is"."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from persyn.llm.scorers.answers import phrases

#: Maximum number of boxes examined, starting from the last one.
_BOXES = 16
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*")
_BETWEEN_BOXES = re.compile(
    rf"(?:\s+[^\W\d_]+(?=\s+{phrases.any_of(phrases.AND)}))?"
    rf"(?:[\s$,;&]|\\[()\[\],;]|\\text\s*\{{[^{{}}]{{0,9}}\}}|{phrases.any_of(phrases.AND, phrases.AND_JOINED)}"
    r"|[A-Za-z](?:_\w)?\s*=)*"
)
_TAG_NAMES = (
    rf"(?:final[\s_-]?)?(?:{phrases.any_of(phrases.ANSWER)}|result|solution|output|response|conclusion|boxed)|final"
)
_TAG = re.compile(rf"<\s*(?:{_TAG_NAMES})(?:\s[^<>\n]{{0,80}})?>|\[\s*(?:{_TAG_NAMES})\s*\]", re.IGNORECASE)
_TAG_END = re.compile(r"[<\[]\s*/")
_STRAY_END = re.compile(rf"[<\[]\s*/\s*(?:{_TAG_NAMES})\s*[>\]]", re.IGNORECASE)

_ANY_ANSWER = phrases.any_of(phrases.ANSWER, f"{phrases.ANSWER_DIRECT}, {phrases.RESULT_DIRECT}")
_KEY = re.compile(rf"[\"'](?:final[_ -]?)?(?:{_ANY_ANSWER})[\"']\s*:\s*", re.IGNORECASE)
_WEAK_KEY = re.compile(
    r"[\"'](?:final[_ -]?)?(?:result|value|total|solution|output|choice|option)[\"']\s*:\s*", re.IGNORECASE
)
_RAW_VALUE = re.compile(r"[\"']?((?:[^\"'\\\n]|\\.)*)")
#: What a \u in JSON can denote but database text cannot contain: NUL and lone surrogates.
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")

_HASHES = re.compile(r"^[ \t]*####[ \t]*(?![^\W\d_]{3})(\S.*)$", re.MULTILINE)

_GAP = r"[^.:=\n]{0,60}?"
_LINK = rf"(?:{phrases.any_of(phrases.LINK, phrases.LINK_JOINED)}\s*:?|[:=→⇒]|-{{1,2}}>|\s[-—]\s)"
_OPEN = r"[\s*_\"'`\])}>#]{0,20}"
#: The beginning of a number, a formula or an option's letter.
_VALUE = r"(?=[-+±$€£¥₹]?\s?(?:\d|\\)|[$(\[]|[A-J](?![^\W_]))"
_PARTICLE = "|".join(phrases.entries(phrases.LINK_JOINED))


def _stating(spaced: str, direct: str) -> str:
    """A pattern for one of the words and what links it to the value."""
    linked = phrases.any_of(f"{spaced}, {_spaced(direct)}", _joined(direct))
    unlinked = phrases.any_of(_spaced(direct), _joined(direct))
    return rf"(?:{unlinked}[^\w\n]{{0,12}}(?:{_PARTICLE})?{_OPEN}{_VALUE}|{linked}{_GAP}{_LINK})"


def _spaced(table: str) -> str:
    return ", ".join(entry for entry in phrases.entries(table) if not _IDEOGRAPHIC.search(entry))


def _joined(table: str) -> str:
    return ", ".join(entry for entry in phrases.entries(table) if _IDEOGRAPHIC.search(entry))


#: Scripts that write words without spaces, or with particles attached.
_IDEOGRAPHIC = re.compile("[\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]")
_ANSWER = _stating(phrases.ANSWER, phrases.ANSWER_DIRECT)
_NEAR_ANSWER = rf"(?:{_ANY_ANSWER})"
_FINAL_WORD = phrases.any_of(phrases.FINAL, _joined(phrases.FINAL))
_FINAL = re.compile(
    rf"{_FINAL_WORD}[\s*_]*{_ANSWER}{_OPEN}|{_NEAR_ANSWER}\s+{_FINAL_WORD}{_GAP}{_LINK}{_OPEN}", re.IGNORECASE
)
_RESULT = re.compile(
    rf"^[ \t#*_>-]{{0,12}}(?:[^\W\d_]+ )?{phrases.any_of(phrases.RESULT, phrases.RESULT_DIRECT)}[\s*_]*[:=]{_OPEN}",
    re.IGNORECASE | re.MULTILINE,
)
_STATED = re.compile(_ANSWER + _OPEN, re.IGNORECASE)
_HEADER = re.compile(
    rf"^[ \t#*_>✅-]{{0,12}}(?:the\s+)?(?:{_FINAL_WORD}\s+)?{_NEAR_ANSWER}"
    rf"(?:[ \t#*_:]{{0,12}}\n\s{{0,9}}|[ \t*_]{{1,12}}{_VALUE})(?=\S)",
    re.IGNORECASE | re.MULTILINE,
)
_SUBJECT = r"(?:(?:it|that|this|the\s+(?:\w+\s+)?(?:answer|result|total|sum|value|number)|c|ce|das|es|это|这|答案)\s*)"
_IS = rf"(?:{phrases.any_of(phrases.LINK, phrases.LINK_JOINED)}(?:\s+es(?=\s))?|'s|'est)"
_REVISED = re.compile(
    rf"(?<![^\W_])(?:{phrases.any_of(phrases.REVISION, phrases.REVISION_JOINED)}|no(?=,))[\s,.:;!?-]{{0,9}}"
    rf"(?:{phrases.any_of(phrases.REVISION)}[\s,]+)?(?:{_SUBJECT}?{_IS}|(?=\S{{1,60}}\s?(?:[.!\n]|$)))"
    rf"[\s,:]*(?:(?:actually|rather)\s+)?{_OPEN}{_VALUE}",
    re.IGNORECASE,
)
_DENYING = re.compile(phrases.any_of(phrases.DENIAL, phrases.DENIAL_JOINED), re.IGNORECASE)
_DENIED = re.compile(phrases.any_of(phrases.NOT, phrases.NOT_JOINED) + r"(?=\s*[^\s.!])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Mark:
    """The marked answer and where the mark is; running text may continue after the answer."""

    at: int
    text: str
    is_running: bool = False


def last(text: str) -> Mark | None:
    """The last mark; a phrase counts only if nothing else is marked, a total only if no answer is stated.

    A revised answer, "The answer is 5. Wait, it is 6", counts as its correction.
    """
    mark = _last(text)
    revised = _phrase(_REVISED, text[mark.at :], may_deny=True) if mark else None
    return Mark(mark.at + revised.at, revised.text, is_running=True) if mark and revised else mark


def _last(text: str) -> Mark | None:
    found = [_boxed(text), _tagged(text), _field(_KEY, text), _hashes(text), final := _phrase(_FINAL, text)]
    marks = [mark for mark in found if mark is not None]
    if marks:
        best = max(marks, key=lambda mark: mark.at)
        later = _phrase(_STATED, text) if best is final else None
        return later if later and later.at > best.at else best
    return _phrase(_STATED, text) or _phrase(_HEADER, text) or _field(_WEAK_KEY, text) or _phrase(_RESULT, text)


def boxes(text: str) -> list[str]:
    """The contents of the last boxes in order, without duplicates."""
    return list(dict.fromkeys(content for _, _, content in _all_boxes(text)))


def _boxed(text: str) -> Mark | None:
    found = _all_boxes(text)
    if not found:
        return None
    start, _, content = found.pop()
    group = [content]
    first = start
    while found and _BETWEEN_BOXES.fullmatch(text, found[-1][1], first):
        first, _, content = found.pop()
        group.insert(0, content)
    return Mark(start, ",".join(dict.fromkeys(group)))


def _all_boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of the last boxes, nested ones excluded."""
    found: list[tuple[int, int, str]] = []
    for match in list(_BOX.finditer(text))[-_BOXES:]:
        if not found or match.start() >= found[-1][1]:
            end, content = _braced(text, match.end())
            found.append((match.start(), end, _BOX.sub("", content)))
    return found


def _braced(text: str, start: int) -> tuple[int, str]:
    """The end and the content of a braced group; an unclosed one ends with its line."""
    if text[start : start + 1] != "{":
        match = re.compile(r"[^\s$]*").match(text, start)
        assert match is not None
        return match.end(), match[0]
    depth = 0
    for brace in re.compile(r"\\.|[{}]").finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.end(), text[start + 1 : brace.start()]
    line = text[start + 1 :].lstrip("{").split("\n")[0]
    return len(text), line


def _tagged(text: str) -> Mark | None:
    for tag in reversed(list(_TAG.finditer(text))):
        end = _TAG_END.search(text, tag.end())
        content = text[tag.end() : end.start() if end else len(text)].strip()
        if content:
            return Mark(tag.start(), content if end else content.split("\n")[0])
    stray = _STRAY_END.search(text)
    lines = text[: stray.start()].strip().split("\n") if stray else [""]
    return Mark(stray.start(), lines[-1], is_running=True) if stray and lines[-1] else None


def _field(key: re.Pattern[str], text: str) -> Mark | None:
    keys = list(key.finditer(text))
    if not keys:
        return None
    start = keys[-1].end()
    try:
        return Mark(start, field_text(json.JSONDecoder(strict=False).raw_decode(text, start)[0]))
    except RecursionError:
        return Mark(start, "")  # nested deeper than any answer
    except ValueError:
        # Unescaped LaTeX, Python quotes, or a text truncated within the value.
        raw = _RAW_VALUE.match(text, start)
        value = raw[1].replace("\\\\", "\\").rstrip(" ,}") if raw else ""
        return Mark(start, "" if value == "None" else field_text(value))


def field_text(value: Any) -> str:
    """A JSON value as text; "" for null, and for an object without a value of its own."""
    if isinstance(value, list):
        return ", ".join(field_text(item) for item in value)
    if isinstance(value, str):
        value = _UNSTORABLE.sub("\N{REPLACEMENT CHARACTER}", value)
        # "\frac" in a JSON string is a form feed and "rac": restore the backslash.
        return re.sub(r"[\b\t\n\f\r](?=[a-z])", lambda m: "\\" + "btnfr"["\b\t\n\f\r".index(m[0])], value)
    if isinstance(value, dict):
        known = [value[key] for key in ("value", "unit", "units") if key in value]
        known = known or (list(value.values()) if len(value) == 1 else [])
        return " ".join(field_text(item) for item in known)
    return "" if value is None else str(value)


def _hashes(text: str) -> Mark | None:
    lines = list(_HASHES.finditer(text))
    return Mark(lines[-1].start(), lines[-1][1], is_running=True) if lines else None


def _phrase(pattern: re.Pattern[str], text: str, *, may_deny: bool = False) -> Mark | None:
    """The value of the last phrase without a negation; phrases with a number or a short text are preferred."""
    stating = (m for m in pattern.finditer(text) if may_deny or not _DENYING.search(m[0]))
    found = [Mark(m.start(), _rest(text, m.end()), is_running=True) for m in stating]
    found = [mark for mark in found if mark.text and not _DENIED.match(mark.text)]
    telling = [mark for mark in found if re.search(r"\d|\\", mark.text) or len(mark.text.split()) <= 4]
    candidates = telling or found
    return candidates[-1] if candidates else None


def _rest(text: str, start: int) -> str:
    """The rest of the line, or of the formula that begins there."""
    formula = re.compile(r"\$\$[^$]+\$\$|\\\[.+?\\\]|\\\(.+?\\\)", re.DOTALL).match(text, start)
    end = text.find("\n", formula.end() if formula else start)
    return text[start : end if end >= 0 else len(text)].strip()
