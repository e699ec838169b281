"""Count words and sentences of English text as NLTK does.

Sentences end as in NLTK's Punkt, by rules and short word lists in place of its trained tables; words are
counted as by its Treebank tokenizer. Every pattern runs in time linear in the text.
"""

from __future__ import annotations

import re
from itertools import zip_longest

#: Words whose final period does not end a sentence; dots inside the word are kept.
_ABBREVIATIONS = frozenset(
    "a.d a.m adm ala apr assn aug ave bros calif capt cie co col colo conn corp cos ct d.c dec dept "  # noqa: SIM905
    "dist dr ed feb fla fri ft ga gen gov inc jan jr jul jun kan ky l.a lt ltd maj mar mass messrs mg mich minn mo mr "
    "mrs ms n.c n.d n.h n.j n.m n.y nev nov oct okla ore p.m pa ph.d prof r.i rep reps rev s.c sat sen sens sep sept "
    "sgt sr st tenn tues u.k u.n u.s va vol vs vt w.va wash wed wis".split()
)
#: Words that begin a sentence if capitalised after an abbreviation or ellipsis; other capitalised words may be names.
_STARTERS = frozenset(
    "a after all also although an and another any are as at because before both but by can do each "  # noqa: SIM905
    "even every for from had has have he her here his how i if in instead is it its just let many maybe more most my "
    "no not now of on once one or our perhaps she should so some still such than that the their then there these they "
    "this those through to until was we well what when where whether which while who why will with without would yet "
    "you your".split()
)
#: A period, question or exclamation mark at the end of a word, or before a mark that does not occur inside words.
_END = re.compile(r"[.?!](?=[)\";}\]*:@'({\[!?]|$)")
#: Marks that may precede a word when it is looked up; an apostrophe stays with the word after it.
_MARK = re.compile(r"[)\"`;}\]*:@({\[!?&#]|(?=')")
_NUMBER = re.compile(r"-?[.,]?\d[\d,.-]*")
_LEADING_WORD = re.compile(r"\w+")
_CLOSING = "\"')]}"

#: Characters that separate words.
_APART = re.compile(r"[\s;@#$%&?!*()\[\]{}<>\"`«»“”‘’„]|--|\.\.+|[:,](?!\d)")
#: Clitics that are separate tokens: I'M counts as two.
_CLITIC = re.compile(r"(?<=[^'])(?:'S|'M|'D|'LL|'RE|'VE|N'T)\.?$", re.IGNORECASE)
_FUSED = frozenset(("CANNOT", "GIMME", "GONNA", "GOTTA", "LEMME", "WANNA"))


def count_words(text: str) -> int:
    """The number of runs of letters, digits and underscores."""
    return len(re.findall(r"\w+", text))


def count_capital_words(text: str) -> int:
    """The number of all-caps tokens. "WELL-KNOWN" counts as one, "I'M" as two."""
    words = [word for word in _APART.split(text) if any(map(str.isupper, word))]
    return sum(_count_capital_tokens(word) for word in words)


def count_sentences(text: str) -> int:
    """The number of sentences; a sentence without a final mark counts too."""
    words = text.split()
    count, is_open = 0, False
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        end = _last_end(word, following)
        if end and _ends_sentence(word[:end], word[end:] or following):
            count += 1
            is_open = bool(word[end:].strip(_CLOSING))
        else:
            is_open = True
    return count + is_open


def _count_capital_tokens(word: str) -> int:
    clitic = _CLITIC.search(word)
    parts = [word[: clitic.start()], word[clitic.start() :]] if clitic else [word]
    return sum((1 + (part in _FUSED)) for part in parts if part.isupper())


def _last_end(word: str, following: str) -> int:
    """The position where a sentence may end within or after a word; 0 for none."""
    ends = [found.end() for found in _END.finditer(word)]
    if ends and ends[-1] == len(word) and not following:
        ends.pop()
    return ends[-1] if ends else 0


def _ends_sentence(word: str, rest: str) -> bool:
    """Whether a word, up to its mark, ends a sentence, given the text that follows."""
    if "?" in word or "!" in word:
        return True
    if word.endswith(".."):
        return _starts_sentence(rest)
    last = _MARK.split(word[:-1])[-1].lower().lstrip("-,")
    if last in _ABBREVIATIONS or last.rpartition("-")[2] in _ABBREVIATIONS:
        return _starts_sentence(rest)
    if len(last) == 1 and last.isalpha():
        return not rest[:1].islower() and (not rest[:1].isupper() or _starts_sentence(rest))
    return not (_NUMBER.fullmatch(last) and rest[:1].islower())


def _starts_sentence(rest: str) -> bool:
    first = _LEADING_WORD.match(rest)
    return first is not None and first[0][0].isupper() and first[0].lower() in _STARTERS
