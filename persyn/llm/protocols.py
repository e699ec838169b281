"""What crosses between a worker and an engine host: what to load, requests, results.

Knows no database and no model library. Everything here is a plain value that msgspec
encodes as MessagePack; nothing is ever pickled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeAlias

from msgspec import Struct

from persyn.config import Sampling as Sampling

Message: TypeAlias = dict[str, str]
"""One turn of a conversation: {"role": "system" | "user" | "assistant", "content": ...}."""


class ModelSpec(Struct, frozen=True):
    """What a host loads. Two equal specs can be served by one host."""

    #: A key of `persyn.llm.engines.ENGINES`: vllm, transformers, openai, fake, log_likelihood, reward_model, ...
    engine: str
    #: A local folder, a hub id, or the name a server knows the model by; "" for an engine without a model.
    model: str
    #: A hub commit; None for a local folder or a server.
    revision: str | None = None
    #: GPUs the model needs; 0 runs on the CPU.
    gpus: int = 0
    #: The engine's own arguments, documented by each engine: dtype, max_model_len, base_url, concurrency, ...
    options: dict[str, Any] = {}


class Generate(Struct, frozen=True, tag="generate"):
    """Write one response to a conversation."""

    id: int
    messages: list[Message]
    sampling: Sampling
    seed: int
    #: JSON schema of the response. Engines that can hold a model to it do: vllm, openai, fake; transformers cannot.
    schema: dict[str, Any] | None = None


class Judge(Struct, frozen=True, tag="judge"):
    """Give one response a raw score; which score is the engine's matter."""

    id: int
    messages: list[Message]
    response: str
    #: The reference answer, where the scorer needs one.
    answer: str | None = None
    #: What else the prompt's row said, for scorers that read it.
    meta: dict[str, Any] = {}


class Route(Struct, frozen=True, tag="route"):
    """Score every teacher for one prompt."""

    id: int
    messages: list[Message]
    #: What else the prompt's row said, for a function that reads it.
    meta: dict[str, Any] = {}


class Fit(Struct, frozen=True, tag="fit"):
    """Fit a router to a calibration grid and write its checkpoint.

    conversations: P prompts, calibration first and hold-out last in no particular order.
    rewards:       P rows of K combined rewards, in head order; NaN where a cell is missing.
    is_holdout:    P flags: True is kept out of the fit and measures it.
    folder:        where the checkpoint is to lie; made by the engine, replaced as a whole.
    """

    id: int
    conversations: list[list[Message]]
    rewards: list[list[float]]
    is_holdout: list[bool]
    teachers: list[str]
    tune: str
    seed: int
    folder: str
    #: "weighted" or "equal": see `persyn.router.model.preference_weights`.
    preferences: str = "weighted"


class Check(Struct, frozen=True, tag="check"):
    """Load a teacher's model once and say what would spoil a run with it."""

    id: int
    spec: ModelSpec
    #: What it would be asked, system turn and worked examples included.
    conversations: list[list[Message]]
    max_tokens: int


class Finding(Struct, frozen=True):
    """One thing that was looked at."""

    level: Literal["error", "warning", "ok"]
    topic: str
    message: str


class Checked(Struct, frozen=True, tag="checked"):
    """What was found."""

    id: int
    findings: list[Finding]


class Generated(Struct, frozen=True, tag="generated"):
    """A finished response."""

    id: int
    text: str
    #: "stop" (the model ended it), "length" (max_tokens cut it off), or a server's own word; None: it did not say.
    finish_reason: str | None
    prompt_tokens: int | None
    response_tokens: int | None
    #: From admission to the engine to the last token.
    seconds: float


class Judged(Struct, frozen=True, tag="judged"):
    """A raw score: a sum of log-probabilities in nats, a logit, a verdict (1.0 right, 0.0 wrong), a judge's mean."""

    id: int
    value: float
    #: Tokens summed over, for a log-likelihood.
    n_tokens: int | None = None
    #: What an auditor needs to retrace the value: parsed forms, versions, dtype.
    detail: dict[str, Any] = {}


class Routed(Struct, frozen=True, tag="routed"):
    """K scores, in head order; a router's mean something only by their differences."""

    id: int
    scores: list[float]


class Fitted(Struct, frozen=True, tag="fitted"):
    """A router's checkpoint and how well it does on the hold-out prompts."""

    id: int
    folder: str
    sha256: str
    metrics: dict[str, Any]
    #: P rows of K scores, of the prompts in the request's order.
    scores: list[list[float]]


class Failed(Struct, frozen=True, tag="failed"):
    """One request that cannot be served, and why; the others go on."""

    id: int
    #: Machine-readable first word, then detail: "too_long: 9,213 tokens, the model takes 8,192".
    reason: str


Request: TypeAlias = Generate | Judge | Route | Fit | Check
Result: TypeAlias = Generated | Judged | Routed | Fitted | Checked | Failed


class Engine(Protocol):
    """A loaded model that takes requests and hands each result back as soon as it is finished.

    It lives in an engine host, a process of its own, and is only ever used from that
    process's main thread. It raises `EngineError` when it can serve nothing any more;
    whatever is about one request is a `Failed`.
    """

    #: Name and version of what serves the model, stored with every result: "vllm 0.32.0".
    version: str
    #: How many unfinished requests keep the engine full.
    window: int

    @property
    def pending(self) -> int:
        """How many requests were submitted and are not finished."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Accept requests; must return at once."""

    def step(self) -> list[Result]:
        """Work for a moment (well under a minute) and return what has finished, perhaps nothing."""


Tick: TypeAlias = Callable[[], None]
"""Called by an engine inside a long step, so that its host is not taken for hung."""

Load: TypeAlias = Callable[[ModelSpec, Tick], Engine]
"""How an engine is made: the one function every engine module offers as `load`."""
