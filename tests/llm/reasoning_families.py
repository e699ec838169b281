"""Families of models that reason: their templates, cut down to what decides the split, and what they write.

The generation prompts, the markers and which of them are special tokens are those that the families publish.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
_CHATML_OPENS = "{% if add_generation_prompt %}<|im_start|>assistant\n"
_DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}"
    "<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
)
_GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}<think></think>\n{% endif %}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{{ '\n<think></think>' if enable_thinking is defined and not enable_thinking else '' }}{% endif %}"
)
_SMOLLM3 = (
    "{% set mode = '/no_think' if enable_thinking is defined and not enable_thinking else '/think' %}"
    "<|im_start|>system\n{% if mode == '/think' %}Write <think> Thought section </think> Solution section.{% endif %}"
    "{{ messages[0].content if messages[0].role == 'system' else '' }}<|im_end|>\n"
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{{ '<think>\n\n</think>\n' if mode == '/no_think' else '' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% if enable_thinking is defined and enable_thinking %}<|turn>system\n<|think|><turn|>\n{% endif %}"
    "{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<turn|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn>model\n"
    "{{ '' if enable_thinking | default(false) else '<|channel>thought\n<channel|>' }}{% endif %}"
)
_HARMONY = (
    "<|start|>system<|message|>Reasoning: {{ reasoning_effort | default('medium') }}<|end|>{% for m in messages %}"
    "<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }} Use "
    "[THINK]your thoughts[/THINK].[/SYSTEM_PROMPT]{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
_GRANITE = (
    "<|start_of_role|>system<|end_of_role|>{% if thinking %}Write your thoughts between <think></think> and "
    "your response between <response></response>.{% endif %}<|end_of_text|>\n{% for m in messages %}"
    "<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
_GRANITE_32 = _GRANITE.replace(
    "Write your thoughts between <think></think> and your response between <response></response>.",
    "Write your thoughts after 'Here is my thought process:' and your response after 'Here is my response:'.",
)
_COMMAND = (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>"
    "{{ '<|CHATBOT_TOKEN|><|START_THINKING|><|END_THINKING|><|START_RESPONSE|>' if m.role == 'assistant' else "
    "'<|USER_TOKEN|>' }}{{ m.content }}{{ '<|END_RESPONSE|>' if m.role == 'assistant' else '' }}<|END_OF_TURN_TOKEN|>"
    "{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
_SEED = (
    "{% for m in messages %}<seed:bos>{{ m.role }}\n{{ m.content }}<seed:eos>{% endfor %}"
    "{% if add_generation_prompt %}<seed:bos>assistant\n{{ '<seed:think>' if thinking_budget == 0 else '' }}{% endif %}"
)
_EXAONE = (
    "{% for m in messages %}[|{{ m.role }}|]{{ m.content }}[|endofturn|]\n{% endfor %}"
    "{% if add_generation_prompt %}[|assistant|]<thought>\n{% endif %}"
)
_HUNYUAN = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content.split('<answer>')[-1] }}"
    "<|eos|>{% else %}{{ m.content }}<|extra_0|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template with its tokens, and the pieces of what the model writes, in their order."""

    template: str
    opening: str
    closing: str
    #: Of the last turn.
    end: str
    #: What the model writes after the answer and its end token does not include.
    after: str = ""
    #: Special tokens, and tokens that are added without being special.
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    variables: dict[str, Any] = field(default_factory=dict)
    reasons: bool = True


_TAGS = ("<think>", "</think>")
_IM = ("<|im_start|>", "<|im_end|>")
_DS = ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")
_CHANNELS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>")
_GRANITE_TOKENS = ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>")
_COMMAND_TOKENS = ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>")
_COMMAND_TOKENS += ("<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>")
_GEMMA_TOKENS = ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>")
_OFF = {"enable_thinking": False}
_QWEN_HYBRID = (
    _CHATML
    + _CHATML_OPENS
    + ("{{ '<think>\n\n</think>\n\n' if enable_thinking is defined and not enable_thinking else '' }}{% endif %}")
)

FAMILIES = {
    "qwen 3": Family(_QWEN_HYBRID, "<think>\n", "\n</think>\n\n", "<|im_end|>", special=_IM, added=_TAGS),
    "qwen 3, off": Family(
        _QWEN_HYBRID, "", "", "<|im_end|>", special=_IM, added=_TAGS, variables=_OFF, reasons=False
    ),
    "qwen 3 thinking": Family(
        _CHATML + _CHATML_OPENS + "<think>\n{% endif %}", "", "\n</think>\n\n", "<|im_end|>", special=_IM, added=_TAGS
    ),
    "deepseek r1": Family(
        _DEEPSEEK + "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}",
        "<think>\n", "\n</think>\n\n", "<｜end▁of▁sentence｜>", special=_DS, added=_TAGS,
    ),
    "deepseek r1 distilled": Family(
        _DEEPSEEK + "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}",
        "", "\n</think>\n\n", "<｜end▁of▁sentence｜>", special=_DS, added=_TAGS,
    ),
    "gpt-oss": Family(
        _HARMONY,
        "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>", "<|return|>",
        special=_CHANNELS,
    ),
    "gpt-oss, straight": Family(
        _HARMONY, "<|channel|>final<|message|>", "", "<|return|>", special=_CHANNELS, reasons=False
    ),
    "gemma 4": Family(
        _GEMMA, "<|channel>thought\n", "\n<channel|>", "<turn|>", special=_GEMMA_TOKENS,
        variables={"enable_thinking": True},
    ),
    "gemma 4, off": Family(_GEMMA, "", "", "<turn|>", special=_GEMMA_TOKENS, reasons=False),
    "magistral": Family(
        _MISTRAL, "[THINK]", "[/THINK]", "</s>",
        special=("[INST]", "[/INST]", "[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]"),
    ),
    "granite 3.3": Family(
        _GRANITE, "<think>", "</think><response>", "<|end_of_text|>", "</response>", special=_GRANITE_TOKENS,
        variables={"thinking": True},
    ),
    "granite 3.2": Family(
        _GRANITE_32, "Here is my thought process: ", "\n\nHere is my response: ", "<|end_of_text|>",
        special=_GRANITE_TOKENS, variables={"thinking": True},
    ),
    "glm 4.5": Family(_GLM, "\n<think>", "</think>\n", "<|user|>", special=("<|user|>", "<|assistant|>"), added=_TAGS),
    "glm 4.5, off": Family(
        _GLM, "\n", "", "<|user|>", special=("<|user|>", "<|assistant|>"), added=_TAGS, variables=_OFF, reasons=False
    ),
    "smollm 3": Family(_SMOLLM3, "<think>\n", "\n</think>\n", "<|im_end|>", special=_IM, added=_TAGS),
    "smollm 3, off": Family(
        _SMOLLM3, "", "", "<|im_end|>", special=_IM, added=_TAGS, variables=_OFF, reasons=False
    ),
    "command a": Family(
        _COMMAND, "<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>", "<|END_OF_TURN_TOKEN|>",
        "<|END_RESPONSE|>", special=_COMMAND_TOKENS,
    ),
    "seed-oss": Family(
        _SEED, "<seed:think>", "</seed:think>", "<seed:eos>",
        special=("<seed:bos>", "<seed:eos>", "<seed:think>", "</seed:think>"),
    ),
    "exaone deep": Family(_EXAONE, "", "\n</thought>\n\n", "[|endofturn|]", special=("[|endofturn|]",)),
    "hunyuan": Family(
        _HUNYUAN, "<think>\n", "\n</think>\n<answer>\n", "<|eos|>", "\n</answer>", special=("<|eos|>", "<|extra_0|>")
    ),
}  # fmt: skip


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["We add two and two, and the sum is four. Is it? Yes.\n\n" * 4], trainer)
    return str(tokenizer.to_str())


def tokenizer(family: Family) -> Any:
    """A small byte-level tokenizer with the family's tokens."""
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_trained()), bos_token="<s>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": list(family.special)})
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.added])
    made.chat_template = family.template
    return made
