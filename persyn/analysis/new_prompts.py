"""Route prompts that are not in a run, with its router or its strategy's function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from sqlalchemy.orm import Session

from persyn.config import load_config
from persyn.db import lookup
from persyn.db.catalog import Run, RunState
from persyn.db.results import Router
from persyn.errors import EngineError, UsageError, shorten
from persyn.ingest import turns
from persyn.ingest.record import Flaw
from persyn.llm import host
from persyn.llm.host import HostDied
from persyn.llm.protocols import Failed, Message, ModelSpec, Route, Routed
from persyn.method.strategies import STRATEGIES
from persyn.settings import Settings
from persyn.stages import assign

Labels: TypeAlias = Mapping[str, Sequence[str | None]]
"""The label of each prompt by the name of a field; None where a prompt has none."""

PromptInput: TypeAlias = str | Sequence[Mapping[str, Any]]
"""A text, or a conversation of {"role", "content"} turns that ends with the user's or a tool's."""


@dataclass(frozen=True, slots=True)
class PromptRouter:
    """What scores the teachers of a run for a prompt."""

    run: str
    spec: ModelSpec
    #: In the order of the scores.
    teachers: list[str]
    #: The fields whose labels it reads.
    features: list[str]

    def route(
        self, conversations: Sequence[list[Message]], settings: Settings, labels: Labels | None = None
    ) -> pa.Table:
        """A row for each conversation, with the teacher of the highest score and its lead over the next one.

        labels: of each conversation in each field that the router reads; see `require_labels`.
        The router is loaded in a separate process, which ends after the call.
        """
        require_labels(self, len(conversations), labels)
        limits = {"load_seconds": settings.load_seconds, "stall_seconds": settings.stall_seconds}
        requests = [
            Route(number, messages, labels={name: (labels or {})[name][number] for name in self.features})
            for number, messages in enumerate(conversations)
        ]
        try:
            results = host.ask(self.spec, requests, settings.home, **limits) if requests else []
        except HostDied as death:
            raise EngineError(f"the router process of run {self.run} ended: {death}") from death
        rows = []
        for request, result in zip(requests, results, strict=True):
            if isinstance(result, Failed):
                raise EngineError(f"no scores for {request.messages[-1]['content']!r:.80}: {result.reason}")
            assert isinstance(result, Routed)
            rows.append(result.scores)
        return _table([messages[-1]["content"] for messages in conversations], self.teachers, rows)


def of_run(session: Session, run: Run) -> PromptRouter:
    """The router of a run; raises `UsageError` for a run that has none that reads prompts."""
    _require_router(run)
    names = [teacher.name for teacher in lookup.teachers(session, run.id)]
    router = session.get(Router, run.router_id) if run.router_id is not None else None
    features = router.metrics.get("features", []) if router is not None else []
    return PromptRouter(run.name, assign.route_spec(session, run), names, features)


def require_labels(router: PromptRouter, n: int, labels: Labels | None) -> None:
    """Raise `UsageError` unless there is a label, or None, for each of n prompts in exactly the router's fields."""
    given = labels or {}
    if set(given) != set(router.features):
        wanted = ", ".join(map(repr, router.features)) or "no field"
        raise UsageError(
            f"the router of run {router.run} reads {wanted}, and labels has {', '.join(map(repr, given)) or 'none'}; "
            "give labels={field: [a text or None for each prompt]}"
        )
    for name, values in given.items():
        if len(values) != n:
            raise UsageError(f"labels[{name!r}] has {len(values)} values for {n} prompts")


def conversations(prompts: PromptInput | Sequence[PromptInput]) -> list[list[Message]]:
    """The turns of each prompt; raises `UsageError` for one whose turns do not end with the user's text or a tool's."""
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise UsageError(f"prompts must be a list of texts or conversations, got {shorten(repr(prompts))}")
    given: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    if given and isinstance(given[0], Mapping):  # the turns of one conversation
        given = [given]
    return [_conversation(prompt, f"prompts[{number}]") for number, prompt in enumerate(given)]


def _conversation(prompt: Any, name: str) -> list[Message]:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, Iterable):
        raise UsageError(f"{name!r} must be a text or a list of turns, got {shorten(repr(prompt))}")
    try:
        found = turns.read([dict(turn) if isinstance(turn, Mapping) else turn for turn in prompt], name)
        turns.require_order(found, name)
    except Flaw as flaw:
        raise UsageError(str(flaw)) from None
    if not found or found[-1]["role"] not in ("user", "tool"):
        raise UsageError(f"{name!r}: a conversation to route must end with the user's turn or a tool's")
    if found[-1]["role"] == "user" and not found[-1]["content"].strip():
        raise UsageError(f"{name!r} is empty")
    return found


def _require_router(run: Run) -> None:
    kind = load_config(run.config).strategy.kind
    decided_by = STRATEGIES.require(kind, "strategy").decided_by
    if decided_by not in ("router", "function"):
        raise UsageError(f"run {run.name} uses strategy {kind}, which does not read prompts and has no router")
    if decided_by == "router" and run.router_id is None:
        how = "work()" if run.state is RunState.RUNNING else "resume() and work()"
        raise UsageError(f"run {run.name} has no router yet: it is {run.state} in stage {run.stage}; call {how} first")


def _table(prompts: Sequence[str], teachers: Sequence[str], rows: Sequence[Sequence[float]]) -> pa.Table:
    scores = np.array(rows, dtype=np.float64).reshape(len(prompts), len(teachers))
    highest = -np.sort(-scores, axis=1)
    columns = [pa.array(scores[:, column]) for column in range(len(teachers))]
    return pa.table(
        {
            "prompt": pa.array(prompts, pa.string()),
            "teacher": pa.array(teachers, pa.string()).take(pa.array(scores.argmax(axis=1))),
            "margin": highest[:, 0] - highest[:, 1],
            "scores": pa.StructArray.from_arrays(columns, names=list(teachers)),
        }
    )
