"""What a report shows of a run, as plain facts: what figures are drawn from, and templates filled with."""

from __future__ import annotations

from msgspec import Struct

from persyn.bootstrap import Interval


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


class Hits(Struct, frozen=True):
    """Hit@k on the hold-out for k = 1, 2, ...: the router beside what reads no prompt."""

    n_prompts: int
    router: list[float]
    static: list[float]
    random: list[float]


class Believed(Struct, frozen=True):
    """Preferences that the router predicted about as surely."""

    #: Mean win probability of the teacher it favours, 0.5 to 1.
    predicted: float
    #: The share of them, by weight, that came true.
    came_true: float
    preferences: int


class AlphaPoint(Struct, frozen=True):
    """What would be best at one weight of learnability."""

    alpha: float
    #: Share of the grid's prompts that each teacher, in head order, has the best reward of; equals share a prompt.
    winners: list[float]
    #: The teacher with the best mean reward, by its place in head order; None without any.
    best: int | None
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
    tokens_generate_all: int | None
    #: US dollars.
    cost: float | None
    cost_generate_all: float | None


class StagePace(Struct, frozen=True):
    """Rows that a stage finished, by bin."""

    stage: str
    rows: list[float]


class Timeline(Struct, frozen=True):
    """When work was done. A job's rows are spread evenly over the time from its claim to its end."""

    #: From the first claim; bins of equal width.
    seconds: float
    stages: list[StagePace]
