"""Teachers on vLLM, with continuous batching: each response is returned as soon as it is finished."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import msgspec

from persyn.errors import EngineError, PermanentError, shorten
from persyn.llm import adapters, loading, options, template_check, tools, vllm_arguments
from persyn.llm.adapters import Adapter
from persyn.llm.chat import Chat, load_tokenizer
from persyn.llm.protocols import Engine, Failed, Generate, ModelSpec, Request, Result, Sampling, Tick, Tools
from persyn.llm.reasoning import Reader
from persyn.llm.teachers import generation, results, vllm_reasoning
from persyn.llm.teachers.generation import EncodedPrompt
from persyn.llm.tool_forms import ReadCalls, Said

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RepetitionDetectionParams

#: GiB of KV cache on a CPU, where vLLM would otherwise take a share of the whole memory.
_CPU_CACHE_GIB = 2
#: How long to wait for vLLM's own, more specific error after one of its processes has ended.
_COMPLAINT_SECONDS = 2.0


def load(spec: ModelSpec, tick: Tick) -> Engine:
    """Load a teacher that answers `Generate`; with several GPUs, tensor-parallel and pipeline-parallel.

    `max_tokens` is lowered to the room the context leaves after the prompt. `response_tokens` includes the end token;
    `seconds` is from admission to vLLM, where a request may still be queued. Options: `options.VllmOptions`.
    """
    chosen = options.decode(spec, options.VllmOptions)
    try:
        tensor, _ = vllm_arguments.parallel(chosen.engine_args, spec.gpus)
    except ValueError as error:
        raise PermanentError(str(error)) from error
    loading.require_gpus(spec)
    chat = Chat(load_tokenizer(spec), add_bos=chosen.add_bos, variables=chosen.chat_template_kwargs)
    template_check.require(spec, chat)
    found = adapters.find(spec)
    _set_environment(spec.gpus)
    vllm_arguments.require_known(chosen.engine_args)
    from vllm import LLM
    from vllm.version import __version__

    splits, read_calls = vllm_reasoning.reader(chosen, chat), _call_reader(chat, chosen.tool_parser)
    arguments = _arguments(spec, chosen) | {"tensor_parallel_size": tensor} | _lora_arguments(spec, found)
    try:
        llm = LLM(spec.model, revision=spec.revision, **arguments, **vllm_reasoning.arguments(splits))
    except Exception as error:
        # A failing start raises all kinds of errors, from invalid options to driver errors.
        raise loading.explain_vllm(spec, error) from error
    readers = Readers(splits, read_calls)
    return VllmEngine(llm, chat, f"vllm {__version__}", readers, _load_adapters(llm, found))


class Readers(NamedTuple):
    """How the responses of a model are read."""

    splits: Reader
    #: None leaves calls in the text.
    calls: ReadCalls | None


def _load_adapters(llm: LLM, found: Mapping[str, Adapter]) -> dict[str, LoRARequest]:
    """Load adapters, because one that vLLM refuses in a step would end the engine; `PermanentError` names it."""
    from vllm.lora.request import LoRARequest

    loaded = {}
    for number, (name, adapter) in enumerate(found.items(), start=1):
        loaded[name] = LoRARequest(name, number, str(adapter.folder))
        try:
            llm.llm_engine.add_lora(loaded[name])
        except Exception as error:
            raise PermanentError(f"vLLM cannot load the adapter {name!r}: {shorten(str(error), most=500)}") from error
    return loaded


class VllmEngine:
    """Passes each request on to vLLM as it arrives, and returns each response as it is finished.

    If vLLM uses processes of its own, this process ends as soon as one of them does.
    """

    def __init__(
        self, llm: LLM, chat: Chat, version: str, readers: Readers, adapters: Mapping[str, LoRARequest]
    ) -> None:
        self._splits, self._read_calls = readers
        self._engine: Any = llm.llm_engine
        config = self._engine.vllm_config
        self.version = version
        #: Twice the number of running sequences, so that vLLM never waits for requests.
        self.window = 2 * int(config.scheduler_config.max_num_seqs)
        self._context = int(config.model_config.max_model_len)
        self._chat = chat
        self._adapters = adapters
        self._running: dict[int, tuple[EncodedPrompt, float]] = {}
        self._finished: list[Result] = []
        if children := multiprocessing.active_children():
            threading.Thread(target=_end_with_any, args=(children,), daemon=True, name="vllm-watch").start()

    @property
    def pending(self) -> int:
        """The number of submitted and unfinished requests."""
        return len(self._running) + len(self._finished)

    def submit(self, requests: Sequence[Request]) -> None:
        """Submit requests; those that cannot be served fail at once."""
        for request in requests:
            assert isinstance(request, Generate)
            prompt = generation.prepare(self._chat, request, self._context, self._splits)
            failed = prompt if isinstance(prompt, Failed) else self._add(prompt)
            if failed is not None:
                self._finished.append(failed)

    def step(self) -> list[Result]:
        """One step of the running batch, which adds a token to each response."""
        results, self._finished = self._finished, []
        if self._running:
            try:
                outputs = self._engine.step()
            except Exception as error:
                # An error in a step always leaves vLLM unusable.
                raise EngineError(f"vLLM died: {type(error).__name__}: {error}") from error
            results += [self._result(output) for output in outputs if output.finished]
        return results

    def _add(self, prompt: EncodedPrompt) -> Failed | None:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        request, how = prompt.request, prompt.request.sampling
        schema = request.schema
        if schema and request.tools:  # held to the schema, the model could not call a tool
            return generation.refuse(request, "a prompt with both tools and a response schema needs a server's engine")
        try:
            sampling = SamplingParams(
                max_tokens=prompt.max_tokens,
                temperature=how.temperature,
                top_p=how.top_p,
                top_k=how.top_k,
                min_p=how.min_p,
                repetition_penalty=how.repetition_penalty,
                presence_penalty=how.presence_penalty,
                frequency_penalty=how.frequency_penalty,
                repetition_detection=_repetition_detection(how),
                seed=request.seed,
                stop=generation.stop_texts(self._chat, how),
                stop_token_ids=[self._chat.end_id],
                output_kind=RequestOutputKind.FINAL_ONLY,
                thinking_token_budget=how.max_reasoning_tokens,
                structured_outputs=vllm_reasoning.constraint(schema, self._splits, prompt.tail) if schema else None,
            )
            adapter = self._adapters[request.adapter] if request.adapter else None
            self._engine.add_request(str(request.id), tokens_input(prompt.ids), sampling, lora_request=adapter)
        except (VLLMClientError, ValueError, TypeError) as error:
            return generation.refuse(request, str(error))
        self._running[request.id] = (prompt, time.perf_counter())
        return None

    def _result(self, output: RequestOutput) -> Result:
        prompt, began = self._running.pop(int(output.request_id))
        (response,) = output.outputs
        if response.finish_reason not in {"stop", "length", results.REPETITION}:
            return Failed(prompt.request.id, f"server_error: vLLM finish reason {response.finish_reason}")
        seconds = time.perf_counter() - began
        is_ended = response.finish_reason == "stop" and not isinstance(response.stop_reason, str)
        n_tokens = len(response.token_ids)
        ids = list(response.token_ids)[: n_tokens - is_ended]
        stops = generation.stop_texts(self._chat, prompt.request.sampling)
        try:
            parts = self._splits.read(ids, prompt.tail, stops)
        except ValueError as error:
            return Failed(prompt.request.id, f"unreadable_reasoning: {shorten(str(error))}")
        raw = generation.raw_answer(self._chat, ids, parts, self._splits.markers, stops) if prompt.request.tools else ""
        generated = generation.finished(prompt, parts, response.finish_reason, n_tokens, seconds)
        said = generation.with_calls(generated, self._read_calls, raw, prompt.request.tools)
        return said if isinstance(said, Failed) else results.to_result(said)


def _call_reader(chat: Chat, name: str | None) -> ReadCalls | None:
    """How to read calls: by vLLM's parser of this name or, without a name, as the chat template writes them."""
    if name is None:
        return generation.call_reader(chat, None)
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

    known = ToolParserManager.list_registered()
    if name not in known:
        raise PermanentError(f"vLLM has no tool_parser {name!r}; known: {', '.join(known)}")
    parser: Any = ToolParserManager.get_tool_parser(name)
    try:
        parser(chat.tokenizer)
    except Exception as error:  # parsers raise anything for a tokenizer that lacks their tokens
        raise PermanentError(f"vLLM's tool_parser {name!r} does not suit the model: {error}") from error

    def read(text: str, given: Tools) -> Said | None:
        request = ChatCompletionRequest.model_validate({"messages": [], "tools": given})
        try:
            found = parser(chat.tokenizer, request.tools).extract_tool_calls(text, request)
        except Exception as error:  # and for a text that they did not expect
            raise ValueError(f"vLLM's tool_parser {name!r}: {error}") from error
        if not found.tools_called:
            return None
        calls = [call.model_dump() for call in found.tool_calls]
        # Ids that the model did not write are random.
        said = [call if call["id"] in text else call | {"id": None} for call in calls]
        return Said((found.content or "").strip(), tools.read_calls(said) or [])

    return read


def _repetition_detection(how: Sampling) -> RepetitionDetectionParams | None:
    from vllm.sampling_params import RepetitionDetectionParams

    return how.repetition_detection and RepetitionDetectionParams(**msgspec.structs.asdict(how.repetition_detection))


def _arguments(spec: ModelSpec, chosen: options.VllmOptions) -> dict[str, Any]:
    cache_gib = chosen.kv_cache_gib or (None if spec.gpus else _CPU_CACHE_GIB)
    return {
        **chosen.engine_args,
        "dtype": chosen.dtype,
        "max_model_len": chosen.max_model_len,
        "max_num_seqs": chosen.max_num_seqs,
        "max_num_batched_tokens": chosen.max_num_batched_tokens,
        # After a chunk of a prompt, vLLM rewinds the request's random generator, which is impossible on a CPU. Without
        # chunking, `max_num_batched_tokens` must be at least `max_model_len`.
        "enable_chunked_prefill": None if spec.gpus else False,
        "gpu_memory_utilization": chosen.gpu_memory_utilization,
        "kv_cache_memory_bytes": None if cache_gib is None else int(cache_gib * 2**30),
        "enforce_eager": chosen.enforce_eager,
        "quantization": chosen.quantization,
        # Under a schema, a small model may generate whitespace endlessly where the schema allows it.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        "trust_remote_code": False,
    }


def _lora_arguments(spec: ModelSpec, found: Mapping[str, Adapter]) -> dict[str, Any]:
    """The arguments that make room for adapters: all of them in one batch."""
    from vllm.config.lora import MaxLoRARanks

    if not found:
        return {}
    rank, allowed = adapters.largest_rank(found), get_args(MaxLoRARanks)
    if rank > max(allowed):
        raise PermanentError(f"an adapter has the rank {rank}; vLLM allows at most {max(allowed)}")
    # On a CPU, vLLM applies what is in the last place to requests without an adapter that share a batch with others, so
    # it stays empty.
    places = len(found) + (not spec.gpus)
    return {"enable_lora": True, "max_loras": places, "max_lora_rank": min(n for n in allowed if n >= rank)}


def _end_with_any(children: Sequence[BaseProcess]) -> None:
    """Exit when one of vLLM's processes exits: vLLM would wait for it forever."""
    connection.wait([child.sentinel for child in children])
    time.sleep(_COMPLAINT_SECONDS)
    ended = ", ".join(f"{each.name} (exit code {each.exitcode})" for each in children if not each.is_alive())
    sys.stderr.write(f"vLLM's process ended: {ended}\n")
    sys.stderr.flush()
    os._exit(1)


def _set_environment(gpus: int) -> None:
    """Set the variables that vLLM reads on import; the user's settings take precedence, except for required ones."""
    # With one device, the engine core runs in this process, so nothing is left behind when the process ends.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if gpus > 1 else "0"
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
