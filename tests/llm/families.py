"""Minimal chat templates in the styles of model families, with tokenizers for them."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "[INST]",
    "[/INST]",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<|User|>",
    "<|Assistant|>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|return|>",
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

#: {family: (template, its output for system turn {s}, user turn {u} and response {r})}.
SOUND = {
    "chatml": (
        CHATML,
        "<|im_start|>system\n{s}<|im_end|>\n<|im_start|>user\n{u}<|im_end|>\n<|im_start|>assistant\n{r}<|im_end|>\n",
    ),
    # Adds a default system turn if there is none.
    "qwen 2.5": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CHATML,
        "<|im_start|>system\n{s}<|im_end|>\n<|im_start|>user\n{u}<|im_end|>\n<|im_start|>assistant\n{r}<|im_end|>\n",
    ),
    # Adds an empty reasoning block before the last response; drops reasoning of earlier turns.
    "qwen 3": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% set parts = m.content.split('</think>') %}{% if loop.last %}<think>\n"
        "{% if parts | length > 1 %}{{ parts[0].split('<think>')[-1].strip('\n') }}{% endif %}{{ '\n' }}"
        "</think>\n\n{% endif %}"
        "{{ parts[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_start|>system\n{s}<|im_end|>\n<|im_start|>user\n{u}<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n{r}<|im_end|>\n",
    ),
    "llama 2": (
        "{% set opening = '' %}{% if messages[0].role == 'system' %}"
        "{% set opening = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}"
        "{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ bos_token }}[INST] {{ ((opening if loop.first else '') + m.content).strip() }} [/INST]"
        "{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}",
        "<s>[INST] <<SYS>>\n{s}\n<</SYS>>\n\n{u} [/INST] {r} </s>",
    ),
    "llama 3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<s><|start_header_id|>system<|end_header_id|>\n\n{s}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{u}"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{r}<|eot_id|>",
    ),
    # Rejects system turns and turns that do not alternate.
    "mistral 1": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %} [INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
        "{% endfor %}",
        "<s> [INST] {s}\n\n{u} [/INST] {r}</s>",
    ),
    # Prepends the system turn to the last turn if that is the user's, and silently drops it otherwise.
    "mistral 3": (
        "{% set system = '' %}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
        "{% set messages = messages[1:] %}{% endif %}{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "[INST] {{ system if loop.last else '' }}{{ m.content }}[/INST]"
        "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}",
        "<s>[INST] {s}\n\n{u}[/INST] {r}</s>",
    ),
    "mistral tekken": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
        "[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
        "{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}"
        "{% endfor %}",
        "<s>[SYSTEM_PROMPT]{s}[/SYSTEM_PROMPT][INST]{u}[/INST]{r}</s>",
    ),
    "gemma 2": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ bos_token }}{% for m in messages %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<s><start_of_turn>user\n{s}\n\n{u}<end_of_turn>\n<start_of_turn>model\n{r}<end_of_turn>\n",
    ),
    "gemma 3": (
        "{% set opening = '' %}{% if messages[0].role == 'system' %}{% set opening = messages[0].content + '\n\n' %}"
        "{% set messages = messages[1:] %}{% endif %}{{ bos_token }}{% for m in messages %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ opening if loop.first else '' }}"
        "{% if m.content is string %}{{ m.content | trim }}{% else %}{{ m.content[0].text | trim }}{% endif %}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<s><start_of_turn>user\n{s}\n\n{u}<end_of_turn>\n<start_of_turn>model\n{r}<end_of_turn>\n",
    ),
    "phi 3": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "<|system|>\n{s}<|end|>\n<|user|>\n{u}<|end|>\n<|assistant|>\n{r}<|end|>\n</s>",
    ),
    # Opens the reasoning only in the generation prompt; drops the reasoning of every response.
    "deepseek r1": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
        "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
        "<s>{s}<|User|>{u}<|Assistant|>{r}</s>",
    ),
    # The model generates the last part of the header itself.
    "harmony": (
        "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}"
        "<|message|>"
        "{{ m.content }}{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        "<|start|>system<|message|>{s}<|end|><|start|>user<|message|>{u}<|end|>"
        "<|start|>assistant<|channel|>final<|message|>{r}<|return|>",
    ),
    # Always opens a turn of the model, regardless of add_generation_prompt.
    "command": (
        "{{ bos_token }}{% for m in messages %}<|start|><|{{ m.role }}|>{% if m.role == 'assistant' %}"
        "<|channel|>{{ m.content }}<|return|>{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
        "<|start|><|assistant|>",
        "<s><|start|><|system|>{s}<|end|><|start|><|user|>{u}<|end|>"
        "<|start|><|assistant|><|channel|>{r}<|return|><|end|><|start|><|assistant|>",
    ),
    # Accepts content only as a list of parts.
    "parts": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'text' %}"
        "{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_start|>system\n{s}<|im_end|>\n<|im_start|>user\n{u}<|im_end|>\n<|im_start|>assistant\n{r}<|im_end|>\n",
    ),
    # Silently drops the system turn.
    "drops system": (
        CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"),
        "<|im_start|>user\n{s}\n\n{u}<|im_end|>\n<|im_start|>assistant\n{r}<|im_end|>\n",
    ),
    # Places the system turn after the user's.
    "system last": (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_start|>user\n{s}\n\n{u}<|im_end|>\n<|im_start|>assistant\n{r}<|im_end|>\n",
    ),
    # Opens the assistant's turn after every user turn, regardless of add_generation_prompt.
    "phi 4": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<|im_end|>"
        "{% else %}<|im_start|>{{ m.role }}<|message|>{{ m.content }}<|im_end|>"
        "{{ '<|im_start|>assistant<|message|>' if m.role == 'user' else '' }}{% endif %}{% endfor %}",
        "<|im_start|>system<|message|>{s}<|im_end|><|im_start|>user<|message|>{u}<|im_end|>"
        "<|im_start|>assistant<|message|>{r}<|im_end|>",
    ),
    # Begins with the end-of-text token; opens a turn inside the loop over turns.
    "olmo": (
        "{{ eos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' else '' }}{% if not loop.last %}{{ '\n' }}"
        "{% elif add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}{% endfor %}",
        "</s><|system|>\n{s}\n<|user|>\n{u}\n<|assistant|>\n{r}</s>",
    ),
    # The generation prompt lacks the line break after the header.
    "zephyr": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}"
        "{% if loop.last and add_generation_prompt %}<|assistant|>{% endif %}{% endfor %}",
        "<|system|>\n{s}</s><|user|>\n{u}</s><|assistant|>\n{r}</s>",
    ),
    "alpaca": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n"
        "{% elif m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
        "{% else %}### Response:\n{{ m.content }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}",
        "{s}\n\n### Instruction:\n{u}\n\n### Response:\n{r}</s>\n\n",
    ),
    "vicuna": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} {% elif m.role == 'user' %}"
        "USER: {{ m.content }} "
        "{% else %}ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        "{s} USER: {u} ASSISTANT: {r}</s>",
    ),
}

_OPENED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

#: {defect: (template, expected message)}.
FAULTY = {
    "writes nothing": ("", "drops the text of the user turn"),
    "drops user turns": (
        CHATML.replace("messages", "messages if m.role != 'user'", 1),
        "drops the text of the user turn",
    ),
    "drops assistant turns": (
        CHATML.replace("messages", "messages if m.role != 'assistant'", 1),
        "drops the text of the assistant turn",
    ),
    "has the last turn only": (CHATML.replace("messages", "messages[-1:]", 1), "drops the text of the user turn"),
    "has the first turn only": (CHATML.replace("messages", "messages[:1]", 1), "drops the text of the"),
    "has the last three turns only": (CHATML.replace("messages", "messages[-3:]", 1), "drops the text of the"),
    "repeats a turn": (CHATML.replace("m.content", "m.content }}{{ m.content"), "repeats 2 times the text of the user"),
    "turns the order round": (CHATML.replace("messages", "messages | reverse", 1), "in another order"),
    "cuts long turns": (CHATML.replace("m.content", "m.content[:2000]"), "turn 1 (user) in full"),
    "shortens turns": (CHATML.replace("m.content", "m.content | truncate(40)"), "turn 1 (user) in full"),
    "writes capitals": (CHATML.replace("m.content", "m.content | upper"), "turn 1 (user) in full"),
    "escapes markup": (CHATML.replace("m.content", "m.content | escape"), "turn 1 (user) in full"),
    "writes json": (CHATML.replace("m.content", "m.content | tojson"), "turn 1 (user) in full"),
    "closes up white space": (CHATML.replace("m.content", "m.content.split() | join(' ')"), "turn 1 (user) in full"),
    "cuts at a brace": (CHATML.replace("m.content", "m.content.split('{')[0]"), "turn 1 (user) in full"),
    "refuses everything": ("{{ raise_exception('not today') }}", "not today"),
    "is no template": ("{% for m in messages %}", "Unexpected end of template"),
    "has several and none by default": ({"tool_use": CHATML}, "default"),
    "has no generation prompt": (
        CHATML.removesuffix(_OPENED),
        "responses would begin with '<|im_start|>assistant\\n'",
    ),
    "has half a generation prompt": (
        CHATML.replace(_OPENED, "{% if add_generation_prompt %}<|im_start|>{% endif %}"),
        "responses would begin with 'assistant\\n'",
    ),
    "has a generation prompt of white space": (
        CHATML.replace(_OPENED, "{% if add_generation_prompt %}{{ '\n' }}{% endif %}"),
        "responses would begin with",
    ),
    "opens a turn of the user": (
        CHATML.replace(_OPENED, "{% if add_generation_prompt %}<|im_start|>user\n{% endif %}"),
        "the generation prompt ends with",
    ),
    "opens in other words": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}Answer: {% endif %}",
        "the generation prompt ends with",
    ),
    "puts nothing between": ("{% for m in messages %}{{ m.content }}{% endfor %}", "writes nothing between"),
}

_CORPUS = [
    "Paris is the capital of France. It is 4. Answer briefly, in one word. " * 4,
    "What is the capital of France? What is 2+2? system user assistant model think final " * 4,
]


@cache
def _trained(metaspace: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    alphabet = [*pre_tokenizers.ByteLevel.alphabet(), "\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return str(tokenizer.to_str())


def tokenizer(template: str | None, *, metaspace: bool = False) -> Any:
    """A small byte-pair tokenizer with every family's special tokens.

    metaspace: whether a word and the preceding space form one token, as in "▁Paris"; otherwise it is byte-level.
    """
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(metaspace)),
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[2:],
    )
    made.chat_template = template
    return made
