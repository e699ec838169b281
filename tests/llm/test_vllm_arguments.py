"""Arguments of vLLM's engine in a run file."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from persyn.config import TeacherTable
from persyn.errors import PermanentError
from persyn.ingest import versions
from persyn.llm import vllm_arguments
from persyn.llm.identity import Identity
from persyn.llm.options import VllmOptions
from persyn.llm.protocols import ModelSpec
from persyn.llm.teachers import vllm_engine
from persyn.runs import run_file
from persyn.runs.checks import host


def refusal(**arguments: Any) -> str:
    with pytest.raises(msgspec.ValidationError) as refused:
        msgspec.convert({"engine_args": arguments}, VllmOptions)
    return str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"trust_remote_code": True}, "engine_args.trust_remote_code is not allowed: it can make vLLM run code"),
        ({"logits_processors": ["mine.Processor"]}, "engine_args.logits_processors is not allowed: it can make"),
        ({"worker_cls": "auto"}, "engine_args.worker_cls is not allowed: it can make vLLM run code"),
        ({"load_format": "pt"}, "engine_args.load_format is 'pt'; allowed: auto, hf, safetensors"),
        ({"load_format": "dummy"}, "engine_args.load_format is 'dummy'"),
        # vLLM imports a dotted model as the class of a proposer, and a dotted backend as a compiler.
        ({"speculative_config": {"model": "mine.Proposer"}}, "is not allowed to name code, and contains 'mine.Prop"),
        ({"compilation_config": {"backend": "mine.compile"}}, "is not allowed to name code, and contains 'mine.comp"),
        ({"additional_config": {"a": [{"worker_cls": "x"}]}}, "is not allowed to name code, and contains 'worker_cls'"),
        (
            {"hf_overrides": {"trust_remote_code": True}},
            "is not allowed to name code, and contains 'trust_remote_code'",
        ),
        ({"hf_overrides": {"api_key": "sk-1"}}, "engine_args contains 'api_key', which may be a secret"),
        ({"max_model_len": 512}, "engine_args.max_model_len is set by PerSyn: set options.max_model_len"),
        ({"tensor_parallel_size": 2}, "engine_args.tensor_parallel_size is set by PerSyn: set gpus"),
        ({"pipeline_parallel_size": 0}, "engine_args.pipeline_parallel_size must be an integer >= 1, got 0"),
        ({"data_parallel_size": 2}, "engine_args.data_parallel_size is not allowed: a teacher runs on the gpus of one"),
    ],
)
def test_what_names_code_or_has_an_option_of_its_own_is_refused(arguments: dict[str, Any], said: str) -> None:
    assert said in refusal(**arguments)


def test_names_of_models_and_addresses_are_no_code() -> None:
    vllm_arguments.require_allowed(
        {
            "speculative_config": {"model": "org/draft-1.5B", "method": "eagle", "num_speculative_tokens": 3},
            "kv_cache_dtype": "fp8_e5m2",
            "hf_overrides": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        }
    )


def test_gpus_are_divided_among_the_stages_of_a_pipeline() -> None:
    assert vllm_arguments.parallel({}, 4) == (4, 1)
    assert vllm_arguments.parallel({"pipeline_parallel_size": 2}, 4) == (2, 2)
    assert vllm_arguments.parallel({}, 0) == (1, 1)
    spec = ModelSpec("vllm", "m", gpus=3, options={"engine_args": {"pipeline_parallel_size": 2}})
    with pytest.raises(
        PermanentError, match=r"gpus = 3 cannot be divided into engine_args\.pipeline_parallel_size = 2"
    ):
        vllm_engine.load(spec, lambda: None)


def test_arguments_that_only_affect_speed_make_no_other_teacher() -> None:
    def key(**arguments: Any) -> dict[str, Any]:
        table = TeacherTable(name="ada", model="m", options={"engine_args": arguments})
        return versions.teacher_identity(table, {("m", None): Identity("commit", None)})

    assert key(kv_cache_dtype="fp8", block_size=32) == key(kv_cache_dtype="fp8", enable_prefix_caching=False)
    assert key(kv_cache_dtype="fp8") != key(kv_cache_dtype="auto")


@pytest.mark.vllm
def test_unknown_arguments_and_wrong_types_are_found_before_anything_loads() -> None:
    pytest.importorskip("vllm")
    good = {"enable_prefix_caching": True, "cpu_offload_gb": 3, "speculative_config": {"method": "ngram"}}
    given = [
        good,
        {"block_sise": 16},
        {"block_size": "16"},
        {"kv_cache_dtype": "fp9"},
        {"compilation_config": {"depth": 3}},
        {"pipeline_parallel_size": 2},
    ]
    fake = {"model": "m", "engine": "fake"}
    config = run_file.parse(
        {
            "run": {"name": "test", "setting": "math"},
            "prompts": {"source": "p.jsonl"},
            "student": {"name": "s", **fake},
            "quality": {"kind": "fake"},
            "router": {"engine": "fake"},
            "teachers": [
                {"name": f"t{n}", "model": "m", "engine": "vllm", "gpus": 0, "options": {"engine_args": arguments}}
                for n, arguments in enumerate(given)
            ],
        }
    )

    found = {whose: finding.message for whose, finding in host.check(config) if finding.topic == "engine_args"}

    assert list(found) == ["teacher t5", "teacher t1", "teacher t2", "teacher t3", "teacher t4"]
    assert found["teacher t1"].startswith("engine_args.block_sise is unknown to vLLM ")
    assert found["teacher t2"] == "engine_args.block_size: Input should be a valid integer, got '16'"
    assert found["teacher t3"].startswith("engine_args.kv_cache_dtype: Input should be 'auto', ")
    assert found["teacher t4"].startswith("engine_args.compilation_config.depth: Unexpected keyword argument")
    assert found["teacher t5"] == "gpus = 0 cannot be divided into engine_args.pipeline_parallel_size = 2 stages"
