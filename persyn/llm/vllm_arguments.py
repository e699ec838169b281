"""The arguments of vLLM's engine that a run file may set, checked by name and type before anything loads.

A run file is data: no argument may make vLLM import, unpickle or run something that it names. Importing vLLM takes many
seconds, so `check` does it in a process of its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from persyn.errors import HostLacks, shorten

#: Arguments that PerSyn sets, and what to set instead.
_OWN = {
    "model": "the teacher's model",
    "tokenizer": "the teacher's model, whose tokenizer is used",
    "revision": "the teacher's revision",
    "tokenizer_revision": "the teacher's revision",
    "code_revision": "the teacher's revision",
    "served_model_name": "the teacher's model",
    "seed": "[run] seed",
    "dtype": "options.dtype",
    "max_model_len": "options.max_model_len",
    "max_num_seqs": "options.max_num_seqs",
    "max_num_batched_tokens": "options.max_num_batched_tokens",
    "gpu_memory_utilization": "options.gpu_memory_utilization",
    "kv_cache_memory_bytes": "options.kv_cache_gib",
    "enforce_eager": "options.enforce_eager",
    "quantization": "options.quantization",
    "tensor_parallel_size": "gpus, which are divided by pipeline_parallel_size",
    "enable_lora": "the teacher's adapter",
    "max_loras": "the teachers' adapters, which are counted",
    "max_cpu_loras": "the teachers' adapters, which are counted",
    "max_lora_rank": "the teachers' adapters, whose rank is read",
    "default_mm_loras": "the teacher's adapter",
}
#: Arguments that are never allowed, and why.
_REFUSED = {
    **dict.fromkeys(
        (
            "distributed_executor_backend",
            "ec_transfer_config",
            "hf_config_path",
            "io_processor_plugin",
            "kv_events_config",
            "kv_transfer_config",
            "logits_processors",
            "model_class_overrides",
            "model_loader_extra_config",
            "reasoning_parser_plugin",
            "scheduler_cls",
            "tokenizer_mode",
            "tool_parser_plugin",
            "trust_remote_code",
            "weight_transfer_config",
            "worker_cls",
            "worker_extension_cls",
        ),
        "it can make vLLM run code that the run file names",
    ),
    **dict.fromkeys(("hf_token",), "a run file is stored; put a token into the environment variable HF_TOKEN"),
    **dict.fromkeys(
        ("allowed_local_media_path", "log_config_file", "otlp_traces_endpoint", "profiler_config"),
        "it gives vLLM access to files or addresses beside the model",
    ),
    **dict.fromkeys(
        (
            "data_parallel_size",
            "data_parallel_size_local",
            "data_parallel_rank",
            "data_parallel_address",
            "decode_context_parallel_size",
            "device_ids",
            "master_addr",
            "master_port",
            "nnodes",
            "node_rank",
            "prefill_context_parallel_size",
        ),
        "a teacher runs on the gpus of one host that its worker assigns to it; for more throughput, start more workers",
    ),
    **dict.fromkeys(
        ("enable_chunked_prefill", "structured_outputs_config", "enable_sleep_mode", "tokens_only"),
        "PerSyn depends on its value",
    ),
    **dict.fromkeys(
        ("runner", "convert", "skip_tokenizer_init", "enable_prompt_embeds", "pooler_config", "watermark_config"),
        "a teacher generates text",
    ),
}
#: Formats that load the weights of the teacher's model from safetensors; others unpickle files, or invent weights.
_LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer", "mistral")
#: Keys within an argument's table that name code, in any version of vLLM.
_NAMES_CODE = re.compile(r"(_|^)(cls|class|qualname|plugin|module|module_path|custom_ops?_path)$|^trust_remote_code$")
#: A module's attribute, as vLLM imports it: "package.module.Class".
_QUALIFIED = re.compile(r"[A-Za-z_]\w*([.:][A-Za-z_]\w*)+")
#: Arguments that change speed or memory, but not what a response is drawn from; all others are part of a teacher's
#: version.
SPEED = frozenset(
    {
        "async_scheduling",
        "block_size",
        "cpu_offload_gb",
        "cpu_offload_params",
        "disable_custom_all_reduce",
        "disable_log_stats",
        "download_dir",
        "enable_expert_parallel",
        "enable_prefix_caching",
        "kv_offloading_backend",
        "kv_offloading_size",
        "load_format",
        "max_num_scheduled_tokens",
        "max_parallel_loading_workers",
        "num_gpu_blocks_override",
        "offload_backend",
        "offload_group_size",
        "offload_num_in_group",
        "offload_params",
        "offload_prefetch_step",
        "pipeline_parallel_size",
        "prefix_caching_hash_algo",
        "safetensors_load_strategy",
        "safetensors_prefetch_block_size",
        "safetensors_prefetch_num_threads",
        "stream_interval",
        "use_tqdm_on_load",
    }
)

_SECONDS = 300.0


def require_allowed(arguments: Mapping[str, Any]) -> None:
    """Raise `ValueError` for an argument that PerSyn sets itself, or that is unsafe or without use for a teacher."""
    for name, value in arguments.items():
        if name in _OWN:
            raise ValueError(f"engine_args.{name} is set by PerSyn: set {_OWN[name]}")
        if name in _REFUSED:
            raise ValueError(f"engine_args.{name} is not allowed: {_REFUSED[name]}")
        if name == "load_format" and value not in _LOAD_FORMATS:
            raise ValueError(f"engine_args.load_format is {value!r}; allowed: {', '.join(_LOAD_FORMATS)}")
        if (flaw := next(_code_in(value), None)) is not None:
            raise ValueError(f"engine_args.{name} is not allowed to name code, and contains {shorten(repr(flaw))}")
    stages = arguments.get("pipeline_parallel_size", 1)
    if not isinstance(stages, int) or isinstance(stages, bool) or stages < 1:
        raise ValueError(f"engine_args.pipeline_parallel_size must be an integer >= 1, got {stages!r}")


def _code_in(value: Any) -> Iterator[str]:
    """The keys and texts in an argument that name code which vLLM would import."""
    match value:
        case dict():
            for key, part in value.items():
                if _NAMES_CODE.search(key):
                    yield key
                yield from _code_in(part)
        case list():
            for part in value:
                yield from _code_in(part)
        case str() if _QUALIFIED.fullmatch(value):
            yield value


def parallel(arguments: Mapping[str, Any], gpus: int) -> tuple[int, int]:
    """The (tensor, pipeline) parallel sizes for a number of GPUs; `ValueError` if it cannot be divided.

    gpus: 0 is the CPU, which is one device.
    """
    stages, devices = arguments.get("pipeline_parallel_size", 1), max(gpus, 1)
    if devices % stages:
        raise ValueError(f"gpus = {gpus} cannot be divided into engine_args.pipeline_parallel_size = {stages} stages")
    return devices // stages, stages


def require_known(arguments: Mapping[str, Any]) -> None:
    """Raise `HostLacks` for arguments that the installed vLLM does not have, or of the wrong type; imports vLLM."""
    if flaw := _flaw(arguments):
        raise HostLacks(flaw)


def check(given: Sequence[Mapping[str, Any]]) -> list[str]:
    """What `require_known` finds wrong with each model's arguments, empty if nothing; vLLM is imported in a child."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(part or os.getcwd() for part in sys.path)}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "persyn.llm.vllm_arguments"],
        env=environment,
        input=json.dumps(given),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=_SECONDS,
    )
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        return [f"vLLM cannot check engine_args: {shorten(last, most=500)}"] * len(given)
    found: list[str] = json.loads(done.stdout.rpartition("\n")[2])
    return found


def is_installed() -> bool:
    """Whether vLLM is installed in this environment."""
    return find_spec("vllm") is not None


def _flaw(arguments: Mapping[str, Any]) -> str:
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
    from vllm.engine.arg_utils import EngineArgs
    from vllm.version import __version__

    # The types of a few fields are texts that cannot be resolved; vLLM checks those itself when it loads.
    kinds = {each.name: Any if isinstance(each.type, str) else each.type for each in dataclasses.fields(EngineArgs)}
    for name, value in arguments.items():
        if name not in kinds or name.startswith("_"):
            return f"engine_args.{name} is unknown to vLLM {__version__}"
        try:
            adapter = TypeAdapter(kinds[name], config=ConfigDict(arbitrary_types_allowed=True))
        except PydanticUserError:  # the type has a configuration of its own
            adapter = TypeAdapter(kinds[name])
        try:
            adapter.validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join([name, *(str(step) for step in first["loc"])])
            return f"engine_args.{place}: {shorten(first['msg'], most=500)}, got {shorten(repr(first['input']))}"
    return ""


if __name__ == "__main__":
    found = [_flaw(each) for each in json.load(sys.stdin)]
    sys.stdout.write("\n" + json.dumps(found))  # after what vLLM itself writes
