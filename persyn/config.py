"""The run file's tables as frozen, strictly validated structs.

Every key is a field below and an unknown key is an error, so that a misspelled key cannot silently
become a default. The comment above a field is also its description in docs/run-file.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct

from persyn import json_schema

Name = Annotated[str, Meta(title="name", min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:+@-]*$")]
#: The engine of a teacher, or the kind of a scorer, whose results were imported and that does nothing here.
IMPORTED = "imported"
#: The kind of a scorer whose scores are computed from those of several others.
COMBINED = "combined"
#: Names of records in a registry; a run file is validated against it when it is read, so that a stored run can be shown
#: where a plug-in is not installed.
TeacherEngine = Annotated[str, Meta(extra={"kinds": "teacher"})]
JudgeEngine = Annotated[str, Meta(extra={"kinds": "judge"})]
StudentEngine = Annotated[str, Meta(extra={"kinds": "student"})]
QualityKind = Annotated[str, Meta(extra={"kinds": "quality"})]
StrategyKind = Annotated[str, Meta(extra={"kinds": "strategy"})]
EncoderName: TypeAlias = Literal["backbone", "embedding", "tfidf"]
RouterKindName = Annotated[str, Meta(extra={"kinds": "router kind"})]
LearnabilityKind = Annotated[str, Meta(extra={"kinds": "learnability"})]
#: A teacher's name may be a hub id.
TeacherName = Annotated[
    str, Meta(title="name", min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:+@/-]*$")
]
ModelName = Annotated[str, Meta(title="folder or hub id")]
#: The divisor of a log-likelihood: "response" means the sum over all its tokens.
Per: TypeAlias = Literal["token", "character", "response"]
#: The part of a response whose log-likelihood counts, where the teacher reasoned.
On: TypeAlias = Literal["answer", "reasoning", "both"]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
UnitInterval = Annotated[float, Meta(ge=0, le=1)]
NonNegative = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
#: The largest number of responses of one teacher to one prompt.
MOST_SAMPLES = 100
Samples = Annotated[int, Meta(ge=1, le=MOST_SAMPLES)]


def fingerprint_of(value: Any) -> str:
    """SHA-256 of a value's canonical JSON; equal values have equal fingerprints."""
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()


class _Table(Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the run file."""


class RepetitionDetection(_Table, frozen=True):
    """When a response counts as an endless repetition: its last tokens are one pattern, repeated."""

    #: Maximum number of tokens of the pattern.
    max_pattern_size: Positive
    #: How often the pattern must occur in a row.
    min_count: Annotated[int, Meta(ge=2)]
    #: Minimum number of tokens of the pattern.
    min_pattern_size: Positive = 1

    def __post_init__(self) -> None:
        if self.min_pattern_size > self.max_pattern_size:
            raise ValueError(
                f"min_pattern_size {self.min_pattern_size} is larger than max_pattern_size {self.max_pattern_size}"
            )


#: The fields of `Sampling` in the first release.
_FIRST = frozenset({"max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "stop"})


class Sampling(_Table, frozen=True):
    """How responses are sampled. `max_tokens` always bounds their length."""

    #: Maximum number of tokens of a response; lowered to the room left in the context.
    max_tokens: Positive = 1024
    #: Sampling temperature; 0 is greedy decoding.
    temperature: Annotated[float, Meta(ge=0)] = 0.7
    #: Nucleus sampling: sample from the most likely tokens with this total probability.
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    #: Sample from this many of the most likely tokens; 0 considers every token.
    top_k: NonNegative = 0
    #: Exclude tokens that are less likely than this share of the most likely token's probability; 0 excludes none.
    min_p: UnitInterval = 0.0
    #: Values above 1 make tokens that already occur less likely; 1 has no effect.
    repetition_penalty: Annotated[float, Meta(gt=0)] = 1.0
    #: Subtracted once from the logit of each token that occurs in the response.
    presence_penalty: Penalty = 0.0
    #: Subtracted from the logit of each token as often as it occurs in the response.
    frequency_penalty: Penalty = 0.0
    #: End a response that repeats itself; it fails as `repetition`. None: it goes on until `max_tokens`.
    repetition_detection: RepetitionDetection | None = None
    #: Texts that end a response; they are not part of it.
    stop: list[str] = []
    #: Maximum number of tokens of reasoning; then its closing marker is forced, and the answer begins. None: only
    #: `max_tokens` limits it. Requests to a server have vLLM's field `thinking_token_budget`.
    max_reasoning_tokens: NonNegative | None = None
    #: How much a model should reason, in its own words: `low`, `medium`, `high`. A variable of the chat template, or a
    #: field of a server's request. None: the model's default.
    reasoning_effort: str | None = None

    def given(self) -> dict[str, Any]:
        """The fields, later ones only if they are set: a new one leaves stored fingerprints as they are."""
        default = msgspec.to_builtins(Sampling())
        said: dict[str, Any] = msgspec.to_builtins(self)
        return {name: value for name, value in said.items() if name in _FIRST or value != default[name]}


class RunTable(_Table, frozen=True):
    """[run]: the run's name and the method's parameters."""

    #: The run's name, unique in the store.
    name: Name
    #: What the run is about; only a label. The scorer is set in `[quality]`.
    setting: Literal["math", "instruct"]
    #: Weight of learnability; quality has the remaining weight.
    alpha: UnitInterval = 0.4
    #: How raw scores are normalised within a prompt.
    normalise: Literal["minmax", "zscore", "rank"] = "minmax"
    #: [How well a response suits the student](method.md#definitions-of-learnability), computed from the student's pass
    #: over it.
    learnability: LearnabilityKind = "log_likelihood"
    #: `log_likelihood`: the divisor of a response's log-likelihood; `response` means the sum over all its tokens.
    learnability_per: Per = "token"
    #: Which part of a response learnability is computed on, where the teacher reasoned: its answer given the reasoning,
    #: the reasoning, or `both`.
    learnability_on: On = "both"
    #: Number of prompts answered by every teacher, including the hold-out; at most the number of prompts.
    calibration: Positive = 2500
    #: Number of responses of every teacher to each calibration prompt. Quality and learnability are then means over
    #: them, and the router knows how certain they are; the calibration grid costs this many times as much. Needs a
    #: temperature above 0. Stored responses count.
    samples: Samples = 1
    #: Share of the calibration prompts excluded from the fit, to measure the router and to compare strategies.
    holdout: Annotated[float, Meta(ge=0, lt=1)] = 0.1
    #: Seed of the calibration draw, the responses and the fit.
    seed: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    #: Maximum number of prompts in one job, the unit that a worker claims. With fewer than 128 times as many prompts,
    #: jobs are smaller, down to 8 prompts. `score` divides it by the number of teachers, `assign` multiplies it by 8.
    job_prompts: Positive = 256
    #: How long to wait for an unavailable server, in seconds, before the run fails; 0 means not to wait. Waiting uses
    #: no attempts. A server that rejects every request (no credit, a wrong key) is not waited for. It may be changed
    #: later: `persyn run start` with the changed file.
    outage_seconds: Annotated[float, Meta(ge=0)] = 3600.0


class PromptsTable(_Table, frozen=True):
    """[prompts]: where the prompts come from; either `file` or `source`."""

    #: Paths to import: JSONL, JSON, CSV (each also as `.gz`) or Parquet, recognised by the file's extension.
    file: str | list[str] = []
    #: Instead of `file`: names of files whose prompts were imported before; `persyn prompts stats` lists them.
    source: str | list[str] = []
    #: The hash of each file's content, by which a run recognises it at any path; set by PerSyn at the start of the run.
    sha256: list[str] = []

    def __post_init__(self) -> None:
        if bool(self.file) == bool(self.source):
            given = "both" if self.file else "neither"
            raise ValueError(f"give either file (to be imported) or source (already imported), got {given}")

    @property
    def files(self) -> list[str]:
        """The files to import."""
        return [self.file] if isinstance(self.file, str) else self.file

    @property
    def sources(self) -> list[str]:
        """The names of the files that were imported before."""
        return [self.source] if isinstance(self.source, str) else self.source


class StudentTable(_Table, frozen=True):
    """[student]: the model the dataset is for. It may be left out at `alpha = 0`."""

    #: Its name in reports.
    name: Name
    #: The student's weights before training.
    model: ModelName
    #: Hub commit, branch or tag; stored as a commit.
    revision: str | None = None
    #: GPUs for scoring; 0 is the CPU.
    gpus: NonNegative = 0
    #: For the strategy `family-strong`: one of the teachers' families.
    family: str | None = None
    #: Options of its engine.
    options: dict[str, Any] = {}
    #: The engine that computes learnability.
    engine: StudentEngine = "log_likelihood"


class QualityTable(_Table, frozen=True):
    """[quality]: how the quality of a response is scored."""

    #: `math`: 1 if the final answer equals the reference, else 0. `instructions`: 1 if all instructions in the prompt's
    #: row are followed, else 0. `code`: 1 if the code in the response passes all tests in the prompt's row, else 0.
    #: `reward_model`: its logit. `judge`: an LLM's rating, or its comparison with the reference answer. `python`: your
    #: own function. `imported`: a score that came with imported responses. `fake`: meaningless numbers, for trying
    #: things out.
    kind: QualityKind
    #: `reward_model`: a folder or hub id of a sequence classifier with one label; an encoder needs a chat template.
    #: `judge`: a folder, a hub id, or a server's name for it. `python`: `module:function`, on every worker's
    #: `PYTHONPATH`. `imported`: the field that was given to `persyn responses import --score`.
    model: str = ""
    #: Hub commit, branch or tag; stored as a commit. For a judge behind a server: text that says which model it is.
    revision: str | None = None
    #: GPUs for scoring; 0 is the CPU, or a server.
    gpus: NonNegative = 0
    #: Options of its engine, which has the same name as the kind.
    options: dict[str, Any] = {}


class QualityPart(QualityTable, frozen=True):
    """[[quality]]: one of several scorers that together are the quality; it has either a weight or is a gate."""

    #: The weight of its raw value in the sum of the scorers that are not gates. It may be negative.
    weight: float | None = None
    #: Whether it must be passed: if its value is below 1, the quality is 0. Needs a scorer that says what is right.
    gate: bool = False

    def __post_init__(self) -> None:
        if self.gate == (self.weight is not None):
            raise ValueError("give either weight, a number, or gate = true" + ", not both" * self.gate)
        if self.weight == 0:
            raise ValueError("weight is 0, so the scorer would have no effect; remove it, or give another weight")


class RouterTable(_Table, frozen=True):
    """[router]: the model that predicts which teacher's response will have the highest reward."""

    #: How it predicts, see below. `auto` compares all kinds by cross-validation on the calibration prompts, and takes
    #: the static ranking if that is within 1.5 standard errors of the best kind, else `stacked` if that is within one,
    #: else the best; with costs or limits, the kind that predicts rewards most surely. None: `auto`, or `head` if
    #: `tune` says what is trained.
    kind: RouterKindName | None = None
    #: What it reads of a prompt's text: states of the `backbone`, a sentence `embedding`, weights of words (`tfidf`);
    #: each kind reads those that it can, together. A model that no kind reads is not loaded.
    encoders: list[EncoderName] = msgspec.field(default_factory=lambda: ["backbone"])
    #: Fields of a prompt's row whose values it reads too, such as a subject, or `source`.
    features: list[str] = []
    #: For `embedding`: a model folder or hub id in the layout of sentence-transformers.
    embedding: ModelName | None = None
    #: Hub commit, branch or tag of the embedding.
    embedding_revision: str | None = None
    #: Its hub commit, or its folder's digest; set by PerSyn at the start of the run.
    embedding_version: str | None = None
    #: The language model of the `backbone` encoder.
    backbone: ModelName = "Qwen/Qwen2.5-1.5B"
    #: Hub commit, branch or tag.
    revision: str | None = None
    #: Its hub commit, or its folder's digest; set by PerSyn at the start of the run.
    version: str | None = None
    #: What a `head` trains: all weights of the backbone (as in the paper), low-rank adapters (needs `persyn[lora]`), or
    #: only the head (takes seconds). `auto` is `full` if it beats `head` on validation prompts by more than chance,
    #: else `head`; under `kind = "auto"`, `full` is compared only if a head was chosen, and on a GPU.
    tune: Literal["auto", "full", "lora", "head"] = "auto"
    #: How preferences are weighted in the fit: by the difference of their rewards, or equally (as in the paper).
    preferences: Literal["weighted", "equal"] = "weighted"
    #: 0 or 1: a router runs on one GPU or on the CPU.
    gpus: Annotated[int, Meta(ge=0, le=1)] = 0
    #: Options of `router_fit`; `dtype` and `batch_tokens` also apply to routing.
    options: dict[str, Any] = {}
    #: The engine that fits the router and routes.
    engine: Literal["router", "fake"] = "router"
    #: The id of a router that `persyn router import` has stored. It is [used as it
    #: is](howto/add-prompts.md#use-a-router-in-another-run), without calibration; besides, only `gpus` and `options`
    #: may be set.
    fitted: str | None = None

    @property
    def chosen_kind(self) -> str:
        """The kind, by default one that follows from `tune`."""
        return self.kind or ("auto" if self.tune == "auto" else "head")


#: The keys of [strategy] about costs and limits, which configurations of earlier versions do not have.
LIMITS = ("cost_weight", "budget", "capacity", "min_share", "max_share")


class StrategyTable(_Table, frozen=True):
    """[strategy]: how a teacher is chosen for each prompt.

    persyn, static and car learn from the calibration grid, a Python function receives it, oracle has every teacher
    answer every prompt, and the others need no grid.
    """

    #: How a teacher is chosen for a prompt.
    kind: StrategyKind = "persyn"
    #: `persyn`: who answers the remaining prompts where the calibration prompts do not show that routing pays (the
    #: verdict `cannot tell`, or none): the best single teacher, as where it is `do not route`, or the router's choice.
    #: Not set: `static`; a run of a version without verdicts always routes.
    #: Within costs and limits, see [the method](method.md#within-limits).
    when_unsure: Literal["static", "route"] | None = None
    #: `persyn`: the reward that a unit of cost has to bring: a response counts as its expected reward, less this times
    #: its expected cost in US dollars, or in 1,000 response tokens if no teacher has prices. See
    #: [costs and limits](howto/spend-less.md).
    cost_weight: Annotated[float, Meta(ge=0)] | None = None
    #: `persyn`: maximum expected cost, in the same unit, of all responses to the remaining prompts, those without
    #: responses in the calibration grid.
    budget: Annotated[float, Meta(ge=0)] | None = None
    #: `persyn`: maximum number of the remaining prompts for a teacher, by teacher: `{ NAME = 1000 }`.
    capacity: dict[str, NonNegative] | None = None
    #: `persyn`: minimum share of the remaining prompts for each teacher, or by teacher: `{ NAME = 0.1 }`.
    min_share: UnitInterval | dict[str, UnitInterval] | None = None
    #: `persyn`: maximum share of the remaining prompts for each teacher, or by teacher.
    max_share: UnitInterval | dict[str, UnitInterval] | None = None
    #: `mix`: share of prompts for the largest teacher; the smallest answers the others.
    ratio: UnitInterval = 0.2
    #: `car`: weight of the student's loss.
    beta: Annotated[float, Meta(ge=0)] = 3.0
    #: `python`: `module:function`, on every worker's `PYTHONPATH`.
    model: str = ""
    #: `python`: `sha256:...` of the function's file; set by PerSyn at the start of the run.
    revision: str | None = None
    #: `python`: GPUs it needs; 0 is the CPU.
    gpus: NonNegative = 0
    #: `python`, and strategies of plug-ins: additional arguments of the function.
    options: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """The strategy's display name; for a Python function, its `module:function`."""
        return self.model or self.kind

    @property
    def is_limited(self) -> bool:
        """Whether costs or limits take part in the choice."""
        return any(getattr(self, key) is not None for key in LIMITS)

    def shares(self, key: Literal["min_share", "max_share"], teachers: Sequence[str]) -> list[float | None]:
        """The share that a key sets for each of these teachers; None where it sets none."""
        given = getattr(self, key)
        return [given.get(name) if isinstance(given, dict) else given for name in teachers]

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of a policy."""
        return {"ratio": self.ratio, "beta": self.beta, **self.options}


class GenerationTable(_Table, frozen=True):
    """[generation]: how many responses the chosen teacher writes for a prompt, and which of them the dataset has.

    With several samples, or with `keep = "correct"`, they are scored by `[quality]` to choose among them.
    """

    #: Maximum number of responses per prompt. Needs a temperature above 0. Stored responses of the teacher count, such
    #: as those of the calibration grid.
    samples: Samples = 1
    #: `best`: the one with the highest quality. `correct`: the first of quality 1 or more; the teacher is asked for
    #: another response until one is correct, and a prompt without one has no row in the dataset. Needs a quality that
    #: says what is right. `all`: every response is a row.
    keep: Literal["best", "correct", "all"] = "best"
    #: `best`: a quality that is good enough: the first response that reaches it is kept, and no more are asked for.
    good_enough: float | None = None
    #: Whether responses are scored by `[quality]` while generation goes on, also where nothing is chosen by it: for
    #: `wrong` in `[fallback]`, and to compare each teacher's quality with what its calibration responses predicted.
    #: `persyn plan` counts the scores of the calibration alone.
    check: bool = False
    #: With `check`, if a teacher's responses become worse than predicted: `stop` asks it nothing more until the run is
    #: resumed, `report` says so and goes on. Not set: `stop`; a run of a version without this key does neither. May be
    #: changed during a run.
    when_worse: Literal["stop", "report"] | None = None

    def __post_init__(self) -> None:
        if self.good_enough is not None and (self.keep != "best" or self.samples == 1):
            raise ValueError('good_enough needs keep = "best" and samples above 1')

    @property
    def is_choice(self) -> bool:
        """Whether the responses of a prompt are scored to choose one of them."""
        return self.keep == "correct" or (self.keep == "best" and self.samples > 1)

    @property
    def is_scored(self) -> bool:
        """Whether the responses of assigned prompts are scored at all."""
        return self.is_choice or self.check

    @property
    def threshold(self) -> float | None:
        """The quality at which no further response is asked for; None means that all are."""
        return 1.0 if self.keep == "correct" else self.good_enough

    @property
    def rows(self) -> int:
        """Rows of the dataset per prompt, at most."""
        return self.samples if self.keep == "all" else 1


#: The order in which the conditions of [fallback] are tested: the first that a response meets is the cause.
Condition: TypeAlias = Literal["refused", "too_long", "failed", "truncated", "wrong"]


class FallbackTable(_Table, frozen=True):
    """[fallback]: the responses that are not used; their prompts go to the strategy's next best teacher."""

    #: Maximum number of further teachers for a prompt. If the last one's response is not used either, the prompt keeps
    #: the first of its responses that has a text.
    attempts: Positive = 1
    #: `failed`: no text, for whatever reason. `refused`, `too_long`: only for this one; `too_long` means that the
    #: prompt does not fit in the model's context. `truncated`: the response ended at `max_tokens`. `wrong`: its quality
    #: is 0, or with `keep = "correct"` no sample is correct; needs a quality that says what is right, and
    #: `generation.check` or a choice among samples.
    on: Annotated[list[Condition], Meta(min_length=1)] = msgspec.field(default_factory=lambda: ["failed", "truncated"])


class Shot(_Table, frozen=True):
    """One worked example shown to a teacher before the prompt."""

    user: str
    assistant: str


class TeacherTable(_Table, frozen=True):
    """[[teachers]]: a model that writes responses. All but descriptive fields and transport are part of its version."""

    #: Its name in reports.
    name: TeacherName
    #: A folder, a hub id, or a server's name for it; for an imported teacher, its name in the imported rows.
    model: str
    #: The engine that runs it. `imported`: it generates nothing here; its responses were imported.
    engine: TeacherEngine = "vllm"
    #: Hub commit, branch or tag; stored as a commit. For a server: any text that says which model it has, where the
    #: name does not (llama-server accepts any, often `default`); another text is another teacher.
    revision: str | None = None
    #: A LoRA adapter of the model: a folder or a hub id, with safetensors. Teachers that differ only in their adapter
    #: share one loaded model.
    adapter: str | None = None
    #: Hub commit, branch or tag of the adapter; stored as a commit.
    adapter_revision: str | None = None
    #: GPUs it needs; 0 for the CPU or a server. May be changed during a run.
    gpus: NonNegative = 1
    #: Options of its engine.
    options: dict[str, Any] = {}
    #: How its responses are sampled.
    sampling: Sampling = Sampling()
    #: A system turn before every prompt; a prompt's own system turn is merged into it.
    system: str | None = None
    #: Worked examples `{ user, assistant }` before every prompt.
    few_shot: list[Shot] = []
    #: JSON schema of its responses; a prompt's own `response_schema` wins.
    response_schema: dict[str, Any] | None = None
    #: Descriptive: the model family it belongs to.
    family: str | None = None
    #: Descriptive: the licence of its responses, stated in [the dataset's card](dataset.md#licences).
    license: str | None = None
    #: Descriptive: number of parameters, in billions.
    params_b: Annotated[float, Meta(gt=0)] | None = None
    #: Descriptive: US dollars per million prompt tokens; none: unknown, or with `litellm` those of its table.
    price_in: Annotated[float, Meta(ge=0)] | None = None
    #: Descriptive: US dollars per million response tokens.
    price_out: Annotated[float, Meta(ge=0)] | None = None

    def __post_init__(self) -> None:
        if self.response_schema is not None and (why := json_schema.flaw_of(self.response_schema)):
            raise ValueError(f"response_schema is not a JSON schema: {why}")

    @property
    def is_greedy(self) -> bool:
        """Whether all its responses to a prompt are the same: the most likely tokens, and nothing is sampled."""
        is_own = "temperature" in self.options.get("omit", ()) or "temperature" in self.options.get("extra", {})
        return self.sampling.temperature == 0 and not is_own


class Limits(_Table, frozen=True):
    """Limits on what may be spent; a key that is not set is no limit."""

    #: Maximum number of tokens, of prompts and responses together.
    tokens: Positive | None = None
    #: Maximum number of US dollars, at `price_in` and `price_out`. Models behind servers then need both.
    usd: Annotated[float, Meta(gt=0)] | None = None
    #: Maximum number of hours that engines work for the run, times their GPUs; an engine on the CPU counts as one GPU.
    #: Models behind servers have no engine here.
    engine_hours: Annotated[float, Meta(gt=0)] | None = None
    #: No request is sent after this time; with its time zone: `2026-12-24T18:00:00Z`.
    deadline: Annotated[datetime, Meta(tz=True)] | None = None


class BudgetTable(Limits, frozen=True):
    """[budget]: what a run may spend.

    A run stops before it would exceed a limit. Limits may be changed later: `persyn run start` with the changed file,
    which also continues a run that has stopped for its budget.
    """

    #: Limits of single teachers, by name: `[budget.teachers.NAME]`.
    teachers: dict[str, Limits] = {}
    #: Limits of single stages: `[budget.stages.calibrate]`.
    stages: dict[str, Limits] = {}


class RunConfig(_Table, frozen=True, kw_only=True):
    """The whole run file."""

    run: RunTable
    prompts: PromptsTable
    student: StudentTable | None = None
    quality: QualityTable | list[QualityPart]
    teachers: list[TeacherTable]
    router: RouterTable = RouterTable()
    strategy: StrategyTable = StrategyTable()
    generation: GenerationTable = GenerationTable()
    fallback: FallbackTable | None = None
    budget: BudgetTable | None = None

    def __post_init__(self) -> None:
        if len(self.teachers) < 2:
            raise ValueError(f"a run needs two or more teachers, got {len(self.teachers)}")
        if self.student is None and self.run.alpha:
            raise ValueError(
                f"[student] is missing: at alpha {self.run.alpha:g}, rewards depend on learnability, which a student "
                "computes; add [student], or set alpha = 0 for rewards by quality alone. 'persyn init' writes a "
                "complete file"
            )
        reads_first_tokens = self.student is not None and "response_tokens" in self.student.options
        if self.run.learnability_per != "token" and reads_first_tokens:
            raise ValueError(
                f"learnability_per {self.run.learnability_per} cannot be combined with the student's response_tokens"
            )
        if self.run.learnability_on == "answer" and reads_first_tokens:
            raise ValueError(
                "learnability_on answer cannot be combined with the student's response_tokens: the first tokens of a "
                "response may all be reasoning"
            )
        if isinstance(self.quality, list) and len(self.quality) < 2:
            raise ValueError(
                f"[[quality]] combines two or more scorers, got {len(self.quality)}; write [quality] for a single one"
            )
        names = [teacher.name for teacher in self.teachers]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"several teachers have the same name: {', '.join(twice)}")

    @property
    def scorers(self) -> Sequence[QualityTable]:
        """The tables of the scorers of quality: one, or several that are combined."""
        return scorers_of(self.quality)

    def frozen(self) -> dict[str, Any]:
        """The configuration as the store keeps it: without later keys that are not set, as before they existed."""
        built: dict[str, Any] = msgspec.to_builtins(self)
        tables = ((built, "fallback"), (built, "budget"), (built["router"], "fitted"))
        for table, key in (*tables, (built["generation"], "check"), (built["generation"], "when_worse")):
            if not table[key]:
                del table[key]
        own = built["strategy"]
        built["strategy"] = {key: value for key, value in own.items() if value is not None or key not in LIMITS}
        return built

    def digest(self) -> str:
        """SHA-256 of the configuration without its budget, which affects no result."""
        return fingerprint_of({key: table for key, table in self.frozen().items() if key != "budget"})


def scorers_of(quality: QualityTable | Sequence[QualityTable]) -> Sequence[QualityTable]:
    """The tables of the scorers of a quality: one, or several that are combined."""
    return [quality] if isinstance(quality, QualityTable) else quality


def load_config(frozen: dict[str, Any]) -> RunConfig:
    """Decode the configuration of a stored run."""
    return msgspec.convert(frozen, RunConfig)
