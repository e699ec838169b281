"""Define the facts of a report as plain data, from which figures are drawn and templates filled."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from persyn.analysis.compare import Comparison
from persyn.analysis.spending import Spending
from persyn.analysis.summary import Summary
from persyn.analysis.watch import Failures
from persyn.method.intervals import Interval
from persyn.method.routing_metrics import Believed, Hits

if TYPE_CHECKING:
    from persyn.analysis.refits import Curve


class Groups(Struct, frozen=True):
    """How the prompts of each group were distributed over teachers."""

    #: The metadata field that defines the groups.
    field: str
    #: The most frequent values first; all others are "(others)", prompts without the field "(none)".
    groups: list[str]
    teachers: list[str]
    #: Numbers of prompts: one row per teacher, one column per group.
    prompts: list[list[int]]


class TeacherMeans(Struct, frozen=True):
    """A teacher's means over the grid; None without scores."""

    teacher: str
    quality: Interval | None
    learnability: Interval | None


class RewardShape(Struct, frozen=True):
    """A histogram of one teacher's rewards on the grid, with bins of equal width."""

    teacher: str
    mean: float
    counts: list[int]


class Rewards(Struct, frozen=True):
    """Histograms of all teachers' rewards over the same bins, in ascending order."""

    alpha: float
    normalise: str
    lowest: float
    highest: float
    teachers: list[RewardShape]


class AlphaPoint(Struct, frozen=True):
    """The best teachers at one weight of learnability."""

    alpha: float
    #: Share of the grid's prompts on which each teacher, in head order, has the best reward; ties share a prompt.
    winners: list[float]
    #: The position in head order of the teacher with the best mean reward.
    best: int
    #: Mean reward on the hold-out by strategy.
    strategies: dict[str, float]


class Alphas(Struct, frozen=True):
    """The effect of the weight of learnability."""

    #: The run's own alpha.
    alpha: float
    teachers: list[str]
    points: list[AlphaPoint]


class Savings(Struct, frozen=True):
    """Actual spending, and an estimate if all teachers answered all prompts; None where unknown."""

    tokens: int
    tokens_generate_all: int
    #: US dollars.
    cost: float | None
    cost_generate_all: float | None
    #: Whether the run is done, so that the spending is final.
    is_all: bool


class StagePace(Struct, frozen=True):
    """Rows that a stage finished, per bin."""

    stage: str
    rows: list[float]
    #: Rows of all its jobs, including unfinished ones; rows that were planned again count once.
    planned: int


class Timeline(Struct, frozen=True):
    """Progress over time, with a job's rows spread evenly from its first claim to its end."""

    #: Since the first claim, in bins of equal width.
    seconds: float
    stages: list[StagePace]


class ModelFacts(Struct, frozen=True):
    """A model of the run as an immutable version in the store."""

    #: Its part in the run: student, teacher, quality or learnability.
    part: str
    name: str
    #: What runs it: an engine, or a kind of scorer.
    kind: str
    model: str
    revision: str | None
    template_hash: str | None
    fingerprint: str
    license: str | None = None


class RouterFacts(Struct, frozen=True):
    """The run's router."""

    kind: str
    backbone: str
    revision: str | None
    tune: str
    path: str
    sha256: str
    fingerprint: str
    #: Of the packages that it was fitted with.
    versions: dict[str, str]
    metrics: dict[str, Any]

    @property
    def reads(self) -> list[str]:
        """The models and fields that it reads."""
        models = {"backbone": self.backbone, "embedding": self.metrics.get("embedding"), "tfidf": "words"}
        found = [models[name] or name for name in self.metrics.get("encoders", ["backbone"])]
        return [*found, *(f"field {name}" for name in self.metrics.get("features", []))]

    @property
    def candidates(self) -> list[dict[str, Any]]:
        """The kinds that it was chosen from; empty if its kind was given."""
        return list(self.metrics.get("candidates", []))


class Shown(Struct, frozen=True):
    """One response of an example."""

    teacher: str
    #: The response, or the reason why it failed.
    text: str | None
    #: What the teacher wrote before its answer.
    reasoning: str | None
    failure: str | None
    quality: float | None
    learnability: float | None
    reward: float | None


class ExampleFacts(Struct, frozen=True):
    """A prompt with its teacher's response and the best response of another teacher; None if there is none."""

    prompt_id: int
    role: str
    reason: str
    margin: float | None
    text: str
    chosen: Shown
    best_other: Shown | None


class Report(Struct, frozen=True):
    """All facts of a report; None or empty means not available (yet), with the reason in `absent`."""

    written_at: datetime
    #: Of the packages that wrote the report.
    versions: dict[str, str]
    created_at: datetime
    finished_at: datetime | None
    config: dict[str, Any]
    config_hash: str
    #: The scorers of quality, and its unit.
    quality: str
    unit: str
    #: That of learnability, with its definition if it is not the mean log-likelihood; None if it is not scored.
    learnability_unit: str | None
    models: list[ModelFacts]
    #: Serving engine -> number of the run's responses.
    engines: dict[str, int]
    router: RouterFacts | None
    facts: Summary
    #: What each recalibration asked and changed, in sentences.
    recalibrations: list[str]
    failures: list[Failures]
    groups: Groups | None
    means: list[TeacherMeans]
    rewards: Rewards | None
    curve: Curve | None
    hits: Hits | None
    reliability: list[Believed]
    alphas: Alphas | None
    comparison: Comparison | None
    savings: Savings | None
    spending: Spending
    timeline: Timeline | None
    examples: list[ExampleFacts]
    #: Missing part of the report -> reason.
    absent: dict[str, str]

    @property
    def student(self) -> ModelFacts | None:
        """The student; None for a run without one."""
        return next((model for model in self.models if model.part == "student"), None)

    @property
    def scorers(self) -> list[ModelFacts]:
        """The scorers of quality."""
        return [model for model in self.models if model.part == "quality"]

    @property
    def teachers(self) -> list[ModelFacts]:
        """The teachers in head order."""
        return [model for model in self.models if model.part == "teacher"]
