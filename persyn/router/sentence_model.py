"""A sentence-embedding model in the layout of sentence-transformers: a text in, a vector out.

modules.json               the modules, in their order: a transformer, a pooling, possibly a normalisation
sentence_bert_config.json  the transformer's maximum number of tokens
1_Pooling/config.json      how the states of the tokens become one vector

transformers computes the states; a module of another kind is refused by its name, because leaving it out would give
other vectors. Weights are read from safetensors only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct
from torch import Tensor
from torch.nn import functional

from persyn.errors import HostLacks
from persyn.llm import lean, loading
from persyn.llm.protocols import ModelSpec, Tick
from persyn.router.model import batches

#: The files that are read; pickled weights are not.
_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
#: The ways to make one vector of the states, by the name in a pooling's configuration.
_POOLINGS = ("mean", "cls", "max", "lasttoken")
_OLD_NAMES = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max"}
#: Tokens of a text that are read if the model sets no bound.
_MAX_TOKENS = 512
#: Texts times longest text of a batch.
_BATCH_TOKENS = 8_192


class _Module(Struct):
    path: str
    type: str

    @property
    def kind(self) -> str:
        return self.type.rpartition(".")[2]


class _Sizes(Struct):
    """sentence_bert_config.json."""

    max_seq_length: int | None = None
    do_lower_case: bool = False


class _Prompting(Struct):
    """config_sentence_transformers.json."""

    prompts: dict[str, str] = {}
    default_prompt_name: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SentenceModel:
    """pooling: see `_POOLINGS`. prefix: the prompt that the model expects before each text."""

    transformer: Any
    tokenizer: Any
    max_tokens: int
    pooling: str
    normalise: bool
    lower: bool
    prefix: str

    def vectors(self, texts: Sequence[str], tick: Tick) -> Tensor:
        """(P, H) float32 embeddings of P texts, on the CPU; a text that is too long loses its end.

        tick: called after each batch.
        """
        found = torch.empty(len(texts), self.transformer.config.get_text_config().hidden_size)
        ids = [self._ids(text) for text in texts]
        for batch in batches(ids, _BATCH_TOKENS):
            found[batch] = self._pooled([ids[i] for i in batch]).float().cpu()
            tick()
        return found

    def _ids(self, text: str) -> list[int]:
        given = self.prefix + (text.lower() if self.lower else text)
        ids: list[int] = self.tokenizer(given, truncation=True, max_length=self.max_tokens)["input_ids"]
        # An empty text may have no token at all.
        return ids or [self.tokenizer.pad_token_id or 0]

    @torch.inference_mode()
    def _pooled(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """(B, H)."""
        device = self.transformer.device
        lengths = torch.tensor([len(each) for each in ids], device=device)
        # Positions of some models depend on which tokens are padding, so it must be the tokenizer's.
        padding = self.tokenizer.pad_token_id or 0
        input_ids = torch.full((len(ids), int(lengths.max())), padding, device=device)
        for row, each in enumerate(ids):
            input_ids[row, : len(each)] = torch.tensor(each, device=device)
        mask = (torch.arange(input_ids.shape[1], device=device) < lengths[:, None]).long()
        states = self.transformer(input_ids=input_ids, attention_mask=mask).last_hidden_state.float()
        vectors = _pool(states, mask[:, :, None] > 0, lengths, self.pooling)
        return functional.normalize(vectors, dim=1) if self.normalise else vectors


def load(spec: ModelSpec) -> SentenceModel:
    """Load a folder or a hub id; `EngineError` when it cannot be loaded, or not without leaving a module out."""
    lean.import_transformers()
    from transformers import AutoModel, AutoTokenizer

    loading.require_gpus(spec)
    try:
        folder = _folder(spec)
        modules = _modules(folder)
        place = folder / modules[0].path
        sizes = _read(place / "sentence_bert_config.json", _Sizes)
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        transformer, info = AutoModel.from_pretrained(
            place,
            dtype="float32",
            device_map="cuda" if spec.gpus else None,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        pooling = _pooling(folder / modules[1].path)
        prefix = _prefix(folder)
    except (OSError, ValueError, RuntimeError, KeyError, msgspec.MsgspecError) as error:
        raise loading.explain(spec, error) from error
    _require_weights(spec, info["missing_keys"])
    length = sizes.max_seq_length or _context(transformer, tokenizer)
    is_normalised = len(modules) == 3
    return SentenceModel(transformer.eval(), tokenizer, length, pooling, is_normalised, sizes.do_lower_case, prefix)


def _folder(spec: ModelSpec) -> Path:
    if Path(spec.model).is_dir():
        return Path(spec.model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(spec.model, revision=spec.revision, allow_patterns=list(_FILES)))


def _modules(folder: Path) -> list[_Module]:
    """The two or three modules; `HostLacks` for others."""
    file = folder / "modules.json"
    if not file.is_file():
        raise HostLacks(f"{str(folder)!r} has no modules.json: it is not a sentence-embedding model")
    modules = msgspec.json.decode(file.read_bytes(), type=list[_Module])
    kinds = [module.kind for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise HostLacks(
            f"{str(folder)!r} consists of {', '.join(kinds) or 'no modules'}; PerSyn can compute a Transformer, "
            "a Pooling and possibly a Normalize: choose another embedding"
        )
    root = folder.resolve()
    if any(not (folder / module.path).resolve().is_relative_to(root) for module in modules):
        raise HostLacks(f"{str(file)!r} names a folder outside of the model's")
    return modules


def _pooling(folder: Path) -> str:
    """The one way of pooling; `HostLacks` for several or another."""
    config: dict[str, Any] = msgspec.json.decode((folder / "config.json").read_bytes(), type=dict[str, Any])
    prefix = "pooling_mode_"
    named = [name.removeprefix(prefix) for name, is_on in config.items() if name.startswith(prefix) and is_on is True]
    modes = [_OLD_NAMES.get(name, name) for name in named]
    given = config.get("pooling_mode", [])
    modes += [given] if isinstance(given, str) else given
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise HostLacks(
            f"{str(folder)!r} pools by {', '.join(modes) or 'nothing'}; expected one of {', '.join(_POOLINGS)}"
        )
    if config.get("include_prompt") is False:
        raise HostLacks(f"{str(folder)!r} leaves the model's own prompt out of the pooling, which is not supported")
    return modes[0]


def _prefix(folder: Path) -> str:
    found = _read(folder / "config_sentence_transformers.json", _Prompting)
    return found.prompts[found.default_prompt_name] if found.default_prompt_name else ""


def _read(file: Path, kind: Any) -> Any:
    """A JSON file as a struct; the defaults if there is none."""
    return msgspec.json.decode(file.read_bytes(), type=kind) if file.is_file() else kind()


def _require_weights(spec: ModelSpec, missing: Sequence[str]) -> None:
    """Raise `HostLacks` when states would be noise; BERT's own pooler is not used."""
    absent = sorted(name for name in missing if not name.startswith("pooler."))
    if absent:
        raise HostLacks(f"{spec.model!r} has no weights for {', '.join(absent[:5])}: its vectors would be noise")


def _context(transformer: Any, tokenizer: Any) -> int:
    bound = getattr(transformer.config.get_text_config(), "max_position_embeddings", None)
    return int(min(_MAX_TOKENS, tokenizer.model_max_length, bound or _MAX_TOKENS))


def _pool(states: Tensor, is_text: Tensor, lengths: Tensor, how: str) -> Tensor:
    """(B, H) of the states (B, L, H) of B texts; is_text: (B, L, 1)."""
    if how == "cls":
        return states[:, 0]
    if how == "lasttoken":
        return states[torch.arange(len(states), device=states.device), lengths - 1]
    if how == "max":
        return states.masked_fill(~is_text, -torch.inf).amax(dim=1)
    return states.masked_fill(~is_text, 0.0).sum(dim=1) / lengths[:, None]
