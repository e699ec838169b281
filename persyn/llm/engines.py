"""The registry of engines: what runs teachers, scorers and routers. Each is imported only in the host that loads it.

Installed packages add engines through the entry points `persyn.engines` and, for scorers, `persyn.scorers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, TypeAlias

from persyn.config import COMBINED, IMPORTED
from persyn.llm import lean, litellm_prices, needs, options, vllm_arguments
from persyn.llm.litellm_options import LiteLLMOptions
from persyn.llm.needs import Need
from persyn.llm.options import EngineOptions
from persyn.llm.protocols import Engine, LoadEngine, ModelSpec, Tick
from persyn.registry import Registry

EngineRole: TypeAlias = Literal["teacher", "judge", "student", "quality", "router"]
"""What an engine can do in a run: answer prompts, run a judge, compute learnability, score quality, or route."""

ModelReference: TypeAlias = Literal["weights", "server", "function", "field", ""]
"""What `model` names: a folder or hub id whose weights are loaded, a model of a server, a `module:function`, a field of
imported rows, or nothing.
"""


Prices: TypeAlias = tuple[float | None, float | None]
"""US dollars per million prompt and response tokens; None where unknown."""


def _no_need(chosen: Mapping[str, Any]) -> Need | None:
    return None


def _lacks_for_code(chosen: Mapping[str, Any]) -> str:
    from persyn.llm.scorers import code

    return code.lacks(chosen)


def _no_prices(model: str) -> Prices:
    return None, None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKind:
    """An engine as the rest of PerSyn knows it."""

    name: str
    #: One sentence for the documentation.
    summary: str
    #: The module with its function `load`, see `persyn.llm.protocols.LoadEngine`; empty if it is never loaded.
    module: str
    #: Empty for engines that users do not choose.
    roles: frozenset[EngineRole] = frozenset()
    #: The options that a run file may set; None if there are none.
    options: type[EngineOptions] | None = None
    model: ModelReference = ""
    #: Whether the model runs on the engine in `options.engine`, with the options in `options.options`.
    is_nested: bool = False
    #: Whether its module imports transformers.
    is_on_transformers: bool = False
    #: A package that it needs besides PerSyn's own dependencies, and the extra of PerSyn that installs it.
    package: str | None = None
    extra: str | None = None
    #: Whether it has no model and computes little: it may work beside other engines of the same machine.
    is_light: bool = False
    #: Whether a teacher on it can hold a response to a JSON schema.
    holds_to_schema: bool = False
    #: Whether the weights are loaded by a server that it starts, so that only the server knows how.
    starts_server: bool = False
    #: Whether its models can have LoRA adapters.
    takes_adapters: bool = False
    #: Options that say how the model is reached or how fast it runs, and affect no result: address, key, concurrency,
    #: timeouts, memory. "a.b" is the key `b` of the table `a`. Like `gpus`, they belong to a run and are not part of a
    #: teacher's or scorer's version.
    transport: frozenset[str] = frozenset()
    #: What `dtype` is on a CPU and on a GPU if it is not set, None where the model decides: where GPUs affect results.
    default_dtypes: tuple[str | None, str | None] = (None, None)
    #: Whether its rows are tokenised on all cores, because a GPU waits for them.
    tokenises_in_parallel: bool = False
    #: The list prices of a model, for teachers whose table names none.
    prices: Callable[[str], Prices] = _no_prices
    #: A scorer's unit, as reports name it; empty if the values have none.
    unit: str = ""
    #: Whether a scorer's values may be verdicts: 1 right, 0 wrong.
    may_be_verdict: bool = False
    #: Whether a scorer can judge a student's responses: imported scores are of other ones, and fake ones mean nothing.
    judges_students: bool = True
    #: Whether a scorer reads the other fields of a prompt's row.
    reads_row: bool = False
    #: What a scorer needs from a prompt, given its options; None if any prompt will do.
    need: Callable[[Mapping[str, Any]], Need | None] = _no_need

    #: Why it cannot work on this host, given its options, beyond missing packages and models; empty if it can.
    lacks: Callable[[Mapping[str, Any]], str] | None = None

    def __post_init__(self) -> None:
        known = self.options.__struct_fields__ if self.options is not None else ()
        if unknown := sorted(name for name in self.transport if name.partition(".")[0] not in known):
            raise ValueError(f"transport of engine {self.name!r} names no option of it: {', '.join(unknown)}")

    @property
    def computes_statistics(self) -> bool:
        """Whether a student on it yields the statistics that other learnabilities than `log_likelihood` need."""
        return self.options is not None and "statistics" in self.options.__struct_fields__

    def reference(self, chosen: Mapping[str, Any]) -> ModelReference:
        """What `model` names, given the options."""
        return ENGINES[chosen["engine"]].model if self.is_nested else self.model


#: The transport of every model behind a server, and of one that PerSyn does not start.
_REQUESTS = frozenset({"concurrency", "timeout_seconds", "max_retries", "max_tokens_field"})
_HOSTED = _REQUESTS | {"base_url", "api_key_env", "requests_per_minute", "tokens_per_minute"}

ENGINES = Registry(
    EngineKind,
    EngineKind(
        name="vllm",
        summary="a model on vLLM, in this environment",
        module="persyn.llm.teachers.vllm_engine",
        roles=frozenset({"teacher", "judge"}),
        options=options.VllmOptions,
        model="weights",
        is_on_transformers=True,
        package="vllm",
        extra="vllm",
        holds_to_schema=True,
        takes_adapters=True,
        transport=frozenset(
            {"gpu_memory_utilization", "kv_cache_gib", "max_num_seqs", "max_num_batched_tokens", "enforce_eager"}
            | {f"engine_args.{name}" for name in vllm_arguments.SPEED}
        ),
    ),
    EngineKind(
        name="transformers",
        summary="a model on transformers, slower than vLLM, on any hardware",
        module="persyn.llm.teachers.transformers_engine",
        roles=frozenset({"teacher", "judge"}),
        options=options.TransformersOptions,
        model="weights",
        is_on_transformers=True,
        takes_adapters=True,
        transport=frozenset({"batch_size"}),
        default_dtypes=("float32", "bfloat16"),
    ),
    EngineKind(
        name="openai",
        summary="a model behind a server with the OpenAI protocol",
        module="persyn.llm.teachers.chat_server",
        roles=frozenset({"teacher", "judge"}),
        options=options.OpenAIOptions,
        model="server",
        holds_to_schema=True,
        transport=_HOSTED | {"api_key_header", "mode", "batch_requests", "poll_seconds", "batch_discount"},
    ),
    EngineKind(
        name="litellm",
        summary="a model of a provider with a protocol of its own (Anthropic, Gemini, Bedrock, ...), by litellm",
        module="persyn.llm.teachers.litellm_client",
        roles=frozenset({"teacher", "judge"}),
        options=LiteLLMOptions,
        model="server",
        package="litellm",
        extra="litellm",
        holds_to_schema=True,
        prices=litellm_prices.of,
        transport=_HOSTED,
    ),
    EngineKind(
        name="server",
        summary="a model behind a server that PerSyn starts: `vllm serve`, SGLang, llama.cpp, ...",
        module="persyn.llm.teachers.started_server",
        roles=frozenset({"teacher", "judge"}),
        options=options.ServerOptions,
        model="weights",
        starts_server=True,
        holds_to_schema=True,
        transport=_REQUESTS | {"health", "start_seconds"},
    ),
    EngineKind(
        name="log_likelihood",
        summary="the student's log-likelihood of a response",
        module="persyn.llm.scorers.log_likelihood",
        roles=frozenset({"student"}),
        options=options.LogLikelihoodOptions,
        model="weights",
        transport=frozenset({"batch_tokens"}),
        default_dtypes=("float32", None),
        tokenises_in_parallel=True,
    ),
    EngineKind(
        name="math",
        summary="1 if the final answer equals the reference, else 0",
        module="persyn.llm.scorers.math_scorer",
        roles=frozenset({"quality"}),
        options=options.MathOptions,
        is_light=True,
        transport=frozenset({"timeout_seconds", "memory_mb"}),
        unit="1 right, 0 wrong",
        may_be_verdict=True,
        need=lambda chosen: needs.answer("math"),
    ),
    EngineKind(
        name="instructions",
        summary="1 if all instructions in the prompt's row are followed, else 0",
        module="persyn.llm.scorers.instructions",
        roles=frozenset({"quality"}),
        options=options.InstructionsOptions,
        is_light=True,
        package="langdetect",
        extra="instructions",
        unit="1 followed, 0 not",
        may_be_verdict=True,
        reads_row=True,
        need=lambda chosen: needs.instruction_list(),
    ),
    EngineKind(
        name="code",
        summary="1 if the code in the response passes all tests in the prompt's row, else 0",
        module="persyn.llm.scorers.code",
        roles=frozenset({"quality"}),
        options=options.CodeOptions,
        is_light=True,
        transport=frozenset({"concurrency", "unsafe_without"}),
        unit="1 passed, 0 not",
        may_be_verdict=True,
        reads_row=True,
        need=lambda chosen: needs.tests(),
        lacks=_lacks_for_code,
    ),
    EngineKind(
        name="reward_model",
        summary="a reward model's logit",
        module="persyn.llm.scorers.reward_model",
        roles=frozenset({"quality"}),
        options=options.RewardModelOptions,
        model="weights",
        is_on_transformers=True,
        transport=frozenset({"batch_tokens"}),
        default_dtypes=("float32", None),
        unit="logit",
    ),
    EngineKind(
        name="judge",
        summary="an LLM's rating, or its comparison with the reference answer",
        module="persyn.llm.scorers.judge",
        roles=frozenset({"quality"}),
        options=options.JudgeOptions,
        is_nested=True,
        transport=frozenset({"price_in", "price_out"}),
        unit="the judge's verdict",
        need=lambda chosen: needs.answer("judge") if chosen.get("against") == "answer" else None,
    ),
    EngineKind(
        name="python",
        summary="your own function",
        module="persyn.llm.scorers.custom_function",
        roles=frozenset({"quality"}),
        options=options.PythonOptions,
        model="function",
        may_be_verdict=True,
        reads_row=True,
    ),
    EngineKind(
        name=IMPORTED,
        summary="nothing is computed here; responses or scores were imported",
        module="",
        roles=frozenset({"teacher", "quality"}),
        model="field",
        may_be_verdict=True,
        judges_students=False,
    ),
    EngineKind(
        name=COMBINED,
        summary="combines the values of several scorers",
        module="",
    ),
    EngineKind(
        name="fake",
        summary="meaningless results without a model, for trying things out",
        module="persyn.llm.fake",
        roles=frozenset({"teacher", "judge", "student", "quality", "router"}),
        options=options.FakeOptions,
        transport=frozenset({"latency_seconds", "concurrency", "rows_per_second", "load_seconds", "journal"}),
        holds_to_schema=True,
        takes_adapters=True,
        judges_students=False,
    ),
    EngineKind(
        name="router_fit",
        summary="fits a router",
        module="persyn.router.fit",
        options=options.RouterFitOptions,
        model="weights",
        is_on_transformers=True,
        transport=frozenset({"batch_tokens"}),
        default_dtypes=("float32", "bfloat16"),
    ),
    EngineKind(name="router", summary="routes with a fitted router", module="persyn.router.route"),
    EngineKind(name="strategy", summary="calls a custom strategy", module="persyn.router.strategy"),
    EngineKind(name="check", summary="inspects a teacher's model", module="persyn.llm.check", is_on_transformers=True),
    groups=("persyn.engines", "persyn.scorers"),
)


def with_role(role: EngineRole) -> list[str]:
    """The names of the engines that can do this, built-in ones first."""
    return [name for name, kind in ENGINES.items() if role in kind.roles]


def batch_size(spec: ModelSpec) -> int | None:
    """The number of requests in a batch, for a model behind a batch protocol; None for all others."""
    kind = ENGINES.get(spec.engine)
    if kind is None or kind.options is not options.OpenAIOptions or spec.options.get("mode") != "batch":
        return None
    return options.decode(spec, options.OpenAIOptions).batch_requests


def hosted_options(spec: ModelSpec) -> options.HostedOptions:
    """The options of a model behind a server that PerSyn does not start; `PermanentError` for invalid ones."""
    kind = ENGINES[spec.engine].options
    assert kind is not None
    assert issubclass(kind, options.HostedOptions)
    return options.decode(spec, kind)


def loads_weights(engine: str, chosen: Mapping[str, Any]) -> bool:
    """Whether `model` is a folder or a hub id whose weights an engine loads; False for an engine that is not installed.

    chosen: the engine's options.
    """
    kind = ENGINES.get(engine)
    return kind is not None and kind.reference(chosen) == "weights"


def is_light(engine: str, chosen: Mapping[str, Any]) -> bool:
    """Whether an engine needs neither GPUs nor the CPU for itself: a server computes, or it is a checker.

    chosen: the engine's options.
    """
    kind = ENGINES.get(engine)
    return kind is not None and (kind.is_light or kind.reference(chosen) == "server")


def gpus(spec: ModelSpec) -> int:
    """How many GPUs a worker gives to a model: none to one behind a server, whatever its table says."""
    return 0 if is_light(spec.engine, spec.options) else spec.gpus


def load(spec: ModelSpec, tick: Tick) -> Engine:
    """Import the spec's engine and load its model; `EngineError` when that fails."""
    kind = ENGINES.require(spec.engine, "engine")
    if kind.is_on_transformers:
        lean.import_transformers()
    make: LoadEngine = import_module(kind.module).load
    return make(spec, tick)
