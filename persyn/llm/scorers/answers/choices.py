"""Parse multiple-choice answers: a letter, alone or followed by the content of the option."""

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
#: What may follow an option's letter in a sentence; excludes "A car" and "I am".
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
    """The letter, in upper case, and the option's content."""

    letter: str
    content: str = ""


def read(text: str) -> Choice | None:
    """Parse a text as a choice: `B`, `(B)`, `Option B`, `B. 12`, `\\textbf{(B)}\\ 12`; None if it is none."""
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
    """The letters of a text that consists only of a list of letters."""
    text = _WRAPPED.sub(r"\1", text).strip(" *_$.")
    return frozenset(re.findall(r"(?<![^\W_])[A-J](?![^\W_])", text.upper())) if _SEVERAL.fullmatch(text) else None


def joined(text: str) -> frozenset[str] | None:
    """The letters of an unseparated list in alphabetical order; `CAB` is a word, not a list."""
    text = _WRAPPED.sub(r"\1", text).strip(" *_$.")
    is_list = re.fullmatch(r"[A-J]{2,}", text) is not None and sorted(set(text)) == list(text)
    return frozenset(text) if is_list else None


def named(statement: str) -> str:
    """The letter named by a sentence that states an answer; "" for none."""
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
    """The letter in the last sentence that calls one chosen or correct; "" for none."""
    found = [m for pattern in (_CHOSEN_BEFORE, _CHOSEN_AFTER) for m in pattern.finditer(text)]
    found = [m for m in found if m["letter"].isupper() and not _WRONG.match(text, m.end())]
    return max(found, key=lambda m: m.start())["letter"] if found else ""


def concluded(text: str) -> str:
    """The letter that ends a text after a word such as "hence" or "must be"; "" for none."""
    found = _CONCLUDED.search(_WRAPPED.sub(r"\1", text))
    return found["letter"] if found and found["letter"].isupper() else ""
