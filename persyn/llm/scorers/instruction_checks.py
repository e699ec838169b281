"""The 25 verifiable instructions of IFEval (arXiv 2311.07911), each a function of a response.

What a function takes beside the response are the prompt's kwargs, by IFEval's names. Where IFEval takes a keyword for
a regular expression, it is plain text here. A response may be any text: each check takes time in proportion to it.
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

from persyn.llm.scorers import english

Check: TypeAlias = Callable[..., bool]
"""Called as check(response, **kwargs): whether the instruction was followed."""

Relation: TypeAlias = Literal["less than", "at least"]
Count: TypeAlias = Annotated[int, Meta(ge=0)]
Text: TypeAlias = Annotated[str, Meta(min_length=1)]
Letter: TypeAlias = Annotated[str, Meta(min_length=1, max_length=1)]

#: The checks that ask which language a text is in, by the package langdetect.
NEED_LANGDETECT = frozenset(
    ("language:response_language", "change_case:english_capital", "change_case:english_lowercase")
)
_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
#: langdetect looks at 10,000 characters, links and addresses not counted.
_LANGUAGE_WINDOW = 50_000


def arguments(check: Check, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a check takes, out of a prompt's kwargs; `msgspec.ValidationError` when that is missing or wrong.

    None is as good as left out, and what the check does not take is passed over: tables have all kwargs in every row.
    """
    given = {key: _whole(value) for key, value in kwargs.items() if value is not None}
    return msgspec.structs.asdict(msgspec.convert(given, _arguments(check)))


@cache
def _arguments(check: Check) -> type[Struct]:
    hints = get_type_hints(check, include_extras=True)
    return msgspec.defstruct(
        check.__name__, [(name, hints[name]) for name in hints if name not in ("response", "return")]
    )


def _whole(value: Any) -> Any:
    """A number as an integer: tables with gaps make 3.0 of 3."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def can_detect_language() -> bool:
    """Whether the package langdetect is there."""
    return find_spec("langdetect") is not None


# Keywords


def existence(response: str, keywords: list[Text]) -> bool:
    """Each keyword is in it, in whatever case."""
    return all(keyword.lower() in response.lower() for keyword in keywords)


def frequency(response: str, keyword: Text, frequency: Count, relation: Relation) -> bool:
    """The keyword is in it so often, in whatever case."""
    return _holds(response.lower().count(keyword.lower()), relation, frequency)


def forbidden_words(response: str, forbidden_words: list[Text]) -> bool:
    """None of the words is in it as a word."""
    return not any(re.search(rf"\b{re.escape(word)}\b", response, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(response: str, letter: Letter, let_frequency: Count, let_relation: Relation) -> bool:
    """The letter is in it so often, in whatever case."""
    return _holds(response.lower().count(letter.lower()), let_relation, let_frequency)


# Language and case


def response_language(response: str, language: Text) -> bool:
    """It is in the language, by ISO 639-1. What has no language is in every one."""
    return _language(response) in (language, None)


def english_capital(response: str) -> bool:
    """It is English without small letters."""
    return response.isupper() and response_language(response, "en")


def english_lowercase(response: str) -> bool:
    """It is English without capital letters."""
    return response.islower() and response_language(response, "en")


def capital_word_frequency(response: str, capital_frequency: Count, capital_relation: Relation) -> bool:
    """So many words are all capitals."""
    return _holds(english.count_capital_words(response), capital_relation, capital_frequency)


# Length


def number_sentences(response: str, num_sentences: Count, relation: Relation) -> bool:
    """It has so many sentences."""
    return _holds(english.count_sentences(response), relation, num_sentences)


def number_words(response: str, num_words: Count, relation: Relation) -> bool:
    """It has so many words."""
    return _holds(english.count_words(response), relation, num_words)


def number_paragraphs(response: str, num_paragraphs: Count) -> bool:
    """*** divides it into so many paragraphs, none of them empty; it may stand at either end."""
    return _parts(response, "***") == num_paragraphs


def nth_paragraph_first_word(
    response: str, num_paragraphs: Count, nth_paragraph: Annotated[int, Meta(ge=1)], first_word: Text
) -> bool:
    """Empty lines divide it into so many paragraphs, and the nth begins with the word."""
    paragraphs = response.split("\n\n")
    count = sum(1 for paragraph in paragraphs if paragraph.strip())
    if count != num_paragraphs or nth_paragraph > count:
        return False
    words = paragraphs[nth_paragraph - 1].split(maxsplit=1)
    first = words[0].lstrip("'").lstrip('"') if words else ""
    return bool(words) and re.split(r"[.,?!'\"]", first, maxsplit=1)[0].lower() == first_word.lower()


# Content and format


def number_placeholders(response: str, num_placeholders: Count) -> bool:
    """It has at least so many [placeholders]."""
    return sum(_count_brackets(line) for line in response.split("\n")) >= num_placeholders


def postscript(response: str, postscript_marker: Text) -> bool:
    """It has a postscript, with the marker in front."""
    spaced = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    pattern = spaced.get(postscript_marker.strip(), re.escape(postscript_marker.strip().lower()))
    return re.search(pattern, response.lower()) is not None


def number_bullet_lists(response: str, num_bullets: Count) -> bool:
    """It has exactly so many lines that begin with * or -; not with **."""
    stars = re.findall(r"^[^\S\n]*\*[^*].*$", response, re.MULTILINE)  # one that is alone takes the next line with it
    dashes = re.findall(r"^[^\S\n]*-", response, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def number_highlighted_sections(response: str, num_highlights: Count) -> bool:
    """It has at least so many *highlighted* or **highlighted** stretches."""
    single = (found[1:-1] for found in re.findall(r"\*[^\n*]*\*", response))
    double = (found[2:-2] for found in re.findall(r"\*\*[^\n*]*\*\*", response))
    return sum(1 for text in (*single, *double) if text.strip()) >= num_highlights


def multiple_sections(response: str, section_spliter: Text, num_sections: Count) -> bool:
    """It has at least so many sections that begin with the word and a number."""
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", response)) >= num_sections


def json_format(response: str) -> bool:
    """The whole of it is JSON, in a code fence or not. What is nested too deep to be read is none."""
    text = response.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(response: str) -> bool:
    """It has a <<title>>."""
    for line in response.split("\n"):
        begin, end = line.find("<<"), line.rfind(">>")
        if 0 <= begin < end - 2 and line[begin:end].lstrip("<").rstrip(">").strip():
            return True
    return False


def constrained_response(response: str) -> bool:
    """It has one of three answers."""
    return any(answer in response for answer in _ANSWERS)


def two_responses(response: str) -> bool:
    """****** divides it into two different responses."""
    parts = [part.strip() for part in response.split("******") if part.strip()]
    return _parts(response, "******") == 2 and parts[0] != parts[1]


def repeat_prompt(response: str, prompt_to_repeat: Text) -> bool:
    """It begins with the prompt."""
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


# Beginning, end and punctuation


def end_checker(response: str, end_phrase: Text) -> bool:
    """It ends with the phrase; quotation marks may follow."""
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(response: str) -> bool:
    """It is within double quotation marks."""
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def no_comma(response: str) -> bool:
    """It has no comma."""
    return "," not in response


CHECKS: dict[str, Check] = {
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
"""Each kind of instruction by IFEval's id."""


def _holds(count: int, relation: Relation, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


def _parts(text: str, divider: str) -> int:
    """How many parts a divider makes, an empty one at either end not counted; 0 when another is empty."""
    is_full = [bool(part.strip()) for part in text.split(divider)]
    return sum(is_full) if all(is_full[1:-1]) else 0


def _count_brackets(line: str) -> int:
    count, end = 0, -1
    while (begin := line.find("[", end + 1)) >= 0 and (end := line.find("]", begin)) >= 0:
        count += 1
    return count


def _language(text: str) -> str | None:
    """The language of a text, the same one each time; None when it has none."""
    import langdetect  # an extra

    langdetect.DetectorFactory.seed = 0
    try:
        return str(langdetect.detect(text[:_LANGUAGE_WINDOW]))
    except langdetect.LangDetectException:
        return None
