"""What every kind of router reads, learns from and answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from msgspec import Struct
from numpy.typing import NDArray

from persyn.llm.protocols import Tick
from persyn.method.rewards import Indices, Matrix

if TYPE_CHECKING:
    from persyn.router.kinds.crossfit import Bench

Source: TypeAlias = Literal["states", "texts", "fields"]
"""A part of `Prompts`."""

Arrays: TypeAlias = Mapping[str, NDArray[Any]]
"""Numbers by name, for safetensors."""

Values: TypeAlias = Mapping[str, Any]
"""Plain values by name, for JSON."""


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """What routers read of P prompts. A source that was not chosen is empty."""

    #: (P, H) states by the name of their encoder, "backbone" or "embedding".
    states: Mapping[str, Matrix] = field(default_factory=dict)
    #: (P,) for TF-IDF.
    texts: Sequence[str] = ()
    #: (P,) labels by the name of a metadata field; None where a row has none.
    fields: Mapping[str, Sequence[str | None]] = field(default_factory=dict)

    def __len__(self) -> int:
        return next((len(each) for each in (*self.states.values(), *self.fields.values(), self.texts)), 0)

    @property
    def sources(self) -> frozenset[Source]:
        """The sources that there are."""
        given: dict[Source, Any] = {"states": self.states, "texts": self.texts, "fields": self.fields}
        return frozenset(name for name, values in given.items() if len(values))

    def take(self, indices: Indices) -> Prompts:
        """The prompts at some indices."""
        return Prompts(
            {name: states[indices] for name, states in self.states.items()},
            [self.texts[i] for i in indices] if len(self.texts) else (),
            {name: [labels[i] for i in indices] for name, labels in self.fields.items()},
        )


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """The rewards of P prompts that a router learns from.

    rewards: (P, K), NaN where missing. errors: (P, K) their standard errors; None if unknown.
    preferences: how preferences are weighted, "weighted" or "equal". seed: draws folds and clusters.
    """

    rewards: Matrix
    errors: Matrix | None = None
    preferences: str = "weighted"
    seed: int = 0

    def __len__(self) -> int:
        return len(self.rewards)

    def take(self, indices: Indices) -> Examples:
        """The examples at some indices."""
        errors = None if self.errors is None else self.errors[indices]
        return Examples(self.rewards[indices], errors, self.preferences, self.seed)


class Near(Struct, frozen=True, tag="neighbours"):
    """The most similar calibration prompts: their indices among those fitted to, and similarities, -1 to 1."""

    prompts: list[int]
    similarities: list[float]


class Word(Struct, frozen=True):
    """A word or a pair of words of the prompt, and what it adds to each teacher's reward."""

    text: str
    weights: list[float]


class Words(Struct, frozen=True, tag="words"):
    """The words of the prompt that move the scores most."""

    words: list[Word]


class Group(Struct, frozen=True, tag="group"):
    """The prompt's group: its label in a field, or a number where `field` is "cluster".

    n_prompts: calibration prompts in it. scores: what it adds to each teacher's reward, after shrinkage.
    """

    field: str
    label: str
    n_prompts: int
    scores: list[float]


class Part(Struct, frozen=True):
    """A router within a stacked one, the weight of its scores, and what it says of the prompt."""

    kind: str
    weight: float
    explanation: list[Explanation]


class Mix(Struct, frozen=True, tag="mix"):
    """The routers of which a stacked one is a mix."""

    parts: list[Part]


Explanation: TypeAlias = Near | Words | Group | Mix


class Predictor(Protocol):
    """A fitted router."""

    @property
    def settings(self) -> Values:
        """What was chosen in the fit; a fit that is given them does not choose again."""

    def scores(self, prompts: Prompts) -> Matrix:
        """(P, K) scores, higher is better; only differences within a prompt have a meaning."""

    def state(self) -> tuple[Arrays, Values]:
        """Everything `RouterKind.restore` needs."""

    def explain(self, prompts: Prompts) -> list[list[Explanation]]:
        """What decided each prompt's scores; empty where there is nothing to say."""


class Fit(Protocol):
    """Fits a router of a kind."""

    def __call__(
        self, prompts: Prompts, examples: Examples, *, tick: Tick = ..., settings: Values | None = ...
    ) -> Predictor:
        """Fit to calibration prompts.

        tick:     called between the steps.
        settings: of an earlier fit, which are then not chosen again.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterKind:
    """A kind of router as the rest of PerSyn knows it."""

    name: str
    #: One sentence for the documentation.
    summary: str
    fit: Fit
    restore: Callable[[Arrays, Values], Predictor]
    #: Whether fits to parts of the prompts take the settings of the fit to all, because choosing takes long. It favours
    #: the kind in a comparison, unless it chooses settings with as much reserve as the head.
    reuses_settings: bool = False
    #: For a kind made of others: the router and its (P, K) out-of-fold scores, from those of the others on a bench.
    mix: Callable[[Bench], tuple[Predictor, Matrix]] | None = None
    #: `auto` prefers the kind if its reward is within this many standard errors of the best one's.
    preferred_within: float = 0.0
    #: The sources that it can read. It needs one of them, or none if it reads none.
    reads: frozenset[Source] = frozenset()
    #: How figures draw it: colour, marker and line.
    style: tuple[str, str, str] = ("grey", "*", "-")

    def can_read(self, prompts: Prompts) -> bool:
        """Whether it finds something to read in these prompts."""
        return not self.reads or bool(self.reads & prompts.sources)


def quietly() -> None:
    """A tick that does nothing."""


def unexplained(prompts: Prompts) -> list[list[Explanation]]:
    """Nothing to say about any of the prompts."""
    return [[] for _ in range(len(prompts))]
