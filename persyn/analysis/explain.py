"""Explain a router's scores of one prompt: the calibration prompts, words or group that decided them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import Struct
from sqlalchemy import select
from sqlalchemy.orm import Session

from persyn.analysis.trace import beginning
from persyn.config import load_config
from persyn.db import lookup
from persyn.db.catalog import Prompt, Run
from persyn.db.connect import Database
from persyn.db.results import Router, RouterScore
from persyn.errors import EngineError, UsageError
from persyn.llm import host
from persyn.llm.host import HostDied
from persyn.llm.protocols import Failed, ModelSpec, Route, Routed
from persyn.method.strategies import STRATEGIES
from persyn.router.kinds.base import Explanation, Group, Mix, Near, Words
from persyn.settings import Settings
from persyn.stages import assign
from persyn.stages.batch import TURNS, conversation
from persyn.stages.labels import LABELLED, labels

#: Characters shown of a calibration prompt.
_SHOWN = 80


class Reason(Struct, frozen=True):
    """What decided the scores of a router, or of a part of a stacked one, as a table."""

    #: The kind of the router, and its weight in a stacked one.
    router: str
    weight: float | None
    title: str
    rows: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _Question:
    """A prompt for a run's router, and what is needed to put the answer into words.

    fitted: the ids of the calibration prompts, in the order in which the router was fitted to them.
    """

    spec: ModelSpec
    route: Route
    kind: str
    teachers: list[str]
    fitted: list[int]


def explain(database: Database, run_id: int, prompt_id: int, settings: Settings) -> list[Reason]:
    """Say what decided the router's scores of a prompt; empty if nothing can be said, as of a head's weights.

    The router is loaded in a separate process, with the models whose states of the prompt are not cached. Raises
    `UsageError` for a run without a router, and `EngineError` when the router cannot be loaded.
    """
    with database.read() as session:
        question = _read(session, session.get_one(Run, run_id), prompt_id)
    limits = {"load_seconds": settings.load_seconds, "stall_seconds": settings.stall_seconds}
    try:
        (result,) = host.ask(question.spec, [question.route], settings.home, **limits)
    except HostDied as death:
        raise EngineError(f"the router process ended: {death}") from death
    if isinstance(result, Failed):
        raise EngineError(f"the router cannot explain prompt {prompt_id}: {result.reason}")
    assert isinstance(result, Routed)
    found = msgspec.convert(result.explanation, list[Explanation])
    with database.read() as session:
        return list(_reasons(session, question, question.kind, None, found))


def _read(session: Session, run: Run, prompt_id: int) -> _Question:
    config = load_config(run.config)
    decided_by = STRATEGIES.require(config.strategy.kind, "strategy").decided_by
    if decided_by != "router" or run.router_id is None:
        raise UsageError(f"run {run.name!r} has no router whose scores could be explained")
    prompt = session.execute(select(Prompt.id, *TURNS, *LABELLED).where(Prompt.id == prompt_id)).one()
    route = Route(prompt.id, conversation(prompt), labels=labels(prompt, config.router.features), explain=True)
    names = [teacher.name for teacher in lookup.teachers(session, run.id)]
    router = session.get_one(Router, run.router_id)
    fitted = (
        select(RouterScore.prompt_id)
        .where(RouterScore.router_id == router.id, RouterScore.cross_fitted.is_not(None))
        .distinct()
        .order_by(RouterScore.prompt_id)
    )
    return _Question(assign.route_spec(session, run), route, router.kind, names, list(session.scalars(fitted)))


def _reasons(
    session: Session, question: _Question, kind: str, weight: float | None, found: Sequence[Explanation]
) -> Iterator[Reason]:
    """One `Reason` for each explanation; those of a mix are the reasons of its parts."""
    if weight is not None and not found:
        yield Reason(kind, weight, "what it reads has no names", [])
    for each in found:
        match each:
            case Mix(parts):
                for part in parts:
                    yield from _reasons(session, question, part.kind, part.weight, part.explanation)
            case Near(indices, similarities):
                yield Reason(kind, weight, *_nearest(session, question.fitted, indices, similarities))
            case Words(words):
                rows = [{"word": word.text, **_by_teacher(question, word.weights)} for word in words]
                yield Reason(kind, weight, "the words that move the predicted reward most, and by how much", rows)
            case Group(name, label, n_prompts, scores):
                row = {name: label, "calibration prompts": n_prompts, **_by_teacher(question, scores)}
                yield Reason(kind, weight, "the prompt's group, and what it adds to the predicted reward", [row])


def _by_teacher(question: _Question, values: Sequence[float]) -> dict[str, float]:
    return dict(zip(question.teachers, values, strict=True))


def _nearest(
    session: Session, fitted: Sequence[int], indices: Sequence[int], similarities: Sequence[float]
) -> tuple[str, list[dict[str, Any]]]:
    """Title and rows of the calibration prompts at some places; those of an imported router are unknown."""
    title = "the most similar calibration prompts"
    if max(indices) >= len(fitted):
        return f"{title}, which are not in this store", [{"similarity": each} for each in similarities]
    return title, _neighbours(session, [fitted[i] for i in indices], similarities)


def _neighbours(session: Session, prompt_ids: Sequence[int], similarities: Sequence[float]) -> list[dict[str, Any]]:
    texts = {
        row.id: row.text for row in session.execute(select(Prompt.id, Prompt.text).where(Prompt.id.in_(prompt_ids)))
    }
    return [
        {"prompt_id": prompt_id, "similarity": similarity, "text": beginning(texts[prompt_id], _SHOWN)}
        for prompt_id, similarity in zip(prompt_ids, similarities, strict=True)
    ]
