"""The options of each engine, validated when the run file is read and when a model loads.

Imports no model library. The comment above a field is also its description in docs/run-file.md.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeAlias, TypeVar
from urllib.parse import parse_qsl, urlsplit

import msgspec
from msgspec import Meta, Struct

from persyn.config import JudgeEngine, NonNegative, Positive
from persyn.errors import PermanentError, shorten
from persyn.llm import vllm_arguments
from persyn.llm.protocols import ModelSpec

Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]
Above0 = Annotated[float, Meta(gt=0)]
Seconds = Annotated[float, Meta(ge=0)]
_VARIABLE, _HEADER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*"), re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
#: Field names that suggest a secret.
_SECRET = re.compile(
    r"(^|[-_.])(api[-_]?)?(key|token|secret|password|passwd|signature|sig|auth(orization)?|credentials?)$", re.I
)

_ADVICE = "it would be stored; put the key into an environment variable and name that in api_key_env"

#: What `apply_chat_template` sets itself, and what decides how much of a conversation is rendered.
_RESERVED_VARIABLES = frozenset(
    {
        "messages",
        "conversation",
        "tools",
        "documents",
        "tokenize",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "return_dict",
        "return_tensors",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "processor_kwargs",
        "padding",
        "truncation",
        "max_length",
        "strftime_now",
        "raise_exception",
    }
)


class EngineOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """The options of an engine; unknown ones are rejected."""


class TemplateOptions(EngineOptions, frozen=True, kw_only=True):
    """The options of an engine that applies a chat template, or has a server apply it."""

    #: Variables of the chat template: `{ enable_thinking = false }`. Requests to a server have a field of this name.
    chat_template_kwargs: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if reserved := sorted(_RESERVED_VARIABLES.intersection(self.chat_template_kwargs)):
            raise ValueError(f"chat_template_kwargs contains {reserved[0]!r}, which PerSyn sets itself; remove it")


class VllmOptions(TemplateOptions, frozen=True):
    """The options of a teacher on vLLM."""

    #: Data type of weights and computation; `auto` leaves it to vLLM.
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    #: Tokens of prompt and response together; none: vLLM's default.
    max_model_len: Positive | None = None
    #: Maximum number of concurrent responses; none: vLLM's default.
    max_num_seqs: Positive | None = None
    #: Tokens computed in one step, including prompts; none: vLLM's default. On a CPU at least `max_model_len`.
    max_num_batched_tokens: Positive | None = None
    #: Share of a GPU's memory that vLLM uses.
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=1)] = 0.9
    #: GiB of KV cache, instead of that share; none: that share, or 2 on a CPU.
    kv_cache_gib: Above0 | None = None
    #: Starts in a fraction of the time, but computes more slowly.
    enforce_eager: bool = False
    #: vLLM's name of the weights' quantisation; none: as in the model's configuration.
    quantization: str | None = None
    #: Further arguments of vLLM's engine, by vLLM's names: see below.
    engine_args: dict[str, Any] = {}
    #: Whether plain text begins with the BOS token; none: decided by the token. A chat template adds its own.
    add_bos: bool | None = None
    #: vLLM's name of the parser of the model's tool calls; none: the form in which the chat template writes calls, if
    #: PerSyn knows it (`hermes`, `mistral`, `llama3_json`).
    tool_parser: str | None = None
    #: How reasoning is separated from the answer: vLLM's name of a parser, such as `deepseek_r1`, or `off` to keep the
    #: text as it is. None: by the markers that the chat template and the tokenizer name.
    reasoning_parser: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        vllm_arguments.require_allowed(self.engine_args)
        if (within := _secret_within(self.engine_args)) is not None:
            raise ValueError(f"engine_args contains {within!r}, which may be a secret; options are stored")


class TransformersOptions(TemplateOptions, frozen=True):
    """The options of a teacher on transformers."""

    #: Data type of weights and computation; none: bfloat16 on a GPU, and float32 on the CPU, where bfloat16 is no
    #: faster.
    dtype: Dtype | None = None
    #: Rows of a batch; halved permanently when a batch does not fit in memory.
    batch_size: Positive = 16
    #: Tokens of prompt and response together; none: the model's context length.
    max_model_len: Positive | None = None
    #: Whether plain text begins with the BOS token; none: decided by the token. A chat template adds its own.
    add_bos: bool | None = None
    #: The form of the model's tool calls; none: the one in which the chat template writes calls, if it is one of these.
    tool_parser: Literal["hermes", "mistral", "llama3_json"] | None = None


class ChatOptions(TemplateOptions, frozen=True):
    """The options of a client of a chat completions server."""

    #: Maximum number of requests in flight, at each URL; fewer while a server says that it is overloaded.
    concurrency: Positive = 64
    #: Timeout of one attempt, from connecting to the last byte.
    timeout_seconds: Above0 = 600.0
    #: Maximum number of retries after HTTP 408, 409, 425, 429 or 5xx, a timeout, a lost connection or an answer
    #: without a response; then one more, once the server has answered another request.
    max_retries: NonNegative = 8
    #: Fields of every request's body; they override those derived from `sampling`.
    extra: dict[str, Any] = {}
    #: The name of the body's field for `max_tokens`; some servers require `max_completion_tokens`.
    max_tokens_field: str = "max_tokens"
    #: Which of `seed`, `temperature` and `top_p` are not sent: some servers reject requests with them.
    omit: list[Literal["seed", "temperature", "top_p"]] = []
    #: How reasoning within a response's text is separated, if the server does not report it in a field of its own.
    #: `auto`: by the markers around it. `opened`: the server's template opens the reasoning, so that a response begins
    #: inside it. `off`: the text is kept as it is.
    inline_reasoning: Literal["auto", "opened", "off"] = "auto"


class HostedOptions(ChatOptions, frozen=True, kw_only=True):
    """The options of a client of a server that PerSyn does not start; it may need a key, and have limits."""

    #: The environment variable with the key; the key itself is never stored. None: no key is sent.
    api_key_env: str | None = None
    #: Maximum number of requests per minute, of all workers together; none: as many as the server accepts. Teachers and
    #: judges with the same model, URLs and `api_key_env` share it. Batches do not count: providers limit them apart.
    requests_per_minute: Positive | None = None
    #: The same for the tokens of prompts and responses.
    tokens_per_minute: Positive | None = None

    @property
    def urls(self) -> list[str]:
        """The base URLs of the replicas; none if the client knows where the model is."""
        raise NotImplementedError

    @property
    def key_source(self) -> str:
        """Where the key comes from, for messages."""
        return f"the key in {self.api_key_env}" if self.api_key_env else "no key"


class OpenAIOptions(HostedOptions, frozen=True, kw_only=True):
    """The options of a teacher behind a server."""

    #: URL up to and including the version: `http://127.0.0.1:8000/v1`. A query is kept: Azure's `?api-version=...`. A
    #: password or a key in it is rejected, because options are stored. A list of URLs names replicas of one model: each
    #: request goes to the least loaded one that answers. It may be changed during a run (`persyn teachers set`); a
    #: teacher is its `model` and `revision`, wherever they are.
    base_url: str | list[str]
    #: The header with the key: as `Bearer` in `Authorization`, unchanged in any other, such as Azure's `api-key`.
    api_key_header: str = "Authorization"
    #: `batch`: send each job's requests as one batch, which the provider executes within a day at a lower price.
    mode: Literal["direct", "batch"] = "direct"
    #: `mode = "batch"`: maximum number of requests in a batch.
    batch_requests: Annotated[int, Meta(ge=1, le=50_000)] = 10_000
    #: `mode = "batch"`: how often the state of a batch is asked for.
    poll_seconds: Above0 = 60.0
    #: `mode = "batch"`: the share of the teacher's prices that a batch saves.
    batch_discount: Annotated[float, Meta(ge=0, le=1)] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_no_secret(self)
        if not self.urls or len(set(self.urls)) < len(self.urls):
            raise ValueError(f"base_url must name one or more different URLs, got {shorten(repr(self.base_url))}")
        if self.mode == "batch" and len(self.urls) > 1:
            raise ValueError(f'mode = "batch" needs a single base_url, got {len(self.urls)} URLs; name one of them')
        if not _HEADER.fullmatch(self.api_key_header):
            raise ValueError(f"api_key_header is not a valid header name: {shorten(repr(self.api_key_header))}")

    @property
    def urls(self) -> list[str]:
        """The base URLs of the replicas."""
        return [self.base_url] if isinstance(self.base_url, str) else self.base_url


class ServerOptions(ChatOptions, frozen=True, kw_only=True):
    """The options of a teacher behind a server that PerSyn starts."""

    #: The program and its arguments, with absolute paths and without a shell: `["vllm", "serve", "{model}", "--port",
    #: "{port}"]`. `{model}`, `{revision}`, `{host}` (127.0.0.1), `{port}` and `{gpus}` are replaced.
    command: Annotated[list[str], Meta(min_length=1)]
    #: The path that answers with HTTP 200 once the server is ready; none: `/health`, or `/v1/models`.
    health: str | None = None
    #: How long the server may take until it is ready.
    start_seconds: Above0 = 900.0
    #: Environment variables that are added to the worker's own, with the same replacements; no keys or passwords,
    #: because options are stored.
    env: dict[str, str] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any("{port}" in text for text in (*self.command, *self.env.values())):
            raise ValueError("command must contain {port}, the port on which the server is to listen")
        if self.health is not None and not self.health.startswith("/"):
            raise ValueError(f"health must begin with /, got {shorten(repr(self.health))}")
        advice = "it would be stored; set it in the worker's environment, which the server inherits"
        if (name := next(filter(_SECRET.search, self.env), None)) is not None:
            raise ValueError(f"env contains {name!r}; {advice}")
        flags = (word.partition("=")[0] for word in self.command if word.startswith("-"))
        if (flag := next(filter(_SECRET.search, flags), None)) is not None:
            raise ValueError(f"command contains {flag!r}; {advice}")
        if (within := _secret_within(self.extra)) is not None:
            raise ValueError(f"extra contains {within!r}; options are stored")


def is_secret(name: str) -> bool:
    """Whether a field or a variable of this name may contain a secret."""
    return _SECRET.search(name) is not None


def require_no_secret(chosen: HostedOptions) -> None:
    """Raise `ValueError`, without repeating the secret, if the stored options would contain one."""
    for url in chosen.urls:
        _require_no_secret_in(url)
    if chosen.api_key_env is not None and not _VARIABLE.fullmatch(chosen.api_key_env):
        raise ValueError(
            "api_key_env is not the name of an environment variable; put the key into the environment, and only "
            "the variable's name into the run file"
        )
    for name in chosen.extra:
        if _SECRET.search(name):
            raise ValueError(f"extra contains {name!r}; {_ADVICE}")
    if (within := _secret_within(chosen.extra)) is not None:
        raise ValueError(f"extra contains {within!r} in a nested value; {_ADVICE}")


def _require_no_secret_in(url: str) -> None:
    place = urlsplit(url)
    if "@" in place.netloc:
        raise ValueError(f"base_url contains a user or a password; {_ADVICE}")
    for name, _ in parse_qsl(place.query, keep_blank_values=True):
        if _SECRET.search(name):
            raise ValueError(f"base_url contains {name!r} in its query; {_ADVICE}")


def _secret_within(value: Any) -> str | None:
    """The name of a field whose text may be a secret; a schema property that happens to be named `key` is not."""
    if isinstance(value, list):
        return next(filter(None, map(_secret_within, value)), None)
    if not isinstance(value, dict):
        return None
    own = (str(name) for name, said in value.items() if isinstance(said, str) and _SECRET.search(str(name)))
    return next(own, None) or _secret_within(list(value.values()))


#: The options that determine the form in which a model receives a conversation, equal for all its engines.
FORM_OPTIONS = ("add_bos", "chat_template_kwargs")


class ScorerOptions(EngineOptions, frozen=True):
    """The options of a scorer that is a model."""

    #: Data type of weights and computation; none: float32 on the CPU, and the stored type on a GPU.
    dtype: Dtype | None = None
    #: Rows times longest row of a batch, including padding; none: 2,048 on the CPU and 16,384 on a GPU.
    batch_tokens: Positive | None = None
    #: Whether plain text begins with the BOS token; none: decided by the token. A chat template adds its own.
    add_bos: bool | None = None


class RewardModelOptions(ScorerOptions, frozen=True):
    """The options of a reward model."""

    #: Variables of the chat template: `{ enable_thinking = false }`.
    chat_template_kwargs: dict[str, Any] = {}


class LogLikelihoodOptions(ScorerOptions, frozen=True):
    """The options of a student."""

    #: Variables of the chat template: `{ enable_thinking = false }`.
    chat_template_kwargs: dict[str, Any] = {}
    #: Score only this many tokens at the beginning of a response; long responses then cost less, and fit. None: all.
    response_tokens: Positive | None = None
    #: Statistics for which the student reads each response once more, so that `compare --learnability` can use them:
    #: `alone` (without the prompt, for `ifd`) and `local` (by windows, for `local_log_likelihood`). What `[run]
    #: learnability` needs is added. `tokens` is part of every pass, and marks scores that were computed again for it.
    statistics: list[Literal["tokens", "alone", "local"]] = []


class JudgeOptions(EngineOptions, frozen=True):
    """The options of a judge."""

    #: The engine that runs the model.
    engine: JudgeEngine
    #: What makes a response good; part of the judge's prompt.
    criterion: str = (
        "it does what the conversation asks for; it is correct, complete and clear, and has nothing beside the point."
    )
    #: Ratings are the integers from 1 to this number.
    scale: Annotated[int, Meta(ge=2, le=100)] = 10
    #: `answer`: compare with the prompt's reference answer instead of rating.
    against: Literal["answer"] | None = None
    #: Maximum number of tokens of one reply, including the model's reasoning.
    max_tokens: Positive = 256
    #: The options of that engine, as for a teacher.
    options: dict[str, Any] = {}
    #: The hash of the judge's wording; set by PerSyn at the start of the run.
    wording: str | None = None


class MathOptions(EngineOptions, frozen=True):
    """The options of the answer checker."""

    #: Timeout of one comparison; after it, the score fails.
    timeout_seconds: Above0 = 5.0
    #: Address space of the comparing process in MiB; importing the algebra takes a few hundred.
    memory_mb: Annotated[int, Meta(ge=512)] = 2048


class InstructionsOptions(EngineOptions, frozen=True):
    """The options of the instruction checker."""

    #: `prompt`: 1 if all of a prompt's instructions are followed, else 0. `instruction`: the share that is followed.
    level: Literal["prompt", "instruction"] = "prompt"
    #: `false`: an instruction also counts as followed if the response follows it without its first line, its last line,
    #: both, or its asterisks.
    strict: bool = True


class CodeOptions(EngineOptions, frozen=True):
    """The options of the runner of code."""

    #: `prompt`: 1 if the code passes all tests, else 0. `test`: the share that it passes.
    level: Literal["prompt", "test"] = "prompt"
    #: Time of one test by the clock; after it, the test has failed.
    timeout_seconds: Above0 = 10.0
    #: Time of all tests of a response by the clock, after which the others have failed; none: ten times
    #: `timeout_seconds`.
    total_seconds: Above0 | None = None
    #: Address space of a process with code, in MiB.
    memory_mb: Annotated[int, Meta(ge=128)] = 1024
    #: Number of responses that are tested at the same time; none: one per core.
    concurrency: Positive | None = None
    #: Parts of the sandbox that a host may lack. Without them the code of responses can read files (`landlock`), change
    #: files, start processes and use the network (`seccomp`), or take all memory (`limits`).
    unsafe_without: list[Literal["landlock", "seccomp", "limits"]] = []


class PythonOptions(EngineOptions, frozen=True):
    """A custom scorer has no options; its module is configured by other means."""


class RouterFitOptions(ScorerOptions, frozen=True):
    """The options of a `router_fit`, whose model is the backbone. The last four are for fine-tuning."""

    #: Data type of weights and computation; none: bfloat16 on a GPU, float32 on the CPU. `full` trains in float32.
    dtype: Dtype | None = None
    #: Maximum tokens of a prompt; longer ones lose their middle. Less if the backbone's context is smaller.
    max_tokens: Positive = 1024
    #: `full` and `lora`: maximum number of passes over the calibration prompts.
    epochs: Positive = 3
    #: Learning rate; none: 1e-5 for `full`, 1e-4 for `lora`.
    learning_rate: Above0 | None = None
    #: `full` and `lora`: prompts per step.
    batch_size: Positive = 16
    #: `lora`: the rank of the adapters.
    lora_rank: Positive = 16


class RouteOptions(EngineOptions, frozen=True):
    """The options of a `router`, whose model is the checkpoint's folder."""

    #: Data type of the backbone; none: bfloat16 on a GPU, float32 on the CPU. The head is always float32.
    dtype: Dtype | None = None
    #: Prompts times longest prompt of a batch; none: 2,048 on the CPU and 16,384 on a GPU.
    batch_tokens: Positive | None = None
    #: The hash of the checkpoint; a checkpoint with another hash is rejected. None: any is accepted.
    sha256: str | None = None


class StrategyOptions(EngineOptions, frozen=True):
    """The options PerSyn passes to a custom strategy."""

    #: The strategy's inputs, `StrategyInputs`, as packed by `persyn.router.strategy.pack`.
    known: dict[str, Any]
    #: Additional arguments of the function.
    options: dict[str, Any] = {}


class FakeOptions(EngineOptions, frozen=True):
    """The options of the engine without a model."""

    #: Seconds from admission to result.
    latency_seconds: Seconds = 0.0
    #: Maximum number of requests in flight.
    concurrency: Positive = 64
    #: Maximum number of results per second, however many requests are in flight; 0: unlimited.
    rows_per_second: Annotated[float, Meta(ge=0)] = 0.0
    #: Seconds it takes to load.
    load_seconds: Seconds = 0.0
    #: One in this many requests fails, always the same ones; 0: none.
    fail_every: NonNegative = 0
    #: A prompt with this text kills the process, like a crash in a model's kernel.
    crash_on: str | None = None
    #: A prompt with this text is never answered, nor anything after it.
    hang_on: str | None = None
    #: A file that gets a JSON line with the model and the last turn's text for every admitted request.
    journal: str | None = None
    #: Number of words of a response.
    response_words: Positive = 12
    #: One in this many requests with tools is answered by calling the first of them, always the same ones; 0: none.
    call_every: NonNegative = 0
    #: Number of words of the reasoning before it; 0: none.
    reasoning_words: NonNegative = 0
    #: As a student: see `log_likelihood`.
    statistics: list[Literal["tokens", "alone", "local"]] = []
    #: Number of scores of a `RouteOptions`; set by PerSyn.
    teachers: NonNegative = 0


Chosen = TypeVar("Chosen", bound=EngineOptions)


def decode(spec: ModelSpec, kind: type[Chosen]) -> Chosen:
    """Decode the spec's options; `PermanentError` names an invalid option and lists the valid ones."""
    try:
        return msgspec.convert(spec.options, kind)
    except msgspec.ValidationError as error:
        known = ", ".join(kind.__struct_fields__)
        raise PermanentError(f"wrong options for engine {spec.engine!r}: {error}; valid options: {known}") from error
