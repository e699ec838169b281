"""Verifiable instructions: each kind followed and violated; what cannot be checked is a failure."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.results import Score
from persyn.errors import EngineError
from persyn.llm.protocols import Failed, Judge, Judged, ModelSpec, Result
from persyn.llm.scorers import english, instruction_checks, instructions
from persyn.runs import pipeline, run_file
from persyn.settings import Settings
from persyn.workers.runner.worker import Worker
from tests.run_files import write_run

ENGLISH = "the quick brown fox jumps over the lazy dog and then it goes back home to sleep"

#: id, kwargs, a response that follows it, one that violates it.
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["Fox", "lazy dog"]}, ENGLISH, "a fox alone"),
    ("keywords:existence", {"keywords": ["a.c"]}, "a.c", "abc"),
    ("keywords:frequency", {"keyword": "ha", "frequency": 3, "relation": "at least"}, "Ha, haha", "ha ha"),
    ("keywords:frequency", {"keyword": "ha", "frequency": 3, "relation": "less than"}, "ha ha", "Ha, haha"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat", "a b"]}, "category", "a Cat."),
    ("keywords:letter_frequency", {"letter": "A", "let_frequency": 2, "let_relation": "at least"}, "Abba", "abb"),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 1, "let_relation": "less than"}, "no", "yes!"),
    ("language:response_language", {"language": "de"}, "Der Fuchs läuft schnell durch den Wald nach Hause.", ENGLISH),
    ("language:response_language", {"language": "de"}, "12345", ENGLISH),
    ("change_case:english_capital", {}, ENGLISH.upper(), ENGLISH.title()),
    ("change_case:english_capital", {}, ENGLISH.upper(), "DER FUCHS LÄUFT SCHNELL DURCH DEN WALD NACH HAUSE."),
    ("change_case:english_lowercase", {}, ENGLISH, ENGLISH.capitalize()),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 3, "capital_relation": "at least"},
        "WELL-KNOWN, (BIG) and I",
        "WELL-KNOWN BIG Dog",
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        "ONE dog",
        "I'M here",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "at least"},
        "One. Two! Three?",
        "Dr. Smith paid 3.50 at 5 p.m. today. That was all.",
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "one two", "don't go"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "don't go", "one-two"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo\n***\n", "one\n***\n***\ntwo"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***one***two", "one\n\ntwo"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Hello"},
        'Well.\n\n"hello", he said.',
        "hello\n\nwell",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "hello"},
        "Hello!\n\nBye.",
        "Hello!\n\nBye.\n\nAgain.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name], [address]", "[name, [address]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\np. s. Call me.", "Bye. PS"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP.P.S. Call me.", "P.S. Bye."),
    ("detectable_content:postscript", {"postscript_marker": "N.B."}, "n.b. this", "nobody"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "A:\n* one\n  - two", "* one"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "**bold**\n\n- one", "* one\n* two"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "*\n* one", "*"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and **two**", "*one* ** **"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\na\nSection 2\nb",
        "Section one, Section 2",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": [1, 2]}\n```', "Here it is: {}"),
    ("detectable_format:title", {}, "<<A title>>\ntext", "<< >> <text>"),
    ("detectable_format:constrained_response", {}, "Well. My answer is no. Sorry.", "No."),
    ("combination:two_responses", {}, "one\n******\ntwo", "one\n******\n one"),
    ("combination:two_responses", {}, "******one******two******", "one******\n******two"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Name a river."}, " name a river. The Rhine.", "The Rhine."),
    ("startend:end_checker", {"end_phrase": "That is all."}, 'Fine. "That is all."\n', "That is all. Bye."),
    ("startend:quotation", {}, ' "quoted" ', '"quoted'),
    ("punctuation:no_comma", {}, "a b", "a, b"),
]


def judge(*requests: Judge, **options: Any) -> list[Result]:
    engine = instructions.load(ModelSpec("instructions", "", options=options), lambda: None)
    engine.submit(requests)
    results: list[Result] = []
    while engine.pending:
        results += engine.step()
    return results


def asked(response: str, *carried: tuple[str, dict[str, Any]]) -> Judge:
    meta = {"instruction_id_list": [id for id, _ in carried], "kwargs": [kwargs for _, kwargs in carried]}
    return Judge(1, [{"role": "user", "content": "Write."}], response, meta=meta)


def value(response: str, *carried: tuple[str, dict[str, Any]], **options: Any) -> float:
    [result] = judge(asked(response, *carried), **options)
    assert isinstance(result, Judged)
    return result.value


@pytest.mark.parametrize(("id", "kwargs", "followed", "not_followed"), CASES)
def test_an_instruction_is_followed_or_not(id: str, kwargs: dict[str, Any], followed: str, not_followed: str) -> None:
    assert value(followed, (id, kwargs)) == 1.0
    assert value(not_followed, (id, kwargs)) == 0.0
    assert value(" \n", (id, kwargs), strict=False) == 0.0


def test_every_kind_of_instruction_is_tried_here() -> None:
    assert {id for id, *_ in CASES} == set(instruction_checks.CHECKS)
    assert len(instruction_checks.CHECKS) == 25


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("no end", 1),
        ("One... two... Then three.", 2),
        ("What?! Yes.", 2),
        ('He said "Stop." Then he left.', 2),
        ("1. Apples are red. 2. bananas are not.", 3),
        ("J. R. Smith, Jr. met Mr. T. in the U.S. in Jan. 1999.", 1),
        ("It closes at 5 p.m. The next one opens.", 2),
        ("**Done.** Next.", 2),
        ("**Done.**", 2),
    ],
)
def test_sentences_end_where_punkt_ends_them(text: str, count: int) -> None:
    assert english.count_sentences(text) == count


@pytest.mark.parametrize(
    ("text", "count"),
    [("NASA's", 1), ("DON'T", 2), ("CANNOT STOP", 3), ("U.S. AND A.B", 3), ("A,B", 2), ("A:1", 1), ("'I'", 1)],
)
def test_capitals_are_counted_by_the_token(text: str, count: int) -> None:
    assert english.count_capital_words(text) == count


NO_COMMA = ("punctuation:no_comma", {})
TWO_BULLETS = ("detectable_format:number_bullet_lists", {"num_bullets": 2})


def test_the_level_decides_between_all_and_a_share() -> None:
    assert (
        value(
            "* a, b",
            NO_COMMA,
            TWO_BULLETS,
            ("startend:quotation", {}),
            ("keywords:existence", {"keywords": ["a"]}),
            level="instruction",
        )
        == 0.25
    )
    assert value("* a\n* b", NO_COMMA, TWO_BULLETS, level="instruction") == 1.0
    assert value("* a\n* b,", NO_COMMA, TWO_BULLETS) == 0.0


def test_the_detail_says_which_were_followed() -> None:
    [result] = judge(asked("* a, b\n* c", ("en:punctuation:no_comma", {}), TWO_BULLETS))
    assert isinstance(result, Judged)
    assert result.detail == {
        "instructions": [
            {"id": "punctuation:no_comma", "followed": False},
            {"id": "detectable_format:number_bullet_lists", "followed": True},
        ]
    }


@pytest.mark.parametrize(
    ("response", "carried"),
    [
        ("Sure, here it is:\na b", NO_COMMA),
        ("a b\nIs that right, or not?", NO_COMMA),
        ("Sure, here:\na b\nAnything else, sir?", NO_COMMA),
        ('**"quoted"**', ("startend:quotation", {})),
        ('Sure:\n*"quoted"*', ("startend:quotation", {})),
    ],
)
def test_loosely_a_frame_around_the_response_is_forgiven(response: str, carried: tuple[str, dict[str, Any]]) -> None:
    assert value(response, carried) == 0.0
    assert value(response, carried, strict=False) == 1.0


def test_loosely_nothing_is_not_a_response() -> None:
    assert value("a, b", NO_COMMA, strict=False) == 0.0


@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        ({}, "no_instructions: "),
        ({"instruction_id_list": [], "kwargs": []}, "no_instructions: "),
        ({"instruction_id_list": "punctuation:no_comma", "kwargs": [{}]}, "malformed_instructions: Expected `array`"),
        ({"instruction_id_list": ["punctuation:no_comma"]}, "malformed_instructions: 1 in instruction_id_list, 0 in"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": "{}"}, "malformed_instructions: "),
        ({"instruction_id_list": ["es:punctuation:no_comma"], "kwargs": [{}]}, "unknown_instruction: 'es:punct"),
        ({"instruction_id_list": ["punctuation:rhyme"], "kwargs": [{}]}, "unknown_instruction: 'punctuation:rhyme'"),
        ({"instruction_id_list": ["startend:end_checker"], "kwargs": [{}]}, "malformed_instructions: startend:end_ch"),
        (
            {
                "instruction_id_list": ["length_constraints:number_words"],
                "kwargs": [{"num_words": "many", "relation": "at least"}],
            },
            "malformed_instructions: length_constraints:number_words: Expected `int`, got `str` - at `$.num_words`",
        ),
        (
            {
                "instruction_id_list": ["length_constraints:number_words"],
                "kwargs": [{"num_words": 5, "relation": "exactly"}],
            },
            "malformed_instructions: length_constraints:number_words: Invalid enum value 'exactly'",
        ),
    ],
)
def test_what_cannot_be_checked_fails_and_says_why(meta: dict[str, Any], reason: str) -> None:
    [result] = judge(Judge(1, [], "text", meta=meta))
    assert isinstance(result, Failed)
    assert result.reason.startswith(reason), result.reason


def test_kwargs_may_come_from_a_table() -> None:
    row = {"num_words": 3.0, "relation": "at least", "keywords": None, "prompt_to_repeat": None}
    assert value("one two three", ("length_constraints:number_words", row)) == 1.0
    [result] = judge(Judge(1, [], "text", meta={"instruction_id_list": ["punctuation:no_comma"], "kwargs": [None]}))
    assert isinstance(result, Judged)


def test_without_langdetect_only_prompts_that_need_it_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruction_checks, "can_detect_language", lambda: False)
    needs, needs_not = judge(asked("Upper", ("change_case:english_lowercase", {})), asked("text", NO_COMMA))
    assert isinstance(needs, Failed)
    assert needs.reason.startswith("missing_package: ")
    assert "persyn[instructions]" in needs.reason
    assert isinstance(needs_not, Judged)


def test_a_wrong_option_is_named() -> None:
    with pytest.raises(EngineError, match="valid options: level, strict"):
        judge(levels="prompt")
    with pytest.raises(EngineError, match="Invalid enum value"):
        judge(level="word")


ALL = [(id, kwargs) for id, kwargs, *_ in CASES]


@pytest.mark.parametrize(
    "unit",
    [
        "[",
        '{"a":',
        "*",
        "**",
        "\n",
        " \n",
        "-\n",
        "<",
        "<<",
        "a",
        "a.",
        "1",
        "?!",
        "***",
        "******",
        "A'S",
        "\u2028",
        ".",
    ],
)
def test_a_hostile_response_is_checked_in_bounded_time(unit: str) -> None:
    response = unit * (50_000 // len(unit))
    began = time.monotonic()
    [result] = judge(asked(response, *ALL), strict=False)
    assert isinstance(result, Judged)
    assert time.monotonic() - began < 20


@given(st.text(st.one_of(st.sampled_from("[]*<>\"'.?! \n,-:AaI\ud800"), st.characters()), max_size=60))
@settings(max_examples=60, deadline=None)
def test_any_text_gets_a_verdict(response: str) -> None:
    [result] = judge(asked(response, *(one for one in ALL if one[0] not in instruction_checks.NEED_LANGDETECT)))
    assert isinstance(result, Judged)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_run_is_scored_by_the_instructions_of_its_prompts(database: Database, tmp_path: Path) -> None:
    file = write_run(tmp_path, prompts=8, teachers=("ada", "bob"), strategy="static", calibration=4)
    prompts = tmp_path / "prompts.jsonl"
    carried = [
        {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"num_words": 1, "relation": relation}]}
        for relation in ("at least", "less than")
    ]
    rows = [json.loads(line) | carried[n % 2] for n, line in enumerate(prompts.read_text().splitlines())]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file.write_text(file.read_text().replace('kind = "fake"', 'kind = "instructions"', 1))

    with database.write() as session:
        run_id = pipeline.start_run(session, run_file.read(file), actor="me").id
    Worker(database, Settings(str(database.url), tmp_path), run_id=run_id).run()

    with database.read() as session:
        run = session.get_one(Run, run_id)
        assert run.state is RunState.DONE, run.error
        scores = session.scalars(select(Score).where(Score.scorer_id == run.quality_scorer_id)).all()
        assert {score.value for score in scores} == {0.0, 1.0}
        assert all(score.detail["instructions"][0]["followed"] is bool(score.value) for score in scores)
