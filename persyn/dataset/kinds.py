"""The kinds of datasets that a run can be exported as."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from persyn.dataset import rankings, routed, usage
from persyn.dataset.formats import COLUMNS, FORMATS, Format
from persyn.dataset.manifest import Manifest
from persyn.dataset.parquet_file import Columns
from persyn.dataset.ranked import NO_PAIR, NO_REWARD, RankedResponses, best, preferred
from persyn.dataset.routed import RoutedPrompts
from persyn.dataset.sft import AssignedResponses
from persyn.dataset.source import Snapshot, Source
from persyn.dataset.usage import Use
from persyn.registry import Registry

#: Filters of responses and of prompts that apply to the grid's responses, too.
_FILTERS = frozenset({"reasoning", "finish_reasons", "min_quality", "drop_wrong", "benchmarks", "near_duplicates"})
_NO_REWARD = "fewer than two responses with all scores, or none of them with a text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of dataset as the rest of PerSyn knows it."""

    name: str
    #: One sentence for the documentation and the command's help.
    summary: str
    #: Reads its rows from the store.
    source: Callable[[Snapshot], Source]
    formats: Registry[Format]
    #: How `Run.dataset` shows its rows.
    columns: Columns
    #: The options that apply to it, besides kind, formats and splits.
    options: frozenset[str]
    #: What the card says: what the rows are, and how they were made.
    about: Callable[[Manifest], str]
    #: What `assigned` counts in its manifest.
    unit: str
    #: Why a unit may have no row, besides filters, and how the card says so.
    losses: dict[str, str]
    #: How trainers read it.
    uses: tuple[Use, ...]
    #: The hub's tags.
    tags: tuple[str, ...]


KINDS = Registry(
    Kind,
    Kind(
        name="sft",
        summary="each prompt with its assigned teacher's response, to fine-tune on",
        source=AssignedResponses,
        formats=FORMATS,
        columns=COLUMNS,
        options=_FILTERS | {"unscored", "cap"},
        about=usage.about_responses,
        unit="prompts assigned to a teacher",
        losses={},
        uses=usage.SFT,
        tags=("sft",),
    ),
    Kind(
        name="preference",
        summary="pairs of a chosen and a rejected response to a calibration prompt, with the margin of their rewards",
        source=partial(RankedResponses, choose=preferred),
        formats=rankings.PAIRS,
        columns=rankings.PAIR_COLUMNS,
        options=_FILTERS | {"pairs", "min_margin", "higher_quality"},
        about=usage.about_pairs,
        unit="calibration prompts",
        losses={
            NO_REWARD: _NO_REWARD,
            NO_PAIR: "no two responses that differ enough",
        },
        uses=usage.PREFERENCE,
        tags=("preference", "dpo"),
    ),
    Kind(
        name="best-of",
        summary="each calibration prompt with its best responses in the order of their rewards",
        source=partial(RankedResponses, choose=best),
        formats=rankings.BEST,
        columns=rankings.BEST_COLUMNS,
        options=_FILTERS | {"best"},
        about=usage.about_best,
        unit="calibration prompts",
        losses={NO_REWARD: _NO_REWARD},
        uses=usage.BEST_OF,
        tags=("best-of-n",),
    ),
    Kind(
        name="teachers",
        summary="each prompt with the teacher it was given to and the teachers' scores, for on-policy distillation",
        source=RoutedPrompts,
        formats=routed.ROUTED,
        columns=routed.VERL_COLUMNS,
        options=frozenset({"benchmarks", "near_duplicates", "cap"}),
        about=usage.about_teachers,
        unit="prompts assigned to a teacher",
        losses={},
        uses=usage.TEACHERS,
        tags=("on-policy-distillation",),
    ),
    groups=(),
)
