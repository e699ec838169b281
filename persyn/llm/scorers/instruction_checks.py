"""The 25 verifiable instructions of IFEval (arXiv 2311.07911), each as a function of a response.

Besides the response, a function takes the prompt's kwargs under IFEval's names. Keywords that IFEval treats as
regular expressions are plain text here. Each check runs in time linear in the response, whatever its text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Annotated, Any, Literal, TypeAlias, get_type_hints

import msgspec
from msgspec import Meta, Struct

from persyn.config import NonNegative
from persyn.llm.scorers import english

InstructionCheck: TypeAlias = Callable[..., bool]
"""Called as check(response, **kwargs): whether the instruction was followed."""

Relation: TypeAlias = Literal["less than", "at least"]
Text: TypeAlias = Annotated[str, Meta(min_length=1)]
Letter: TypeAlias = Annotated[str, Meta(min_length=1, max_length=1)]

#: The checks that detect a text's language, with the package langdetect.
NEED_LANGDETECT = frozenset(
    ("language:response_language", "change_case:english_capital", "change_case:english_lowercase")
)
_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
#: langdetect reads 10,000 characters, not counting links and addresses.
_LANGUAGE_WINDOW = 50_000


def arguments(check: InstructionCheck, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Select a check's arguments from a prompt's kwargs; `msgspec.ValidationError` if one is missing or invalid.

    None counts as missing, and other kwargs are ignored: in tables, every row has all kwargs.
    """
    given = {key: _whole(value) for key, value in kwargs.items() if value is not None}
    return msgspec.structs.asdict(msgspec.convert(given, _arguments(check)))


@cache
def _arguments(check: InstructionCheck) -> type[Struct]:
    hints = get_type_hints(check, include_extras=True)
    return msgspec.defstruct(
        check.__name__, [(name, hints[name]) for name in hints if name not in ("response", "return")]
    )


def _whole(value: Any) -> Any:
    """Convert whole floats to integers: tables with missing values turn 3 into 3.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def can_detect_language() -> bool:
    """Whether the package langdetect is installed."""
    return find_spec("langdetect") is not None


# Keywords


def existence(response: str, keywords: list[Text]) -> bool:
    """Contains each keyword, ignoring case."""
    return all(keyword.lower() in response.lower() for keyword in keywords)


def frequency(response: str, keyword: Text, frequency: NonNegative, relation: Relation) -> bool:
    """Contains the keyword this often, ignoring case."""
    return _holds(response.lower().count(keyword.lower()), relation, frequency)


def forbidden_words(response: str, forbidden_words: list[Text]) -> bool:
    """Contains none of the words as a whole word."""
    return not any(re.search(rf"\b{re.escape(word)}\b", response, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(response: str, letter: Letter, let_frequency: NonNegative, let_relation: Relation) -> bool:
    """Contains the letter this often, ignoring case."""
    return _holds(response.lower().count(letter.lower()), let_relation, let_frequency)


# Language and case


def response_language(response: str, language: Text) -> bool:
    """Is in the language, an ISO 639-1 code. A text whose language cannot be detected passes."""
    return _language(response) in (language, None)


def english_capital(response: str) -> bool:
    """Is in English without lower-case letters."""
    return response.isupper() and response_language(response, "en")


def english_lowercase(response: str) -> bool:
    """Is in English without upper-case letters."""
    return response.islower() and response_language(response, "en")


def capital_word_frequency(response: str, capital_frequency: NonNegative, capital_relation: Relation) -> bool:
    """Has this many words in all capitals."""
    return _holds(english.count_capital_words(response), capital_relation, capital_frequency)


# Length


def number_sentences(response: str, num_sentences: NonNegative, relation: Relation) -> bool:
    """Has this many sentences."""
    return _holds(english.count_sentences(response), relation, num_sentences)


def number_words(response: str, num_words: NonNegative, relation: Relation) -> bool:
    """Has this many words."""
    return _holds(english.count_words(response), relation, num_words)


def number_paragraphs(response: str, num_paragraphs: NonNegative) -> bool:
    """Has this many non-empty paragraphs divided by ***, which may also stand at either end."""
    return _parts(response, "***") == num_paragraphs


def nth_paragraph_first_word(
    response: str, num_paragraphs: NonNegative, nth_paragraph: Annotated[int, Meta(ge=1)], first_word: Text
) -> bool:
    """Has this many paragraphs divided by blank lines, and the nth begins with the word."""
    paragraphs = response.split("\n\n")
    count = sum(1 for paragraph in paragraphs if paragraph.strip())
    if count != num_paragraphs or nth_paragraph > count:
        return False
    words = paragraphs[nth_paragraph - 1].split(maxsplit=1)
    first = words[0].lstrip("'").lstrip('"') if words else ""
    return bool(words) and re.split(r"[.,?!'\"]", first, maxsplit=1)[0].lower() == first_word.lower()


# Content and format


def number_placeholders(response: str, num_placeholders: NonNegative) -> bool:
    """Has at least this many [placeholders]."""
    return sum(_count_brackets(line) for line in response.split("\n")) >= num_placeholders


def postscript(response: str, postscript_marker: Text) -> bool:
    """Has a postscript that begins with the marker."""
    spaced = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    pattern = spaced.get(postscript_marker.strip(), re.escape(postscript_marker.strip().lower()))
    return re.search(pattern, response.lower()) is not None


def number_bullet_lists(response: str, num_bullets: NonNegative) -> bool:
    """Has exactly this many lines that begin with * or -; ** does not count."""
    stars = re.findall(r"^[^\S\n]*\*[^*].*$", response, re.MULTILINE)  # a lone * also consumes the next line
    dashes = re.findall(r"^[^\S\n]*-", response, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def number_highlighted_sections(response: str, num_highlights: NonNegative) -> bool:
    """Has at least this many *highlighted* or **highlighted** passages."""
    single = (found[1:-1] for found in re.findall(r"\*[^\n*]*\*", response))
    double = (found[2:-2] for found in re.findall(r"\*\*[^\n*]*\*\*", response))
    return sum(1 for text in (*single, *double) if text.strip()) >= num_highlights


def multiple_sections(response: str, section_spliter: Text, num_sections: NonNegative) -> bool:
    """Has at least this many sections that begin with the word and a number."""
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", response)) >= num_sections


def json_format(response: str) -> bool:
    """Is entirely JSON, with or without a code fence. JSON nested too deeply to parse fails."""
    text = response.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(response: str) -> bool:
    """Has a <<title>>."""
    for line in response.split("\n"):
        begin, end = line.find("<<"), line.rfind(">>")
        if 0 <= begin < end - 2 and line[begin:end].lstrip("<").rstrip(">").strip():
            return True
    return False


def constrained_response(response: str) -> bool:
    """Contains one of three fixed answers."""
    return any(answer in response for answer in _ANSWERS)


def two_responses(response: str) -> bool:
    """Has two different responses divided by ******."""
    parts = [part.strip() for part in response.split("******") if part.strip()]
    return _parts(response, "******") == 2 and parts[0] != parts[1]


def repeat_prompt(response: str, prompt_to_repeat: Text) -> bool:
    """Begins with the prompt."""
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


# Beginning, end and punctuation


def end_checker(response: str, end_phrase: Text) -> bool:
    """Ends with the phrase; quotation marks may follow."""
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(response: str) -> bool:
    """Is enclosed in double quotation marks."""
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def no_comma(response: str) -> bool:
    """Contains no comma."""
    return "," not in response


CHECKS: dict[str, InstructionCheck] = {
    "keywords:existence": existence,
    "keywords:frequency": frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "change_case:capital_word_frequency": capital_word_frequency,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_words": number_words,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "detectable_format:constrained_response": constrained_response,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "punctuation:no_comma": no_comma,
}
"""The checks by IFEval's instruction id."""


def _holds(count: int, relation: Relation, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


def _parts(text: str, divider: str) -> int:
    """The number of parts that a divider makes, ignoring an empty one at either end; 0 if another part is empty."""
    is_full = [bool(part.strip()) for part in text.split(divider)]
    return sum(is_full) if all(is_full[1:-1]) else 0


def _count_brackets(line: str) -> int:
    count, end = 0, -1
    while (begin := line.find("[", end + 1)) >= 0 and (end := line.find("]", begin)) >= 0:
        count += 1
    return count


def _language(text: str) -> str | None:
    """The detected language of a text, deterministic; None if undetectable."""
    import langdetect  # an optional dependency

    langdetect.DetectorFactory.seed = 0
    try:
        return str(langdetect.detect(text[:_LANGUAGE_WINDOW]))
    except langdetect.LangDetectException:
        return None
