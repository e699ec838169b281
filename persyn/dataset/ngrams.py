"""Split text into words and n-grams for overlap checks; ignores case, width, punctuation and layout.

Arithmetic and comparison operators are kept: 12 + 7 differs from 12 - 7.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

#: Scripts without spaces (kana, Chinese characters), in which each character counts as a word.
_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
#: Combining vowels and tones of many scripts, which belong to the preceding letter.
_MARKS = "".join(chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code)) in ("Mn", "Mc"))
#: Operators before a number, a bracket or a single letter; elsewhere such a character is layout, like asterisks around
#: a word or a hyphen.
_SIGNS = re.escape("+*/=<>^%\N{MULTIPLICATION SIGN}\N{DIVISION SIGN}\N{MINUS SIGN}\N{SQUARE ROOT}")
_OPERATOR = rf"(?:[{_SIGNS}]|(?<![^\W\d_])-)(?=\s*(?:[\d(\\]|[^\W\d_](?![^\W_])))"
_WORD = re.compile(rf"[{_ALONE}]|(?:[^\W_{_ALONE}]|[{_MARKS}])+|{_OPERATOR}")


def words(text: str) -> list[str]:
    """The words of a text."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def n_grams(of: Sequence[str], n: int) -> Iterator[str]:
    """Every n consecutive words, joined; nothing for shorter texts."""
    return (" ".join(of[start : start + n]) for start in range(len(of) - n + 1))
