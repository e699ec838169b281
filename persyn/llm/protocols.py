"""The messages between a worker and an engine host: model specs, requests, results.

Independent of the database and of model libraries. Everything is a plain value that msgspec
encodes as MessagePack; nothing is ever pickled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeAlias

from msgspec import Struct, field

from persyn.config import Sampling as Sampling

Message: TypeAlias = dict[str, Any]
"""One turn of a conversation: {"role": "system" | "user" | "assistant" | "tool", "content": text}.

An assistant's turn may have `tool_calls`, [{"id", "type": "function", "function": {"name", "arguments"}}, ...], where
the arguments are JSON text, and `reasoning_content`; a tool's turn may have `tool_call_id` and `name`.
"""

Tools: TypeAlias = list[dict[str, Any]]
"""The functions a model may call: [{"type": "function", "function": {"name", "description", "parameters"}}, ...]."""


def join_turns(history: Sequence[Message] | None, text: str, last_turn: Message | None) -> list[Message]:
    """A conversation from its stored parts.

    history:   the turns before the last one.
    text:      of the last turn.
    last_turn: the last turn without its text; None if it is the user's.
    """
    last = {"role": "user"} if last_turn is None else last_turn
    return [*(history or ()), {"role": last["role"], "content": text, **last}]


def last_turn_of(turn: Message) -> Message | None:
    """The stored form of a conversation's last turn, without its text."""
    return None if turn["role"] == "user" else {key: said for key, said in turn.items() if key != "content"}


class ModelSpec(Struct, frozen=True):
    """What a host loads. Equal specs can be served by one host."""

    #: A key of `persyn.llm.engines.ENGINES`: vllm, transformers, openai, fake, log_likelihood, reward_model, ...
    engine: str
    #: A local folder, a hub id, or the name a server knows the model by; "" for an engine without a model.
    model: str
    #: A hub commit; None for a local folder or a server.
    revision: str | None = None
    #: GPUs the model needs; 0 runs on the CPU.
    gpus: int = 0
    #: The engine's own options, documented by each engine: dtype, max_model_len, base_url, concurrency, ...
    options: dict[str, Any] = {}
    #: The LoRA adapters that requests may name, sorted; see `persyn.llm.adapters`.
    adapters: list[str] = []


class Generate(Struct, frozen=True, tag="generate"):
    """Write one response to a conversation."""

    id: int
    messages: list[Message]
    sampling: Sampling
    seed: int
    #: JSON schema of the response; not enforced by an engine that does not hold to schemas.
    schema: dict[str, Any] | None = None
    #: The functions that the model may call.
    tools: Tools | None = None
    #: One of the spec's adapters; None is the model alone.
    adapter: str | None = None


class Judge(Struct, frozen=True, tag="judge"):
    """Give one response a raw score; the engine defines which."""

    id: int
    messages: list[Message]
    #: Without the reasoning.
    response: str
    #: The reference answer, where the scorer needs one.
    answer: str | None = None
    #: The other fields of the prompt's row, for scorers that read them.
    meta: dict[str, Any] = {}
    #: What the model wrote before the response; None if it did not reason.
    reasoning: str | None = None
    tools: Tools | None = None
    #: The response's calls, as in a `Message`.
    tool_calls: list[dict[str, Any]] | None = None


class Route(Struct, frozen=True, tag="route"):
    """Score every teacher for one prompt."""

    id: int
    messages: list[Message]
    #: The other fields of the prompt's row, for a custom strategy that reads them.
    meta: dict[str, Any] = {}
    #: The prompt's label in each field that the router reads; None where its row has none.
    labels: dict[str, str | None] = {}
    #: Whether to say what decided the scores.
    explain: bool = False


class Fit(Struct, frozen=True, tag="fit"):
    """Fit a router to a calibration grid and write its checkpoint.

    conversations: P prompts, in any order.
    rewards:       P rows of K combined rewards, in head order; NaN where a cell is missing.
    is_holdout:    P flags: True excludes a prompt from the fit and uses it to measure the router.
    folder:        where to write the checkpoint; created by the engine, replaced as a whole.
    """

    id: int
    conversations: list[list[Message]]
    rewards: list[list[float]]
    is_holdout: list[bool]
    teachers: list[str]
    tune: str
    seed: int
    folder: str
    #: "weighted" or "equal": see `persyn.method.rewards.preference_weights`.
    preferences: str = "weighted"
    #: P rows of the standard errors of the rewards; None if every cell has one sample.
    errors: list[list[float]] | None = None
    #: A kind of router, or "auto" to choose one.
    kind: str = "head"
    #: What it reads: "backbone", "embedding", "tfidf".
    encoders: list[str] = field(default_factory=lambda: ["backbone"])
    #: P labels by the name of each field that it reads.
    labels: dict[str, list[str | None]] = {}
    #: The sentence-embedding model: a folder or hub id, and its version.
    embedding: str = ""
    embedding_version: str | None = None
    #: Whether a kind is chosen for scores that are weighed against costs and limits.
    is_weighed: bool = False


class Check(Struct, frozen=True, tag="check"):
    """Load a teacher's model once and report problems that would spoil a run."""

    id: int
    spec: ModelSpec
    #: Sample prompts for it, including the system turn and worked examples.
    conversations: list[list[Message]]
    max_tokens: int
    #: The tools of each of them.
    tools: list[Tools | None] = []


class Finding(Struct, frozen=True):
    """The result of one check."""

    level: Literal["error", "warning", "ok"]
    topic: str
    message: str


class Checked(Struct, frozen=True, tag="checked"):
    """The findings of a `Check`."""

    id: int
    findings: list[Finding]


class Generated(Struct, frozen=True, tag="generated"):
    """A finished response."""

    id: int
    #: The answer, without the reasoning; empty only beside tool calls.
    text: str
    #: "stop" (the model ended it), "length" (cut off at max_tokens), or a server's own word; None if not reported.
    finish_reason: str | None
    prompt_tokens: int | None
    #: All tokens that the model generated, those of the reasoning included.
    response_tokens: int | None
    #: From admission to the engine to the last token.
    seconds: float
    #: What the model wrote before the answer; None if it did not reason.
    reasoning: str | None = None
    #: The tokens of the reasoning and its markers; None if unknown.
    reasoning_tokens: int | None = None
    #: As in a `Message`.
    tool_calls: list[dict[str, Any]] | None = None
    #: Earlier calls of a server for the request that may have been charged: their answers were late or unusable.
    repeats: int = 0


class Judged(Struct, frozen=True, tag="judged"):
    """A raw score: a sum of log-probabilities in nats, a logit, a verdict (1.0 right, 0.0 wrong), a judge's mean."""

    id: int
    value: float
    #: Number of tokens summed over, for a log-likelihood.
    n_tokens: int | None = None
    #: The log-likelihood of the reasoning and its number of tokens; `value` and `n_tokens` are those of the answer.
    reasoning_value: float | None = None
    reasoning_n_tokens: int | None = None
    #: The other statistics of a log-likelihood's tokens, of the "answer" and, if there is one, the "reasoning": see
    #: `persyn.method.learnability.Statistics`.
    statistics: dict[str, dict[str, float]] | None = None
    #: What is needed to audit the value: parsed forms, versions, dtype.
    detail: dict[str, Any] = {}
    #: Of a judge's replies, as in `Generated`.
    prompt_tokens: int | None = None
    response_tokens: int | None = None
    repeats: int = 0


class Routed(Struct, frozen=True, tag="routed"):
    """K scores, in head order; only the differences of a router's scores are meaningful."""

    id: int
    scores: list[float]
    #: What decided them, if requested: `persyn.router.kinds.base.Explanation` as plain values.
    explanation: list[dict[str, Any]] = []


class Fitted(Struct, frozen=True, tag="fitted"):
    """A router's checkpoint and its metrics on the hold-out prompts."""

    id: int
    folder: str
    sha256: str
    metrics: dict[str, Any]
    #: P rows of K scores, in the order of the request's prompts.
    scores: list[list[float]]
    #: The same by routers that were fitted without the prompt; None for hold-out prompts. Empty for a tuned backbone.
    cross_fitted: list[list[float] | None] = []


class Failed(Struct, frozen=True, tag="failed"):
    """One request that cannot be served, and why; other requests are unaffected."""

    id: int
    #: A machine-readable code, then details: "too_long: 9,213 tokens, the model takes 8,192".
    reason: str
    #: Tokens that were computed all the same, as in `Generated`; None if there were none, or their number is unknown.
    prompt_tokens: int | None = None
    response_tokens: int | None = None
    #: Calls of a server that may have been charged, as in `Generated`, the last one included if it counted no tokens.
    repeats: int = 0


def failed(generated: Generated, reason: str) -> Failed:
    """The failure of a response that was generated and cannot be used; a call whose tokens nobody counted repeats."""
    counted = generated.prompt_tokens, generated.response_tokens
    return Failed(generated.id, reason, *counted, generated.repeats + (counted == (None, None)))


Request: TypeAlias = Generate | Judge | Route | Fit | Check
Result: TypeAlias = Generated | Judged | Routed | Fitted | Checked | Failed


class Engine(Protocol):
    """A loaded model that accepts requests and returns each result as soon as it is finished.

    It lives in an engine host, a process of its own, and is only used from that process's main
    thread. It raises `EngineError` when it can no longer serve anything; a problem with a single
    request is a `Failed`.
    """

    #: Name and version of what serves the model, stored with every result: "vllm 0.32.0".
    version: str
    #: How many unfinished requests keep the engine busy.
    window: int

    @property
    def pending(self) -> int:
        """The number of submitted and unfinished requests."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Accept requests; must return at once."""

    def step(self) -> list[Result]:
        """Work for a moment (well under a minute) and return the finished results, if any."""


Tick: TypeAlias = Callable[[], None]
"""Called by an engine during a long step, so that its host does not count as hung."""

LoadEngine: TypeAlias = Callable[[ModelSpec, Tick], Engine]
"""The function `load` of every engine module, which creates the engine."""
