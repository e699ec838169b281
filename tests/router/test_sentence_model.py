"""Sentence-embedding models: the vectors are those that the layout describes, and what is not known is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from persyn.errors import EngineError, HostLacks
from persyn.llm.protocols import ModelSpec
from persyn.router import sentence_model
from persyn.router.kinds.base import quietly

TEXTS = ["add two and three", "write", "a poem about two roses and a rose and more roses"]
MODULES = ["Transformer", "Pooling", "Normalize"]
Make = Callable[..., ModelSpec]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer BERT with random weights and the words of `TEXTS`."""
    folder = tmp_path_factory.mktemp("bert")
    words = sorted({word for text in TEXTS for word in text.split()})
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "query", ":", *words]))
    BertTokenizer(str(vocabulary)).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def make(bert: Path, tmp_path: Path) -> Make:
    """Write a model folder around the BERT."""

    def written(
        *, modules: list[str] = MODULES, pooling: dict[str, Any] | None = None, sizes: Any = None, more: Any = None
    ) -> ModelSpec:
        for file in bert.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "1_Pooling").mkdir()
        pooling = {"pooling_mode_mean_tokens": True} if pooling is None else pooling
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **pooling}))
        paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
        listed = [{"path": paths.get(name, name), "type": f"sentence_transformers.models.{name}"} for name in modules]
        (tmp_path / "modules.json").write_text(json.dumps(listed))
        (tmp_path / "sentence_bert_config.json").write_text(json.dumps(sizes or {}))
        (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(more or {}))
        return ModelSpec("router_fit", str(tmp_path))

    return written


def states(folder: Path, text: str, **tokenizing: Any) -> Tensor:
    """(L, H) states of one text by itself."""
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", **tokenizing)
    with torch.inference_mode():
        found: Tensor = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state[0]
    return found


@pytest.mark.parametrize(
    ("mode", "pooled"),
    [
        ({"pooling_mode_mean_tokens": True}, lambda states: states.mean(dim=0)),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, lambda states: states[0]),
        ({"pooling_mode_max_tokens": True}, lambda states: states.amax(dim=0)),
        ({"pooling_mode_lasttoken": True}, lambda states: states[-1]),
        ({"pooling_mode": "mean"}, lambda states: states.mean(dim=0)),
    ],
)
def test_a_vector_is_pooled_from_the_states_of_the_text_alone(
    make: Make, bert: Path, mode: dict[str, Any], pooled: Callable[[Tensor], Tensor]
) -> None:
    found = sentence_model.load(make(modules=MODULES[:2], pooling=mode)).vectors(TEXTS, quietly)
    expected = torch.stack([pooled(states(bert, text)) for text in TEXTS])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_normalised_vector_has_length_1(make: Make, bert: Path) -> None:
    found = sentence_model.load(make()).vectors(TEXTS, quietly)
    mean = states(bert, TEXTS[0]).mean(dim=0)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(found[0], mean / mean.norm(), rtol=1e-5, atol=1e-5)


def test_a_long_text_loses_its_end(make: Make, bert: Path) -> None:
    model = sentence_model.load(make(modules=MODULES[:2], sizes={"max_seq_length": 5}))
    mean = states(bert, TEXTS[2], truncation=True, max_length=5).mean(dim=0)
    torch.testing.assert_close(model.vectors(TEXTS, quietly)[2], mean, rtol=1e-5, atol=1e-5)


def test_the_models_own_prompt_precedes_the_text(make: Make, bert: Path) -> None:
    more = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    found = sentence_model.load(make(modules=MODULES[:2], more=more)).vectors(["write"], quietly)
    torch.testing.assert_close(found[0], states(bert, "query: write").mean(dim=0), rtol=1e-5, atol=1e-5)


def test_an_empty_text_has_a_vector(make: Make) -> None:
    assert sentence_model.load(make()).vectors([""], quietly).isfinite().all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"modules": ["Transformer", "Pooling", "Dense"]}, "consists of Transformer, Pooling, Dense"),
        ({"modules": ["Transformer"]}, "consists of Transformer;"),
        ({"pooling": {"pooling_mode_weightedmean_tokens": True}}, "pools by weightedmean_tokens"),
        ({"pooling": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}}, "pools by mean, cls"),
        ({"pooling": {}}, "pools by nothing"),
        ({"pooling": {"pooling_mode_mean_tokens": True, "include_prompt": False}}, "leaves the model's own prompt out"),
    ],
)
def test_what_would_give_other_vectors_is_refused_by_name(make: Make, change: dict[str, Any], said: str) -> None:
    with pytest.raises(HostLacks, match=said):
        sentence_model.load(make(**change))


def test_pickled_weights_are_not_loaded(make: Make) -> None:
    spec = make()
    weights = Path(spec.model) / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(EngineError, match="safetensors"):
        sentence_model.load(spec)


def test_a_folder_outside_of_the_models_is_not_read(make: Make) -> None:
    spec = make()
    file = Path(spec.model) / "modules.json"
    file.write_text(file.read_text().replace('"1_Pooling"', '"../elsewhere"'))
    with pytest.raises(HostLacks, match="outside of the model's"):
        sentence_model.load(spec)


def test_a_folder_that_is_no_sentence_embedding_model_is_refused(bert: Path) -> None:
    with pytest.raises(HostLacks, match=r"no modules\.json"):
        sentence_model.load(ModelSpec("router_fit", str(bert)))
