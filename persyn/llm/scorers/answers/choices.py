"""Answers of multiple choice: a letter, alone or before what it stands for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from persyn.llm.scorers.answers import phrases
from persyn.llm.scorers.answers.characters import FOREIGN

_WRAPPED = re.compile(r"\\(?:text\w*|mathrm|mathbf|mathit|mbox|rm|bf)\s*\{([^{}]*)\}")
_NAMED = rf"(?:{phrases.any_of(phrases.CHOOSE, phrases.CHOOSE_JOINED)}\s*:?\s*)?"
_ARTICLE = rf"(?:{phrases.any_of(phrases.ARTICLE)}\s+)?"
_LETTER = re.compile(
    rf"{_ARTICLE}{_NAMED}(?P<open>[(\[{{]?)\s*(?P<letter>[A-Ja-j])\s*(?P<close>[)\]}}.:]*)(?P<rest>(?:\s.*)?)",
    re.DOTALL | re.IGNORECASE,
)
_TIGHT = re.compile(r"[(\[]?(?P<letter>[A-J])[)\]](?P<rest>\S.*)", re.DOTALL)
_SEVERAL = re.compile(
    rf"[(\[]?[A-J][)\]]?(?:\s*(?:,|&|{phrases.any_of(phrases.AND, phrases.AND_JOINED)})\s*[(\[]?[A-J][)\]]?)+",
    re.IGNORECASE,
)
#: What may follow a letter that is named in a sentence; "A car" and "I am" name none.
_AFTER = re.compile(
    rf"\s*(?:$|[-—,.;:!?)\]*]|{phrases.any_of(phrases.REASON)}|(?:is|was|are|it)\b|[{FOREIGN}]"
    rf"|{phrases.any_of(phrases.CHOSEN, phrases.CHOSEN_JOINED)})",
    re.IGNORECASE,
)
_CHOSEN_BEFORE = re.compile(
    rf"{phrases.any_of(phrases.CHOOSE, phrases.CHOOSE_JOINED)}[\s*_:\"'(\[$]*"
    rf"(?:\\(?:text\w*|mathbf|mathrm)\{{)?\(?(?P<letter>[A-J])(?![^\W_])",
    re.IGNORECASE,
)
_CHOSEN_AFTER = re.compile(
    rf"(?<![^\W_])(?P<letter>[A-J])[)\]*\s\"']*{phrases.any_of(phrases.CHOSEN, phrases.CHOSEN_JOINED)}", re.IGNORECASE
)
_DENIED = re.compile(
    rf"{phrases.any_of(phrases.LINK, phrases.LINK_JOINED)}\s*(?:\w+\s+)?"
    rf"{phrases.any_of(phrases.NOT, phrases.NOT_JOINED)}",
    re.IGNORECASE,
)
_CONCLUDED = re.compile(
    rf"{phrases.any_of(phrases.THEREFORE)}\s+{_ARTICLE}{_NAMED}[(\[*]{{0,3}}(?P<letter>[A-J])[)\]*.!\s]*$",
    re.IGNORECASE,
)
_WRONG = re.compile(rf"[)\]*\s\"']*(?:\w+\s+)?{phrases.any_of(phrases.NOT, phrases.NOT_JOINED)}", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Choice:
    """The letter, as a capital, and what stands behind it."""

    letter: str
    content: str = ""


def read(text: str) -> Choice | None:
    """A text as a choice: `B`, `(B)`, `Option B`, `B. 12`, `\\textbf{(B)}\\ 12`; None when it is something else."""
    text = _WRAPPED.sub(r"\1", text).replace("\\ ", " ").replace("\\left", "").replace("\\right", "").replace("~", " ")
    text = re.sub(r"\\[,;:!]|\\quad", " ", text).strip(" \t\n*_$\"'`.")
    tight = _TIGHT.fullmatch(text)
    if tight:
        return Choice(tight["letter"], tight["rest"].strip())
    found = _LETTER.fullmatch(text)
    if not found:
        return None
    rest = found["rest"].strip(" \t\n-:*")
    if _DENIED.match(rest):
        return None
    is_set_apart = bool(found["close"].strip()) and (
        found["letter"].isupper() or found["open"] or found["close"] == ")"
    )
    return Choice(found["letter"].upper(), rest) if not rest or is_set_apart else None


def several(text: str) -> frozenset[str] | None:
    """The letters of a text that is nothing but a list of them."""
    text = _WRAPPED.sub(r"\1", text).strip(" *_$.")
    return frozenset(re.findall(r"(?<![^\W_])[A-J](?![^\W_])", text.upper())) if _SEVERAL.fullmatch(text) else None


def joined(text: str) -> frozenset[str] | None:
    """The letters of a list without anything between them, in the order of the alphabet; `CAB` is a word."""
    text = _WRAPPED.sub(r"\1", text).strip(" *_$.")
    is_list = re.fullmatch(r"[A-J]{2,}", text) is not None and sorted(set(text)) == list(text)
    return frozenset(text) if is_list else None


def named(statement: str) -> str:
    """The letter that a sentence which states an answer names; "" for none."""
    statement = _WRAPPED.sub(r"\1", statement).strip(" \t\n*_$\"'`")
    begins = re.match(
        rf"{_ARTICLE}{_NAMED}[(\[*]*(?P<letter>[A-Ja-j])(?![A-Za-z\d])(?P<close>[)\]*]*)", statement, re.IGNORECASE
    )
    if (
        begins
        and (begins["close"] or _AFTER.match(statement, begins.end()))
        and not _WRONG.match(statement, begins.end())
    ):
        is_plain = begins["letter"].islower() and not begins["close"]
        if not is_plain or re.match(r"\s*(?:$|[-—,.;:!?)])", statement[begins.end() :]):
            return begins["letter"].upper()
    return ""


def chosen(text: str) -> str:
    """The letter of the last sentence of a text that says of one that it is chosen, or right; "" for none."""
    found = [m for pattern in (_CHOSEN_BEFORE, _CHOSEN_AFTER) for m in pattern.finditer(text)]
    found = [m for m in found if m["letter"].isupper() and not _WRONG.match(text, m.end())]
    return max(found, key=lambda m: m.start())["letter"] if found else ""


def concluded(text: str) -> str:
    """The letter that a text ends with after a word such as "hence" or "must be"; "" for none."""
    found = _CONCLUDED.search(_WRAPPED.sub(r"\1", text))
    return found["letter"] if found and found["letter"].isupper() else ""
