"""LoRA adapters: which fit a model, how they are identified, and how they share one loaded model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sqlalchemy import select
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from persyn.config import load_config
from persyn.db import lookup
from persyn.db.catalog import Run
from persyn.db.connect import Database
from persyn.db.work import Job
from persyn.errors import PermanentError, UsageError
from persyn.llm import adapters
from persyn.llm.identity import identify_adapter
from persyn.llm.protocols import Engine, Generate, Generated, ModelSpec, Result, Sampling
from persyn.llm.teachers import transformers_engine
from persyn.runs import pipeline, run_file
from persyn.stages import answers, calibrate
from persyn.stages.batch import queue_name
from tests.llm import lora
from tests.run_files import write_run

pytestmark = pytest.mark.model

HOW = Sampling(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def first(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lora.make(tiny, tmp_path_factory.mktemp("first"), seed=1, rank=4)


@pytest.fixture(scope="module")
def second(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lora.make(tiny, tmp_path_factory.mktemp("second"), seed=2)


def texts(engine: Engine, *wanted: Path | None) -> list[str]:
    """What each adapter writes, all asked for at once."""
    turn = [{"role": "user", "content": "Name a colour."}]
    engine.submit(
        [
            Generate(n, turn, HOW, 0, adapter=None if adapter is None else str(adapter))
            for n, adapter in enumerate(wanted)
        ]
    )
    results: list[Result] = []
    while engine.pending:
        results += engine.step()
    found = {result.id: result.text if isinstance(result, Generated) else "nothing" for result in results}
    return [found[n] for n in range(len(wanted))]


def test_adapters_on_one_model_write_what_peft_writes_with_each(tiny: Path, first: Path, second: Path) -> None:
    import peft

    spec = ModelSpec("transformers", str(tiny), adapters=[str(first), str(second)])
    together = texts(transformers_engine.load(spec, lambda: None), first, None, second, first)

    alone = texts(transformers_engine.load(ModelSpec("transformers", str(tiny)), lambda: None), None)
    merged = []
    for adapter in (first, second):
        base: Any = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        folder = adapter.parent / f"{adapter.name} merged"
        shutil.copytree(tiny, folder)
        peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)
        merged += texts(transformers_engine.load(ModelSpec("transformers", str(folder)), lambda: None), None)
    assert together == [merged[0], alone[0], merged[1], merged[0]]
    assert len({*together}) == 3


def refusal(tiny: Path, adapter: Path) -> str:
    with pytest.raises(PermanentError) as refused:
        adapters.find(ModelSpec("vllm", str(tiny), adapters=[str(adapter)]))
    return str(refused.value)


def test_an_adapter_of_a_model_of_another_form_is_refused(tiny: Path, tmp_path: Path) -> None:
    for name, changed in (("wide", {"hidden_size": 64}), ("deep", {"num_hidden_layers": 3})):
        config = LlamaConfig(**{**LlamaConfig.from_pretrained(tiny).to_dict(), "head_dim": None, **changed})
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        lora.make(tmp_path / name, tmp_path / f"{name} adapter")

    width = refusal(tiny, tmp_path / "wide adapter")
    assert "its weights for model.layers.0.self_attn.q_proj are for a width of 64; the model's have 32 x 32" in width
    depth = refusal(tiny, tmp_path / "deep adapter")
    assert "it has weights for model.layers.2.self_attn.q_proj, which the model does not have" in depth


def test_what_is_no_lora_with_safetensors_is_refused(tiny: Path, first: Path, tmp_path: Path) -> None:
    pickled, other = (Path(shutil.copytree(first, tmp_path / name)) for name in ("pickled", "other"))
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**settings, "peft_type": "IA3"}))

    with pytest.raises(UsageError, match=r"has no adapter_model.safetensors: save it as safetensors; pickled weights"):
        identify_adapter(str(pickled))
    assert "is of type IA3; only LORA can be used" in refusal(tiny, other)


def test_an_adapter_is_its_content_wherever_it_is(first: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(first, tmp_path / "copy"))
    assert identify_adapter(str(copy)) == identify_adapter(str(first))

    weights = load_file(copy / "adapter_model.safetensors")
    save_file({name: weight * 2 for name, weight in weights.items()}, copy / "adapter_model.safetensors")

    assert identify_adapter(str(copy)) != identify_adapter(str(first))


def test_only_some_engines_take_adapters(tmp_path: Path, first: Path) -> None:
    file = write_run(tmp_path)
    served = 'name = "dot"\nmodel = "m"\nengine = "openai"\noptions = { base_url = "http://localhost:1/v1" }'
    file.write_text(f'{file.read_text()}[[teachers]]\n{served}\nadapter = "{first}"\n')

    with pytest.raises(
        UsageError, match="teacher dot: the engine openai takes no adapter; engines that do: vllm, trans"
    ):
        run_file.read(file)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_teachers_with_adapters_of_one_model_share_it(
    database: Database, tmp_path: Path, first: Path, second: Path
) -> None:
    file = write_run(tmp_path, prompts=12, calibration=12, strategy="persyn", teachers=("ada", "bob", "cyd"))
    given = file.read_text()
    for name, adapter in (("bob", first), ("cyd", second)):
        given = given.replace(
            f'name = "{name}"\nmodel = "{name}"\n', f'name = "{name}"\nmodel = "ada"\nadapter = "{adapter}"\n'
        )
    file.write_text(given)
    with database.write() as session:
        pipeline.start_run(session, run_file.read(file), actor="me")

    with database.read() as session:
        run = session.scalars(select(Run)).one()
        ada, bob, cyd = lookup.teachers(session, run.id)
        spec, *others = answers.specs_of([ada, bob, cyd], load_config(run.config).teachers)
        assert others == [spec, spec]
        assert spec.adapters == sorted([str(first), str(second)])
        assert (ada.adapter_revision, bob.adapter_revision) == (None, identify_adapter(str(first)).revision)
        for job in session.scalars(select(Job)):
            assert job.queue == queue_name(spec)
            asked = {request.adapter for request in calibrate.STAGE.load(session, job).requests}
            assert asked == {{ada.id: None, bob.id: str(first), cyd.id: str(second)}[job.teacher_id]}
