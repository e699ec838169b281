"""A text as words, the way overlap of texts is measured: case, width, punctuation and layout do not count.

What calculates or compares does: 12 + 7 is not 12 - 7.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

#: Scripts written without spaces, where each character counts as a word: kana and the Chinese characters.
_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
#: Vowels and tones of many scripts, which belong to the letter before them.
_MARKS = "".join(chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code)) in ("Mn", "Mc"))
#: What calculates or compares, before a number, a bracket or a letter that stands alone; elsewhere it is layout, as
#: asterisks around a word are, or a hyphen.
_SIGNS = re.escape("+*/=<>^%\N{MULTIPLICATION SIGN}\N{DIVISION SIGN}\N{MINUS SIGN}\N{SQUARE ROOT}")
_OPERATOR = rf"(?:[{_SIGNS}]|(?<![^\W\d_])-)(?=\s*(?:[\d(\\]|[^\W\d_](?![^\W_])))"
_WORD = re.compile(rf"[{_ALONE}]|(?:[^\W_{_ALONE}]|[{_MARKS}])+|{_OPERATOR}")


def words(text: str) -> list[str]:
    """The words of a text."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def n_grams(of: Sequence[str], n: int) -> Iterator[str]:
    """Every n words in a row, joined; nothing where there are fewer."""
    return (" ".join(of[start : start + n]) for start in range(len(of) - n + 1))
