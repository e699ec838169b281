"""Remove reasoning from texts, and normalise digits, signs and punctuation of all scripts to ASCII."""

from __future__ import annotations

import re
import unicodedata

#: Tags and tokens that open and close reasoning, as written by models and their servers.
_REASONING_NAMES = (
    "think|thinking|thoughts?|reason|reasoning|reflection|scratchpad|analysis|internal_monologue|chain_of_thought"
)
_REASONING = re.compile(
    rf"(?P<open>[<\[](?:seed:)?(?:{_REASONING_NAMES})(?:\s[^<>\[\]\n]{{0,80}})?[>\]]|◁think▷|<\|START_THINKING\|>"
    r"|<\|begin_of_thought\|>|<\|channel\|>\s*(?:analysis|commentary)\b|<unused94>)"
    rf"|(?P<close>[<\[]/(?:seed:)?(?:{_REASONING_NAMES})\s*[>\]]|◁/think▷|<\|END_THINKING\|>"
    r"|<\|end_of_thought\|>|<\|channel\|>\s*final\s*<\|message\|>|<unused95>)",
    re.IGNORECASE,
)

#: Zero-width spaces, bidirectional marks, variation selectors, the byte order mark.
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\u20e3\ufe00-\ufe0f\ufeff]")
#: The end of a turn; what a model writes after it, such as the next user turn, is not part of its response.
_TURN_END = re.compile(
    r"<\|(?:im_end|eot_id|end|return|endoftext|end_of_text|eom_id|END_OF_TURN_TOKEN)\|>|</s>|<end_of_turn>|<eos>"
)
_TOKEN = re.compile(r"<\|[A-Za-z_]{3,40}\|>")
#: Decorative signs and those for "correct" or "therefore"; signs that cross something out are kept.
_ORNAMENT = re.compile(
    "[\u2022\u2023\u25a0-\u25cf\u2234\u2600-\u2716\u2719-\u274b\u274d-\u27bf\u2b50\u2b55\U0001f300-\U0001faff]"
)
_SPACES = re.compile("[\u00a0\u2000-\u200a\u202f\u205f\u3000]")
_DIGIT = re.compile(r"(?![0-9])\d")
_FULL_WIDTH = re.compile("[\uff01-\uff5e]")
_STYLED = re.compile("[\U0001d400-\U0001d7ff]")
_FRACTION = re.compile("(\\d?)\\s?([\u00bc-\u00be\u2150-\u215e])")
#: Scripts in which words directly adjoin digits: Cyrillic to Ethiopic, and those of East Asia.
FOREIGN = "\u0400-\u1cff\u2e80-\u2fff\u3005-\u3007\u3021-\ud7ff\uf900-\ufaff\ufb1d-\ufdff\ufe70-\ufeff\uff66-\uffdc"
_SUPERSCRIPT = re.compile(r"(?<=[\w)}\]])[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_SEAM = re.compile(rf"(?<=[0-9%°)\]}}$])(?=[{FOREIGN}])|(?<=[{FOREIGN}])(?=[-+(\[]?[0-9A-Za-z\\$])")

_PUNCTUATION = str.maketrans(
    {
        "。": ". ",
        "．": ".",
        "।": ". ",
        "۔": ". ",
        "、": ", ",
        "،": ", ",
        "，": ", ",
        "؛": "; ",
        "٫": ".",
        "٬": ",",
        "٪": "%",
        "؟": "? ",
        "【": "[",
        "】": "]",
        "〔": "[",
        "〕": "]",
        "「": '"',
        "」": '"',
        "“": '"',
        "”": '"',
        "„": '"',
        "«": '"',
        "»": '"',
        "‘": "'",
        "’": "'",
        "‐": "-",
        "‑": "-",
        "‒": "-",
        "–": "-",
        "−": "-",
        "﹣": "-",
        "∶": ":",
        "π": "\\pi ",
        "℃": "°C",
        "℉": "°F",
        "\N{MICRO SIGN}": "μ",
        "\N{OHM SIGN}": "Ω",
        "～": "~",
        "〜": "~",
    }
)


def without_reasoning(text: str) -> str:
    """The text of a response outside its reasoning.

    Text before an unmatched closing tag counts as reasoning, too, and so does everything after an
    unmatched opening tag.
    """
    kept: list[str] = []
    start, is_inside = 0, False
    for tag in _REASONING.finditer(text):
        if tag["close"]:
            if not is_inside:
                kept.clear()
            start, is_inside = tag.end(), False
        elif not is_inside:
            kept.append(text[start : tag.start()])
            is_inside = True
    if not is_inside:
        kept.append(text[start:])
    return _one_turn("".join(kept))


def _one_turn(text: str) -> str:
    """The text up to the end of its turn, without special tokens left in by a server."""
    if "<" not in text:
        return text
    said = (part for part in _TURN_END.split(text) if part.strip())
    return _TOKEN.sub("\n", next(said, ""))


def plain(text: str) -> str:
    """The text with ASCII digits, spaces and punctuation; letters are unchanged."""
    if text.isascii():
        return text
    text = _ORNAMENT.sub(" ", _INVISIBLE.sub("", text))
    text = re.sub(r"(?<=\d)，(?=\d{3})", ",", text)
    text = _SPACES.sub(" ", text.translate(_PUNCTUATION))
    text = _FULL_WIDTH.sub(lambda m: chr(ord(m[0]) - 0xFEE0), text)
    text = _STYLED.sub(lambda m: unicodedata.normalize("NFKC", m[0]), text)
    text = _DIGIT.sub(lambda m: str(unicodedata.decimal(m[0])), text)
    text = _FRACTION.sub(_written_out, text)
    text = _SUPERSCRIPT.sub(
        lambda m: f"^{{{unicodedata.normalize('NFKC', m[0])}}}".replace("\N{MINUS SIGN}", "-"), text
    )
    return _SEAM.sub(" ", text)


def _written_out(match: re.Match[str]) -> str:
    fraction = unicodedata.normalize("NFKC", match[2]).replace("\N{FRACTION SLASH}", "/")
    return f"{match[1]} {fraction}" if match[1] else fraction
