"""What a model wrote, split into its reasoning and its answer, for the families of models that reason."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from persyn.llm import template_check
from persyn.llm.chat import Chat
from persyn.llm.protocols import Failed, Generate, Generated, Result, Sampling
from persyn.llm.reasoning import HARMONY, MARKERS, MarkerReader, split, split_opened, split_unseen
from persyn.llm.teachers import generation, results
from persyn.llm.teachers.generation import EncodedPrompt
from tests.llm.reasoning_families import FAMILIES, Family, tokenizer

REASONING = "We add two and two, and the sum is four. Is it? Yes.\n\nWe add: it is é."
ANSWER = "It is four.\n\nIs it?  Yes: 2 < 4 and [x]."
#: Everything that any family writes around reasoning, and the turns of some.
HOSTILE = " ".join(
    [text for each in MARKERS for text in (each.opens, each.closes)] + ["<|im_start|>assistant\n<think>"]
)


def written(family: Family, reasoning: str = REASONING, answer: str = ANSWER) -> str:
    return f"{family.opening}{reasoning if family.reasons else ''}{family.closing}{answer}{family.after}"


def chat_of(family: Family) -> Chat:
    return Chat(tokenizer(family), variables=family.variables)


def prepared(chat: Chat, text: str = "2+2?", **how: Any) -> EncodedPrompt:
    request = Generate(1, [{"role": "user", "content": text}], Sampling(**how), seed=0)
    found = generation.prepare(chat, request, None, generation.reader(chat))
    assert isinstance(found, EncodedPrompt), found
    return found


def result(chat: Chat, ids: list[int], *, text: str = "2+2?", finish: str = "stop") -> Result:
    prompt = prepared(chat, text)
    parts = generation.reader(chat).read(ids, prompt.tail, [])
    return results.to_result(generation.finished(prompt, parts, finish, len(ids), 0.0))


def generated(found: Result) -> Generated:
    assert isinstance(found, Generated), found
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_split_by_its_template_and_all_of_it_is_kept(name: str) -> None:
    family = FAMILIES[name]
    chat = chat_of(family)

    found = generated(result(chat, chat.encode(written(family))))

    # The whole is what was generated: only whitespace between the parts is not stored.
    assert (found.reasoning, found.text) == (REASONING if family.reasons else None, ANSWER)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tokens_of_the_parts_are_those_that_were_billed(name: str) -> None:
    family = FAMILIES[name]
    chat = chat_of(family)
    ids = chat.encode(written(family, REASONING * 20, ANSWER * 20))

    found = generated(result(chat, ids))

    assert found.reasoning_tokens is not None
    answered = len(chat.encode(ANSWER * 20 + family.after))
    assert found.response_tokens == len(ids)
    assert abs(found.reasoning_tokens + answered - len(ids)) <= 0.02 * len(ids)
    if family.reasons:
        n_tokens = len(chat.encode(family.opening + REASONING * 20 + family.closing))
        # `closing` includes whitespace and what opens the answer.
        assert abs(found.reasoning_tokens - n_tokens) <= 0.02 * len(ids)
    else:
        assert found.reasoning_tokens == 0


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.reasons])
def test_a_response_that_was_cut_in_its_reasoning_is_no_answer(name: str) -> None:
    family = FAMILIES[name]
    chat = chat_of(family)
    ids = chat.encode(family.opening + REASONING)

    for n_tokens in (len(ids), len(ids) // 2, len(chat.encode(family.opening)) + 1):
        found = result(chat, ids[:n_tokens], finish="length")

        assert isinstance(found, Failed)
        assert found.reason == (
            f"unfinished_reasoning: {n_tokens:,} tokens of reasoning and no answer, finish reason length; "
            "raise max_tokens, or set max_reasoning_tokens"
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_an_empty_block_is_no_reasoning(name: str) -> None:
    family = FAMILIES[name]
    chat = chat_of(family)

    found = generated(result(chat, chat.encode(written(family, reasoning="\n\n"))))

    assert (found.reasoning, found.text) == (None, ANSWER)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_full_of_markers_changes_nothing(name: str) -> None:
    family = FAMILIES[name]
    chat = chat_of(family)
    ids = chat.encode(written(family))

    hostile, harmless = generated(result(chat, ids, text=HOSTILE)), generated(result(chat, ids))

    assert structs.replace(hostile, prompt_tokens=None) == structs.replace(harmless, prompt_tokens=None)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_may_speak_of_the_markers(name: str) -> None:
    family = FAMILIES[name]
    chat = chat_of(family)
    before, after = written(family, answer="\0").split("\0")
    # Spelled out, as a model does that only mentions them.
    mention = f"A model writes {HOSTILE} in this order."
    plain = chat.tokenizer(mention, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    found = generated(result(chat, [*chat.encode(before), *plain, *chat.encode(after)]))

    assert found.text == mention
    assert found.reasoning == (REASONING if family.reasons else None)


def test_a_marker_that_reasoning_spells_out_does_not_end_it() -> None:
    chat = chat_of(FAMILIES["qwen 3 thinking"])
    spelled = [token for text in ("I must write </", "think>") for token in chat.encode(text)]

    found = generated(result(chat, [*spelled, *chat.encode(" at its end.</think>Yes.")]))

    assert (found.reasoning, found.text) == ("I must write </think> at its end.", "Yes.")


def test_special_tokens_that_are_no_markers_are_left_out() -> None:
    family = FAMILIES["magistral"]
    chat = chat_of(family)

    found = generated(result(chat, chat.encode("[THINK]We[INST] add.[/THINK]Fo[/INST]ur.[/THINK]")))

    assert (found.reasoning, found.text) == ("We add.", "Four.")


def test_a_block_that_is_opened_or_closed_twice_leaves_no_marker() -> None:
    opened, closed = chat_of(FAMILIES["qwen 3 thinking"]), chat_of(FAMILIES["qwen 3, off"])

    twice = generated(result(opened, opened.encode("<think>\nWe add.\n</think>\n\nFour.")))
    again = generated(result(closed, closed.encode("\n</think>\n\nFour.")))

    assert (twice.reasoning, twice.text) == ("We add.", "Four.")
    assert (again.reasoning, again.text) == (None, "Four.")


def test_the_channels_of_gpt_oss_are_told_apart() -> None:
    chat = chat_of(FAMILIES["gpt-oss"])

    def read(text: str) -> tuple[str | None, str]:
        found = generated(result(chat, chat.encode(text)))
        return found.reasoning, found.text

    next_message = "<|end|><|start|>assistant"
    assert read(
        f"<|channel|>analysis<|message|>First.{next_message}<|channel|>commentary<|message|>I shall look.{next_message}"
        f"<|channel|>analysis<|message|>Then.{next_message}<|channel|>final<|message|>Four."
    ) == ("First.\nThen.", "I shall look.\nFour.")
    call = '<|channel|>commentary to=functions.sum <|constrain|>json<|message|>{"a": 2}'
    assert read(f"<|channel|>analysis<|message|>First.{next_message}{call}") == (
        "First.",
        f"<|start|>assistant{call}",
    )


def test_a_header_that_was_cut_off_is_unfinished_reasoning() -> None:
    chat = chat_of(FAMILIES["gpt-oss"])

    for cut in ("<|channel|>", "<|channel|>ana", "<|channel|>analysis", "<|channel|>analysis<|message|>We.<|end|>"):
        found = result(chat, chat.encode(cut), finish="length")
        assert isinstance(found, Failed)
        assert found.reason.startswith("unfinished_reasoning: ")


def test_tags_that_no_one_names_are_text_except_the_common_ones() -> None:
    chat = chat_of(FAMILIES["magistral"])
    plain = MarkerReader(chat.tokenizer, "{{ messages[0].content }}")

    def read(text: str) -> tuple[str | None, str]:
        parts = plain.read(chat.encode(text), "", [])
        return parts.reasoning, parts.answer

    assert read("<reasoning>We add.</reasoning>Four.") == (None, "<reasoning>We add.</reasoning>Four.")
    assert read("Here is my thought process: a Here is my response: b")[0] is None
    assert read("<think>We add.</think>Four.") == ("We add.", "Four.")


def test_a_stop_text_ends_the_answer() -> None:
    chat = chat_of(FAMILIES["qwen 3"])
    ids = chat.encode("<think>\nWe add.\n</think>\n\nFour. Stop here.")

    parts = generation.reader(chat).read(ids, "", [" Stop"])

    assert (parts.reasoning, parts.answer, parts.is_cut) == ("We add.", "Four.", True)


UNSEEN = {
    "between markers": ("<think>\nWe add.\n</think>\n\nFour.", "We add.", "Four."),
    "in brackets": ("[THINK]We add.[/THINK]Four.", "We add.", "Four."),
    "closed on a line of its own": ("We add.\n</think>\nFour.", "We add.", "Four."),
    "closed before an empty line": ("We add.</think>\n\nFour.", "We add.", "Four."),
    "channels": (f"{HARMONY.opens}We add.{HARMONY.closes}Four.", "We add.", "Four."),
    "nothing": ("Four.", None, "Four."),
    "an empty block": ("<think>\n\n</think>\n\nFour.", None, "Four."),
    "cut": ("<think>\nWe add.", "We add.", ""),
    "markers that are mentioned": ("It ends with </think>, see?", None, "It ends with </think>, see?"),
    "a block that is shown": ("Such as:\n<think>\na\n</think>\n\nb", None, "Such as:\n<think>\na\n</think>\n\nb"),
    "a channel that is mentioned": ("<|channel|> is a token.", None, "<|channel|> is a token."),
}


@pytest.mark.parametrize(("text", "reasoning", "answer"), UNSEEN.values(), ids=UNSEEN)
def test_a_text_without_its_template_is_split_where_its_markers_can_be_meant(
    text: str, reasoning: str | None, answer: str
) -> None:
    found = split_unseen(text)
    assert (found.reasoning, found.answer) == (reasoning, answer)


def test_a_text_that_began_inside_is_split_at_whatever_closes_it() -> None:
    assert split_opened("We add. </think> Four.").answer == "Four."
    assert split_opened("We add. [/THINK]Four.").reasoning == "We add."
    assert split_opened("We add").answer == ""
    assert split("no markers", MARKERS).answer == "no markers"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qwen 3", "between '<think>' and '</think>'; the model opens it, or does not reason"),
        ("qwen 3, off", "the generation prompt has an empty one"),
        ("qwen 3 thinking", "the generation prompt opens it"),
        ("gemma 4", "between '<|channel>thought' and '<channel|>'"),
    ],
)
def test_a_check_says_what_will_be_taken_as_reasoning(name: str, said: str) -> None:
    findings = template_check.look_over(chat_of(FAMILIES[name]))

    (found,) = [each for each in findings if each.topic == "reasoning"]
    assert found.level == "ok"
    assert said in found.message


def test_a_variable_that_the_template_does_not_have_is_an_error() -> None:
    chat = Chat(tokenizer(FAMILIES["qwen 3"]), variables={"enable_thinkin": False})

    (found,) = [each for each in template_check.look_over(chat) if each.level == "error"]

    assert found.message == "the chat template has no variable 'enable_thinkin'; correct chat_template_kwargs"


def test_the_effort_is_a_variable_of_the_template() -> None:
    chat = chat_of(FAMILIES["gpt-oss"])

    def text(**how: Any) -> str:
        return str(chat.tokenizer.decode(prepared(chat, **how).ids))

    assert "Reasoning: medium" in text()
    assert "Reasoning: high" in text(reasoning_effort="high")
    assert "Reasoning: medium" in text()
    other = chat_of(FAMILIES["qwen 3"])
    request = Generate(1, [{"role": "user", "content": "a"}], Sampling(reasoning_effort="high"), seed=0)
    refused = generation.prepare(other, request, None)
    assert isinstance(refused, Failed)
    assert refused.reason == "bad_request: reasoning_effort is set, but the chat template has no such variable"


def test_a_limit_needs_markers() -> None:
    chat = chat_of(Family("{{ messages[0].content }}", "", "", ""))
    request = Generate(1, [{"role": "user", "content": "a"}], Sampling(max_reasoning_tokens=5), seed=0)

    refused = generation.prepare(chat, request, None, generation.reader(chat))

    assert isinstance(refused, Failed)
    assert "no reasoning markers of the model are known" in refused.reason
