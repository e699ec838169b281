"""A row's value does not depend on its batch, for every model family: alone, in batches, and in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from persyn.errors import EngineError
from persyn.llm import fidelity, options, scoring
from persyn.llm.chat import Chat
from persyn.llm.protocols import Generate, Generated, ModelSpec, Sampling
from persyn.llm.scorers.log_likelihood import StudentScorer
from persyn.llm.scorers.padding import TokenRow
from persyn.llm.scorers.reward_model import RewardModel
from persyn.llm.teachers.transformers_engine import TransformersEngine
from persyn.router.model import Reads, RouterModel, all_features
from tests.llm import small_models

pytestmark = [
    # Some modules of model families warn at import or construction.
    pytest.mark.filterwarnings("ignore"),
]

#: Families that are not plain text models, or for which no small model can be built from a few settings.
LEFT_OUT = frozenset(
    {"blt", "cohere_compass_text", "dbrx", "deepseek_v4", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "git"}
    | {"gemma4_assistant", "gemma4_unified", "gemma4_unified_assistant", "got_ocr2", "kimi_linear", "llama4"}
    | {"longcat_flash", "mllama", "musicgen", "musicgen_melody", "phi4_multimodal", "qwen3_5", "qwen3_5_moe"}
    | {"qwen4_exp", "zamba", "zamba2", "zaya"}
)
REFUSED = {
    "bert": "also attends to later tokens",
    "cpmant": "also attends to later tokens",
    "prophetnet": "also attends to later tokens",
    "reformer": "its attention is random",
    "xlnet": "also attends to later tokens",
}
JUDGED = [*sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - LEFT_OUT - {*REFUSED}), "bert", *small_models.VARIANTS]
ROWS = [TokenRow(i, small_models.ids(length, i), length // 3 + 1) for i, length in enumerate((50, 6, 33, 17, 16))]


def load(model: Any, auto_class: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return scoring.load_weights(auto_class, ModelSpec("", str(folder)), options.ScorerOptions())


@torch.inference_mode()
def plainly(double: Any, row: TokenRow) -> float:
    log_probabilities = double(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0].double().log_softmax(-1)
    chosen = log_probabilities[:-1].gather(1, torch.tensor(row.ids)[1:, None])
    return float(chosen[row.start - 1 :].sum())


@pytest.mark.parametrize("family", JUDGED)
def test_a_likelihood_is_that_of_the_row_alone_and_of_float64(family: str, tmp_path: Path) -> None:
    model = small_models.make(family, AutoModelForCausalLM)
    student = StudentScorer(load(model, AutoModelForCausalLM, tmp_path))

    together = [judged.value for judged in student.judge(ROWS)]
    alone = [student.judge([row])[0].value for row in ROWS]

    doubles = small_models.in_float64(model, AutoModelForCausalLM)
    assert together == pytest.approx(alone, abs=1e-3)
    assert alone == pytest.approx([plainly(next(doubles), row) for row in ROWS], abs=1e-3)


@pytest.mark.parametrize("family", REFUSED)
def test_what_has_no_likelihood_of_a_response_is_refused_by_name(family: str, tmp_path: Path) -> None:
    more = {"bert": {"is_decoder": False}, "reformer": {"is_decoder": True, "axial_pos_embds": False}}.get(family, {})
    model = small_models.make(family, AutoModelForCausalLM, **more)

    with pytest.raises(EngineError, match=rf"cannot use a {type(model).__name__}.*{REFUSED[family]}"):
        load(model, AutoModelForCausalLM, tmp_path)


def test_an_encoder_decoder_is_refused_by_name(tmp_path: Path) -> None:
    small_models.config("t5", decoder_start_token_id=0).save_pretrained(tmp_path)

    with pytest.raises(EngineError, match="it is encoder-decoder; a decoder-only model is needed"):
        scoring.load_weights(AutoModelForCausalLM, ModelSpec("", str(tmp_path)), options.ScorerOptions())


#: One per kind of attention, position encoding and head.
CLASSIFIERS = [
    *("bert", "bloom", "gemma3_text", "gpt2", "gpt_oss", "jamba", "llama", "mixtral", "modernbert-decoder", "mpt"),
    *("openai-gpt", "opt", "qwen3", "qwen3_next", "roberta", "xlnet"),
    *sorted({*small_models.VARIANTS} - {"vaultgemma-soft-capped"}),
]


@torch.inference_mode()
def read_plainly(double: Any, row: TokenRow) -> float:
    """The logit at the row's last token."""
    return float(double(input_ids=torch.tensor([row.ids]), **fidelity.without_cache(double)).logits[0, 0])


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_reward_is_that_of_the_row_alone_and_of_float64(family: str, tmp_path: Path) -> None:
    model = small_models.make(family, AutoModelForSequenceClassification, num_labels=1)
    reward_model = RewardModel(load(model, AutoModelForSequenceClassification, tmp_path))

    together = [judged.value for judged in reward_model.judge(ROWS)]
    alone = [reward_model.judge([row])[0].value for row in ROWS]

    doubles = small_models.in_float64(model, AutoModelForSequenceClassification)
    assert together == pytest.approx(alone, abs=1e-3)
    assert alone == pytest.approx([read_plainly(next(doubles), row) for row in ROWS], abs=1e-3)


@pytest.mark.parametrize("reads", ["last", "middle"])
@pytest.mark.parametrize("family", ["bert", "llama", "mamba", *small_models.VARIANTS])
def test_a_router_reads_a_prompt_as_it_does_alone(family: str, reads: Reads, tmp_path: Path) -> None:
    more = {"is_decoder": False} if family == "bert" else {}
    backbone = load(small_models.make(family, AutoModel, **more), AutoModel, tmp_path)
    router = RouterModel(backbone, 2, reads)
    prompts = [row.ids for row in ROWS]

    together = all_features(router, prompts, 10_000, lambda: None)
    alone = torch.cat([all_features(router, [prompt], 10_000, lambda: None) for prompt in prompts])

    assert torch.allclose(together, alone, atol=1e-4)
    assert len({round(float(row[0]), 4) for row in together}) == len(ROWS)


@pytest.mark.parametrize("family", ["bloom", "gpt2", "mamba", "qwen3_next", "rwkv", *small_models.VARIANTS])
def test_a_response_is_that_of_the_prompt_alone(family: str, tmp_path: Path) -> None:
    model = load(small_models.make(family, AutoModelForCausalLM), AutoModelForCausalLM, tmp_path)
    asked = [(12, 4), (5, 9), (13, 3), (4, 4), (18, 20)]
    chat = Chat(small_models.tokenizer())
    requests = [
        Generate(i, [{"role": "user", "content": small_models.text(length)}], Sampling(max_tokens=most), i)
        for i, (length, most) in enumerate(asked)
    ]

    def written(*some: Generate) -> dict[int, str]:
        engine = TransformersEngine(model, chat, batch_size=8, context=None, tick=lambda: None)
        return {r.id: r.text for results in engine.compute(some) for r in results if isinstance(r, Generated)}

    together = written(*requests)

    assert together == {i: text for request in requests for i, text in written(request).items()}
    assert len({*together.values()}) == len(together) >= 4
