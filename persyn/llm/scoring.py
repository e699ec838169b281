"""Load weights and determine limits, for all scorers that are models.

transformers is imported when a model is loaded: a router that reads texts alone does without.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from persyn.errors import PermanentError
from persyn.llm import lean, loading, options
from persyn.llm.protocols import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: Rows taken at once and sorted by length; enough for batches of nearly equal length.
CHUNK = 256

VERSION = f"transformers {version('transformers')}"


def batch_tokens(spec: ModelSpec, chosen: options.ScorerOptions) -> int:
    """Maximum number of tokens in a batch: the option, or the device's default."""
    if chosen.batch_tokens is not None:
        return chosen.batch_tokens
    return 16_384 if spec.gpus else 2_048


def max_tokens(config: PreTrainedConfig) -> int | None:
    """The model's context length; None when its configuration sets no bound."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_weights(auto_class: Any, spec: ModelSpec, chosen: options.ScorerOptions) -> PreTrainedModel:
    """Load a model in evaluation mode, every weight from its checkpoint; `EngineError` when that fails.

    auto_class: an `AutoModel...` class; with `AutoModelForCausalLM`, the model must be causal.
    """
    lean.import_transformers()
    from transformers import AutoModelForCausalLM

    from persyn.llm import fidelity

    loading.require_gpus(spec)
    if configuration(spec).is_encoder_decoder:
        raise PermanentError(f"cannot use {spec.model!r}: it is encoder-decoder; a decoder-only model is needed")
    try:
        model, info = auto_class.from_pretrained(
            spec.model,
            revision=spec.revision,
            dtype=chosen.dtype or ("auto" if spec.gpus else "float32"),
            device_map=_device_map(spec.gpus),
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise loading.explain(spec, error) from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"]))
        raise PermanentError(
            f"{spec.model!r} has no weights for {missing}; as a {type(model).__name__} its output would be noise"
        )
    weights: PreTrainedModel = model.eval()
    fidelity.choose_attention(weights)
    if auto_class is AutoModelForCausalLM:
        fidelity.require_causal(weights)
    return weights


def configuration(spec: ModelSpec) -> PreTrainedConfig:
    """Load a model's configuration without its weights; `EngineError` when it has none."""
    lean.import_transformers()
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            spec.model, revision=spec.revision, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise loading.explain(spec, error, "no configuration for") from error
    return config


def stored_dtype(config: PreTrainedConfig) -> str | None:
    """The dtype in which a model's weights are stored; None if its configuration does not say."""
    dtype = config.get_text_config().dtype
    return None if dtype is None else str(dtype).removeprefix("torch.")


def describe(model: PreTrainedModel) -> dict[str, str]:
    """How the model computes, for the detail of its scores."""
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": str(model.config.get_text_config()._attn_implementation),
    }


def _device_map(gpus: int) -> str | torch.device:
    if gpus > 1:
        return "auto"
    return torch.device("cuda", 0) if gpus else torch.device("cpu")
