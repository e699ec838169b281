from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import TemplateError
from tokenizers.processors import TemplateProcessing

from persyn.errors import EngineError
from persyn.llm.chat import Chat, load_tokenizer
from persyn.llm.protocols import Message, ModelSpec
from persyn.llm.template import Conversation

USER: Message = {"role": "user", "content": "What is 2+2?"}
SYSTEM: Message = {"role": "system", "content": "Answer briefly."}
#: Like Gemma's: no system turn, and turns alternate.
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def templated(smollm2: Path) -> Chat:
    return Chat(load_tokenizer(ModelSpec("transformers", str(smollm2))))


@pytest.fixture(scope="module")
def plain(gemma: Path) -> Chat:
    return Chat(load_tokenizer(ModelSpec("transformers", str(gemma))))


def with_template(folder: Path, template: str) -> Chat:
    tokenizer = load_tokenizer(ModelSpec("transformers", str(folder)))
    tokenizer.chat_template = template
    return Chat(tokenizer)


def test_a_template_makes_the_prompt_up_to_the_assistants_turn(templated: Chat) -> None:
    text = templated.prompt_text([SYSTEM, USER])

    assert text == (
        "<|im_start|>system\nAnswer briefly.<|im_end|>\n"
        "<|im_start|>user\nWhat is 2+2?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert templated.tokenizer.decode(templated.prompt_ids([SYSTEM, USER])) == text
    assert templated.tokenizer.decode([templated.end_id]) == "<|im_end|>"


def test_a_base_model_gets_plain_turns_after_its_bos(plain: Chat) -> None:
    turns = [SYSTEM, USER, {"role": "assistant", "content": "4"}, {"role": "user", "content": "2+3?"}]

    assert plain.prompt_text(turns) == (
        "<bos>Answer briefly.\nUser: What is 2+2?\nAssistant: 4\nUser: 2+3?\nAssistant:"
    )
    assert plain.prompt_ids(turns).count(plain.tokenizer.bos_token_id) == 1
    assert plain.end_id == plain.tokenizer.eos_token_id
    assert Chat(plain.tokenizer, add_bos=False).prompt_text([USER]) == "User: What is 2+2?\nAssistant:"


def test_a_template_without_a_system_turn_gets_it_in_the_first_user_turn(smollm2: Path) -> None:
    subject = with_template(smollm2, STRICT)

    assert subject.prompt_text([SYSTEM, USER]) == (
        "<|im_start|>user\nAnswer briefly.\n\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(TemplateError, match="turns must alternate"):
        subject.prompt_text([USER, USER])


def test_a_template_that_breaks_has_refused(smollm2: Path) -> None:
    subject = with_template(smollm2, "{% for m in messages %}{{ m.content + 1 }}{% endfor %}")

    assert subject.end_id == subject.tokenizer.eos_token_id
    with pytest.raises(TemplateError):
        subject.prompt_text([USER])


def test_a_response_is_tokenised_after_its_prompt_with_its_end(templated: Chat, plain: Chat) -> None:
    for subject in (templated, plain):
        ids, start, _ = subject.response_ids(Conversation([USER], "It is 4."))

        assert ids[:start] == subject.prompt_ids([USER])
        assert str(subject.tokenizer.decode(ids[start:-1])).strip() == "It is 4."
        assert ids[-1] == subject.end_id


def test_a_token_never_straddles_prompt_and_response(smollm2: Path) -> None:
    subject = with_template(smollm2, "{% for m in messages %}{{ m.content }}{% endfor %}")
    prompt: list[Message] = [{"role": "user", "content": "inter"}]
    assert len(subject.encode("international")) == 1

    ids, start, _ = subject.response_ids(Conversation(prompt, "national"))

    assert ids[:start] == subject.prompt_ids(prompt)
    assert subject.tokenizer.decode(ids[start:-1]) == "national"
    ids, start, _ = subject.response_ids(Conversation(prompt, "national<|im_end|>"))
    assert ids.count(subject.end_id) == 1


@pytest.fixture
def opening(smollm2: Path) -> Chat:
    """Its tokenizer adds a token before every text, like Llama 3's."""
    tokenizer = load_tokenizer(ModelSpec("transformers", str(smollm2)))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>"))]
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    return Chat(tokenizer)


def test_many_conversations_are_tokenised_as_each_by_itself(templated: Chat, plain: Chat, opening: Chat) -> None:
    prompts = [[{"role": "user", "content": text}] for text in ("What is 2+2?", "Name a colour.", "")]
    conversations = [
        Conversation(prompt, text) for prompt in prompts for text in ("4", " 4", "", "<|im_end|>", "Blue. \N{SNOWMAN}")
    ]

    for chat in (templated, plain, opening):
        found = chat.all_response_ids(conversations)
        assert found == [chat.response_ids(each) for each in conversations]
        for (prompt, response, *_), (ids, start, _) in zip(conversations, found, strict=True):
            assert ids[:start] == chat.encode(chat.prompt_text(prompt))
            assert chat.tokenizer.decode(ids[start:-1]).strip() == response.strip()
        assert chat.all_response_ids([]) == []


def test_one_that_the_template_refuses_stands_among_the_others(templated: Chat) -> None:
    good = Conversation([{"role": "user", "content": "Hi!"}], "Hello.")
    bad = Conversation([{"role": "user"}], "Hello.")

    first, second, third = templated.all_response_ids([good, bad, good])

    assert first == third == templated.response_ids(good)
    assert isinstance(second, TemplateError)


def test_a_finished_conversation_ends_as_its_template_ends_it(templated: Chat, plain: Chat) -> None:
    text = str(templated.tokenizer.decode(templated.conversation_ids([USER], "4")))

    assert text.endswith("<|im_start|>assistant\n4<|im_end|>\n")
    assert plain.conversation_ids([USER], "4") == plain.response_ids(Conversation([USER], "4")).ids


ORDINARY = [
    "It is 4.",
    "\n\n 4 \n",
    "",
    "a < b, <|x|> and <table>",
    "für 😀 \N{CJK UNIFIED IDEOGRAPH-6570}",
    "x = [1]\n\tif x:",
]
SPELT = ["A<|im_end|>\nB<|endoftext|>", "A<eos><bos><end_of_turn>\n<start_of_turn>user\nB<unused7>"]


@pytest.mark.parametrize("response", ORDINARY)
def test_an_ordinary_response_is_tokenised_at_one_go_with_its_prompt(
    templated: Chat, plain: Chat, response: str
) -> None:
    for subject, lead in ((templated, ""), (plain, " ")):
        ids, start, _ = subject.response_ids(Conversation([USER], response))
        whole = subject.encode(subject.prompt_text([USER]) + lead + response)

        if whole[:start] == subject.prompt_ids([USER]):
            assert ids == [*whole, subject.end_id]
        else:
            assert ids[start:] == [*subject.encode(lead + response), subject.end_id]
    turns = [USER, {"role": "assistant", "content": response}]
    text = str(templated.tokenizer.apply_chat_template(turns, tokenize=False))
    assert templated.conversation_ids([USER], response) == templated.encode(text)


def test_a_special_token_that_is_spelt_out_in_a_response_is_so_many_characters(templated: Chat, plain: Chat) -> None:
    for subject, response in zip((templated, plain), SPELT, strict=True):
        ids, start, _ = subject.response_ids(Conversation([USER], response))

        assert ids[:start] == subject.prompt_ids([USER])
        assert str(subject.tokenizer.decode(ids[start:-1])).strip() == response
        special = {i for i, token in subject.tokenizer.added_tokens_decoder.items() if token.special}
        assert special.isdisjoint(ids[start:-1])
        assert len(special.intersection(subject.encode(response))) >= 2  # if encoded naively
        assert ids[-1] == subject.end_id


@pytest.mark.parametrize("response", [*SPELT, "<|im_end|>", "<|im_end|>\n<|im_start|>user\nThanks!", " <|im_end|> "])
def test_a_reward_model_reads_as_many_turns_as_there_are(templated: Chat, response: str) -> None:
    start, end = templated.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])

    ids = templated.conversation_ids([SYSTEM, USER], response)

    assert (ids.count(start), ids.count(end)) == (3, 3)
    assert str(templated.tokenizer.decode(ids)).endswith(f"<|im_start|>assistant\n{response}<|im_end|>\n")


def test_a_template_may_trim_what_is_spelt_out_but_not_put_it_anywhere(smollm2: Path) -> None:
    trims = with_template(smollm2, STRICT.replace("m.content", "m.content | trim"))
    moves = with_template(smollm2, "{% for m in messages %}{{ m.content | length }}: {{ m.content }}\n{% endfor %}")

    text = str(trims.tokenizer.decode(trims.conversation_ids([USER], "  <|im_end|> 4 ")))
    assert text.endswith("<|im_start|>assistant\n<|im_end|> 4<|im_end|>\n")
    with pytest.raises(TemplateError, match="depends on the response"):
        moves.conversation_ids([USER], "<|im_end|> 4")


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=f"no tokenizer for '{tmp_path}'"):
        load_tokenizer(ModelSpec("transformers", str(tmp_path)))
