"""Measure how far new prompts are from a run's calibration prompts, before anything is stored or spent."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import Struct, structs
from sqlalchemy import select
from sqlalchemy.orm import Session

from persyn.config import load_config
from persyn.db.catalog import Prompt, Role, Run, RunPrompt
from persyn.db.results import Router
from persyn.errors import PersynError, shorten
from persyn.ingest.prompt_import import PromptFiles
from persyn.llm.protocols import Message, ModelSpec
from persyn.method import novelty
from persyn.method.strategies import STRATEGIES
from persyn.router import distance
from persyn.stages import assign
from persyn.stages.batch import TURNS, conversation
from persyn.stages.labels import LABELLED, SOURCE, labels

#: New prompts that are measured, and calibration prompts that they are compared with, at most; others are left out at
#: random.
_MOST_NEW, _MOST_KNOWN = 1_000, 3_000
#: Far prompts that are shown, and characters of each.
_SHOWN, _CHARACTERS = 3, 80
#: New prompts looked up at once.
_CHUNK = 500


class Distance(Struct, frozen=True):
    """How far new prompts are from the calibration prompts."""

    #: New prompts, those that were measured, and the calibration prompts that they were compared with.
    prompts: int
    measured: int
    calibration: int
    #: Of those that were measured, how many are far: farther from the nearest calibration prompt than 95% of the
    #: calibration prompts are from the nearest other one.
    far: int
    #: Whether these are too many for prompts of the same kind.
    is_much: bool
    #: What distances were measured on: "states" of the router's encoders, or "words".
    on: str
    #: The beginnings of the farthest ones.
    examples: list[str]
    #: New values of fields that the router reads: field -> prompts with a value that no calibration prompt has.
    unknown: dict[str, int]

    @property
    def share(self) -> float:
        """The share that is far."""
        return self.far / self.measured

    def __str__(self) -> str:
        of = f"{self.measured:,}" if self.measured == self.prompts else f"{self.measured:,} sampled"
        by = "their words" if self.on == "words" else "what the router reads"
        return (
            f"{self.far:,} of {of} new prompts ({self.share:.0%}) are far from all {self.calibration:,} calibration "
            f"prompts, judged by {by}; of prompts of the same kind, about {novelty.USUAL:.0%} are"
        )


@dataclass(frozen=True, slots=True)
class _Read:
    """Prompts to compare: their turns, and their labels in the fields that the router reads."""

    messages: list[list[Message]]
    labels: list[dict[str, str | None]]


@dataclass(frozen=True, slots=True)
class Question:
    """What is compared with what.

    spec:     the engine of the run's router, if that reads prompts.
    features: the fields that it reads. n_new: the prompts that are not in the run, of which `new` is a sample.
    """

    spec: ModelSpec | None
    features: Sequence[str]
    known: _Read
    n_new: int
    new: _Read


def read(session: Session, run: Run, files: PromptFiles) -> Question | None:
    """The prompts of files that are not in a run, and its calibration prompts; the store is only read.

    None where the run has too few calibration prompts, or the files have no new prompts. Raises `UsageError` for files
    as `prompt_import.import_prompts` does.
    """
    features = load_config(run.config).router.features if _reads_prompts(run) else []
    known = _known(session, run, features)
    if len(known.messages) < novelty.FEWEST:
        return None
    n_new, new = _new(session, run, files, features)
    if not n_new:
        return None
    return Question(_spec(session, run), features, known, n_new, new)


def measure(question: Question, *, home: Path, say: Callable[[str], None]) -> Distance:
    """Compare the prompts, outside a transaction, since models may compute.

    home: where the router is, and states are cached. say: called with what could not be measured as it should.
    """
    known, new, spec = question.known, question.new, question.spec
    if spec is not None:
        spec = structs.replace(spec, model=str(home / spec.model))
    on, distances = _distances(spec, home, known, new, say)
    found = novelty.compare(*distances)
    shown = [shorten(new.messages[place][-1]["content"], most=_CHARACTERS) for place in found.far[:_SHOWN]]
    unknown = {name: _unknown(name, known, new) for name in question.features if name != SOURCE}
    return Distance(
        question.n_new,
        len(new.messages),
        len(known.messages),
        len(found.far),
        found.is_much,
        on,
        shown,
        {name: count for name, count in unknown.items() if count},
    )


def _reads_prompts(run: Run) -> bool:
    return STRATEGIES.require(load_config(run.config).strategy.kind, "strategy").decided_by == "router"


def _spec(session: Session, run: Run) -> ModelSpec | None:
    """The engine of the run's router, if it has one that reads prompts."""
    if not _reads_prompts(run) or run.router_id is None or load_config(run.config).router.engine == "fake":
        return None
    is_static = session.get_one(Router, run.router_id).kind == "static"
    return None if is_static else assign.route_spec(session, run)


def _known(session: Session, run: Run, features: Sequence[str]) -> _Read:
    """The calibration prompts that the router was fitted to."""
    rows = session.execute(
        select(*TURNS, *LABELLED)
        .join(RunPrompt, RunPrompt.prompt_id == Prompt.id)
        .where(RunPrompt.run_id == run.id, RunPrompt.role == Role.CALIBRATION)
        .order_by(Prompt.content_hash)
        .limit(_MOST_KNOWN)
    ).all()
    return _Read([conversation(row) for row in rows], [labels(row, features) for row in rows])


def _new(session: Session, run: Run, files: PromptFiles, features: Sequence[str]) -> tuple[int, _Read]:
    """The number of prompts that are not in the run, and a sample of them: those with the lowest hashes."""
    found: dict[str, Any] = {}
    seen: set[str] = set()
    for part in _parts(files):
        there = select(Prompt.content_hash).join(RunPrompt).where(RunPrompt.run_id == run.id)
        fresh = part.keys() - seen - set(session.scalars(there.where(Prompt.content_hash.in_(part))))
        seen |= fresh
        found |= {key: part[key] for key in fresh}
        found = {key: found[key] for key in heapq.nsmallest(_MOST_NEW, found)}
    of_row = [name for name in features if name != SOURCE]  # a file that was not imported is no known source
    nothing = dict.fromkeys(features)
    rows = list(found.values())
    return len(seen), _Read([row.messages for row in rows], [{**nothing, **labels(row, of_row)} for row in rows])


def _parts(files: PromptFiles) -> Iterator[dict[str, Any]]:
    part: dict[str, Any] = {}
    for row in files.rows():
        part[row.content_hash] = row
        if len(part) >= _CHUNK:
            yield part
            part = {}
    yield part


def _distances(
    spec: ModelSpec | None, home: Path, known: _Read, new: _Read, say: Callable[[str], None]
) -> tuple[str, Any]:
    """What distances are measured on, and those of the calibration prompts and the new ones."""
    if spec is not None:
        pairs = [distance.Conversations(each.messages, _columns(each)) for each in (known, new)]
        try:
            if (found := distance.by_states(spec, home, *pairs)) is not None:
                return "states", found
        except PersynError as error:
            say(f"distances are measured on words, because the router cannot be read here: {error}")
    return "words", distance.by_words(known.messages, new.messages)


def _columns(read: _Read) -> dict[str, list[str | None]]:
    return {name: [row[name] for row in read.labels] for name in (read.labels[0] if read.labels else ())}


def _unknown(name: str, known: _Read, new: _Read) -> int:
    values = {row[name] for row in known.labels}
    return sum(row[name] is not None and row[name] not in values for row in new.labels)
