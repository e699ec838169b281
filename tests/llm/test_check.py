from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from persyn.llm import check
from persyn.llm.check import judge_bos
from persyn.llm.protocols import Check, Checked, Finding, ModelSpec

PROMPTS = [[{"role": "user", "content": text}] for text in ("Hi!", "What is the capital of Italy?")]


def look(folder: Path, prompts: Any = PROMPTS, max_tokens: int = 64, **options: Any) -> dict[str, Finding]:
    findings = check.check(ModelSpec("transformers", str(folder), options=options), prompts, max_tokens)
    assert len({finding.topic for finding in findings}) == len(findings)
    return {finding.topic: finding for finding in findings}


def test_bos_matters_when_it_moves_the_likelihood_by_a_nat() -> None:
    assert judge_bos(-4.0, -9.8, is_used=False).level == "error"
    assert judge_bos(-4.0, -9.8, is_used=True).level == "ok"
    assert judge_bos(-3.0, -3.5, is_used=False).level == "ok"
    assert judge_bos(-6.0, -3.0, is_used=True).level == "warning"


@pytest.mark.model
def test_a_model_with_a_template_is_in_order_but_for_its_pad_token(smollm2: Path) -> None:
    found = look(smollm2)

    assert {topic: finding.level for topic, finding in found.items()} == {
        "template": "ok",
        "padding": "warning",
        "dtype": "ok",
        "vocabulary": "ok",
        "logits": "ok",
        "bos": "ok",
        "context": "ok",
    }
    assert "'<|im_end|>' also ends a response" in found["padding"].message
    assert "bfloat16 and run as float32" in found["dtype"].message


@pytest.mark.model
def test_a_base_model_without_its_bos_is_an_error(gemma: Path) -> None:
    without, right = look(gemma, add_bos=False), look(gemma)

    assert without["bos"].level == "error"
    assert "set add_bos = true" in without["bos"].message
    assert (right["bos"].level, right["template"].level, right["padding"].level) == ("ok", "warning", "ok")


@pytest.mark.model
def test_prompts_that_do_not_fit_are_counted(smollm2: Path) -> None:
    mixed = [*PROMPTS, [{"role": "user", "content": "sea " * 300}], [{"role": "user"}]]

    some = look(smollm2, mixed, max_model_len=256)["context"]
    none = look(smollm2, mixed[2:], max_model_len=256)["context"]
    cut = look(smollm2, PROMPTS, max_tokens=250, max_model_len=256)["context"]

    assert some.level == "warning"
    assert some.message.startswith("2 of 4 prompts cannot be answered; the first: too_long: ")
    assert none.level == "error"
    assert cut.level == "warning"
    assert cut.message.startswith("2 of 2 prompts leave fewer than 250 tokens")


@pytest.mark.model
def test_weights_that_are_no_numbers_and_a_lossy_dtype_are_seen(smollm2: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(smollm2, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], torch.nan)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})

    found = look(broken, dtype="float16")

    assert found["logits"].level == "error"
    assert found["dtype"].level == "warning"
    assert "bfloat16 and run as float16" in found["dtype"].message


def test_what_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    (finding,) = check.check(ModelSpec("vllm", str(tmp_path)), PROMPTS, 64)

    (unknown,) = check.check(ModelSpec("vllm", str(tmp_path), options={"max_len": 5}), PROMPTS, 64)

    assert (finding.level, finding.topic) == ("error", "load")
    assert "max_len" in unknown.message


def test_of_a_server_only_what_needs_no_request_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_at(**options: Any) -> Finding:
        finding, *_ = check.check(ModelSpec("openai", "big", options=options), PROMPTS, 64)
        return finding

    monkeypatch.setenv("TEACHER_KEY", "sk-secret")

    fine = look_at(base_url="http://127.0.0.1:1/v1", api_key_env="TEACHER_KEY")

    assert fine.level == "ok"
    assert "http://127.0.0.1:1/v1/chat/completions" in fine.message
    assert "sk-secret" not in fine.message
    assert look_at(base_url="http://127.0.0.1:1/v1", api_key_env="PERSYN_NO_SUCH_KEY").level == "error"
    assert look_at(base_url="127.0.0.1/v1").level == "error"
    assert look_at(base_url="http://me:pw@127.0.0.1/v1").level == "error"
    monkeypatch.setenv("TEACHER_KEY", "sk-secret\nsk-other")
    broken = look_at(base_url="http://127.0.0.1:1/v1", api_key_env="TEACHER_KEY")
    assert broken.level == "error"
    assert "line break" in broken.message


def test_a_check_is_asked_for_like_any_other_request() -> None:
    engine = check.load(ModelSpec("check", ""), lambda: None)
    teacher = ModelSpec("openai", "big", options={"base_url": "http://127.0.0.1:1/v1"})

    engine.submit([Check(7, teacher, PROMPTS, 64)])
    (result,) = engine.step()

    assert isinstance(result, Checked)
    assert (result.id, [finding.level for finding in result.findings], engine.pending) == (7, ["ok", "ok"], 0)
