"""Create small random models of every causal language model family in transformers, large enough to differ."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedTokenizerFast

VOCABULARY = 99

#: Sizes, by all the names that families use for them.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "embedding_size", "intermediate_size", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(("ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff", "emb_dim"), 32),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers"), 2
    ),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "first_k_dense_replace", "n_group", "topk_group"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_key_value_heads", "num_experts_per_tok", "moe_k", "linear_num_key_heads", "index_n_heads"), 2
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "state_size"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "index_topk"), 64),
    **dict.fromkeys(("sliding_window", "index_head_dim"), 16),
    **dict.fromkeys(("initializer_range", "init_std"), 0.3),
    "linear_num_value_heads": 4,
    "n_shared_experts": 1,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_DECODER = {"is_decoder": True}
_LATENT = {"num_key_value_heads": 4}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2, "mamba_n_groups": 1}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 16,
}
_DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
_PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}

#: Other settings that a family needs to be small, or to be a decoder.
_MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), _LATENT),
    **dict.fromkeys(("glm_moe_dsa", "minicpm3", "youtu"), _LATENT),
    **dict.fromkeys(
        ("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie"), _DECODER
    ),
    **dict.fromkeys(("megatron-bert", "roberta", "roberta-prelayernorm", "roformer", "xlm-roberta"), _DECODER),
    "xlm-roberta-xl": _DECODER,
    "xmod": {**_DECODER, "languages": ["en_XX"], "default_language": "en_XX"},
    "rembert": {**_DECODER, "input_embedding_size": 32, "output_embedding_size": 32},
    "roc_bert": {
        **_DECODER,
        "pronunciation_vocab_size": 9,
        "shape_vocab_size": 9,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1, "chunk_size": 8},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [32] * 4,
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 16,
    },
    "xlm": {"causal": True},
}

#: Families with a feature that a kernel may ignore, or that may depend on the whole batch.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2-soft-capped": ("gemma2", {"attn_logit_softcapping": 1.0}),
    "vaultgemma-soft-capped": ("vaultgemma", {"attn_logit_softcapping": 1.0}),
    "phi3-long": ("phi3", {"original_max_position_embeddings": 16, "rope_parameters": _LONG}),
    "llama-long": ("llama", {"rope_parameters": {**_LONG, "factor": 4.0}}),
    "phimoe-long": ("phimoe", {"rope_parameters": {**_LONG, "short_mscale": 1.1, "long_mscale": 1.4}}),
    "llama-dynamic": ("llama", {"max_position_embeddings": 16, "rope_parameters": _DYNAMIC}),
    "qwen2-dynamic": ("qwen2", {"max_position_embeddings": 16, "rope_parameters": _DYNAMIC}),
    "gemma3-dynamic-in-some-layers": (
        "gemma3_text",
        {
            "max_position_embeddings": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"full_attention": _DYNAMIC, "sliding_attention": _PLAIN},
        },
    ),
    "falcon-alibi": ("falcon", {"alibi": True}),
    "mistral-sliding": ("mistral", {"sliding_window": 8}),
}


def config(family: str, **more: Any) -> PreTrainedConfig:
    """A configuration of a family or of one of `VARIANTS`, with a few thousand weights."""
    kind, variant = VARIANTS.get(family, (family, {}))
    plain = CONFIG_MAPPING[kind]()
    known = {*plain.to_dict(), *plain.attribute_map}
    sizes = {name: value for name, value in _SIZES.items() if name in known}
    if "qk_rope_head_dim" in known:
        sizes.pop("head_dim", None)
    made: PreTrainedConfig = type(plain)(**{**sizes, **_MORE.get(kind, {}), **variant, **more})
    return made


def make(family: str, auto_class: Any, **more: Any) -> Any:
    """A random model of the family."""
    torch.manual_seed(0)
    return auto_class.from_config(config(family, **more)).eval()


def in_float64(model: Any, auto_class: Any) -> Iterator[Any]:
    """The same weights in float64, computed by the reference implementation.

    Yields without end, a new model each time where a model keeps state of the previous row.
    """
    # Falcon's eager attention adds ALiBi twice; XGLM and XLNet do not support float64.
    attention = "sdpa" if model.config.model_type == "falcon" else "eager"
    dtype = torch.float32 if model.config.model_type in ("xglm", "xlnet") else torch.float64
    double = auto_class.from_config(model.config, attn_implementation=attention, dtype=dtype).eval()
    double.load_state_dict(model.state_dict())
    double.set_experts_implementation("eager")
    while True:
        yield copy.deepcopy(double)


def ids(length: int, seed: int = 0) -> list[int]:
    """Random token ids without special tokens."""
    drawn = torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))
    return [int(token) for token in drawn]


def text(length: int) -> str:
    """Words for `tokenizer`."""
    return " ".join(f"w{token}" for token in ids(length))


def tokenizer() -> Any:
    """A tokenizer with one token per word; the third token ends a turn."""
    words = Tokenizer(WordLevel({f"w{token}": token for token in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")
    made.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}w2{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}w1 {% endif %}"
    )
    return made
