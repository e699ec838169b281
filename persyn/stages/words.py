"""A text as words, the way overlap of texts is measured: case, width, punctuation and layout do not count."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

#: Scripts written without spaces, where each character counts as a word: kana and the Chinese characters.
_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+")


def words(text: str) -> list[str]:
    """The words of a text."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def n_grams(of: Sequence[str], n: int) -> Iterator[str]:
    """Every n words in a row, joined; nothing where there are fewer."""
    return (" ".join(of[start : start + n]) for start in range(len(of) - n + 1))
