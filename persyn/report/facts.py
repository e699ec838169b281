"""What a report shows of a run, as plain facts: what figures are drawn from, and templates filled with."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from persyn.analysis.compare import Comparison
from persyn.analysis.summary import Facts
from persyn.analysis.watch import Failures
from persyn.method.intervals import Interval
from persyn.method.routing_metrics import Believed, Hits

if TYPE_CHECKING:
    from persyn.analysis.refits import Curve


class Groups(Struct, frozen=True):
    """How the prompts of each group were shared out among the teachers."""

    #: The field of the prompts' meta that they are grouped by.
    field: str
    #: The values of most prompts first; what is over is "(others)", what lacks the field is "(none)".
    groups: list[str]
    teachers: list[str]
    #: Prompts: one row per teacher, one column per group.
    prompts: list[list[int]]


class TeacherMeans(Struct, frozen=True):
    """A teacher on the grid; None of a teacher without a score."""

    teacher: str
    quality: Interval | None
    learnability: Interval | None


class RewardShape(Struct, frozen=True):
    """How one teacher's rewards are spread: responses of the grid by reward, in bins of equal width."""

    teacher: str
    mean: float
    counts: list[int]


class Rewards(Struct, frozen=True):
    """How all teachers' rewards are spread over the same bins, from lowest to highest reward."""

    alpha: float
    normalise: str
    lowest: float
    highest: float
    teachers: list[RewardShape]


class AlphaPoint(Struct, frozen=True):
    """What would be best at one weight of learnability."""

    alpha: float
    #: Share of the grid's prompts that each teacher, in head order, has the best reward of; equals share a prompt.
    winners: list[float]
    #: The teacher with the best mean reward, by its place in head order.
    best: int
    #: Mean reward on the hold-out by strategy.
    strategies: dict[str, float]


class Alphas(Struct, frozen=True):
    """What the weight of learnability decides."""

    #: The run's own.
    alpha: float
    teachers: list[str]
    points: list[AlphaPoint]


class Savings(Struct, frozen=True):
    """What was spent, beside what all teachers answering all prompts would have; None where it is unknown."""

    tokens: int
    tokens_generate_all: int
    #: US dollars.
    cost: float | None
    cost_generate_all: float | None
    #: Whether the run is done, and no more will be spent.
    is_all: bool


class StagePace(Struct, frozen=True):
    """Rows that a stage finished, by bin."""

    stage: str
    rows: list[float]
    #: Rows of all its jobs, of those too that are not done; what is planned again counts once.
    planned: int


class Timeline(Struct, frozen=True):
    """When work was done. A job's rows are spread evenly over the time from its first claim to its end."""

    #: From the first claim; bins of equal width.
    seconds: float
    stages: list[StagePace]


class Model(Struct, frozen=True):
    """A model of the run as the store knows it: an immutable version."""

    #: What it is in the run: student, teacher, quality, learnability.
    part: str
    name: str
    #: What runs it: an engine, or a scorer's kind.
    kind: str
    model: str
    revision: str | None
    template_hash: str | None
    fingerprint: str
    license: str | None = None


class Fitted(Struct, frozen=True):
    """The run's router."""

    backbone: str
    revision: str | None
    tune: str
    path: str
    sha256: str
    fingerprint: str
    #: Of the packages it was fitted with.
    versions: dict[str, str]
    metrics: dict[str, Any]


class Shown(Struct, frozen=True):
    """One response of an example."""

    teacher: str
    #: What it wrote, or why it wrote nothing.
    text: str | None
    failure: str | None
    quality: float | None
    learnability: float | None
    reward: float | None


class Example(Struct, frozen=True):
    """A prompt, what its teacher wrote, and what the best of the others did; None where no other was asked."""

    prompt_id: int
    role: str
    reason: str
    margin: float | None
    text: str
    chosen: Shown
    best_other: Shown | None


class Report(Struct, frozen=True):
    """All of it. What is None or empty is not there, or not yet; `absent` says why."""

    written_at: datetime
    #: Of the packages that wrote it.
    versions: dict[str, str]
    created_at: datetime
    finished_at: datetime | None
    config: dict[str, Any]
    config_hash: str
    #: The unit of quality.
    unit: str
    models: list[Model]
    #: What served the teachers' models, and how many of the run's responses.
    engines: dict[str, int]
    router: Fitted | None
    facts: Facts
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
    timeline: Timeline | None
    examples: list[Example]
    #: What of the report is not there: why.
    absent: dict[str, str]
