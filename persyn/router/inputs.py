"""What kinds of routers read of a prompt; needs no model library."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from persyn.config import RouterTable
from persyn.llm.protocols import Message
from persyn.llm.tools import written
from persyn.router.kinds.base import Source
from persyn.router.kinds.registry import ROUTERS

#: Stands for a kind in the run file: choose one.
AUTO = "auto"
_SOURCES: Mapping[str, Source] = {"backbone": "states", "embedding": "states", "tfidf": "texts"}


def text_of(messages: Sequence[Message]) -> str:
    """The text of all turns."""
    return "\n".join(written(message) for message in messages)


def sources(encoders: Collection[str], fields: Collection[str]) -> frozenset[Source]:
    """The parts of `Prompts` that encoders and fields fill."""
    found: set[Source] = {_SOURCES[name] for name in encoders}
    return frozenset(found | {"fields"} if fields else found)


def needed(kind: str, encoders: Sequence[str]) -> list[str]:
    """Those of the encoders that a kind reads; all of them to choose a kind."""
    return [name for name in encoders if kind == AUTO or _SOURCES[name] in ROUTERS.require(kind, "router").reads]


def readable(kind: str) -> list[str]:
    """What a kind can read, in the words of the run file."""
    every: frozenset[Source] = frozenset({"fields", *_SOURCES.values()})
    reads = every if kind == AUTO else ROUTERS.require(kind, "router").reads
    return [name for name, source in _SOURCES.items() if source in reads] + ["features"] * ("fields" in reads)


def needed_encoders(router: RouterTable, kind: str | None = None) -> list[str]:
    """The encoders that a run's router reads with, or one of another kind."""
    return needed(kind or router.chosen_kind, router.encoders)


def can_read(kind: str, encoders: Collection[str], fields: Collection[str]) -> bool:
    """Whether a kind reads anything of these, or needs nothing; to choose a kind, something must be read."""
    given = sources(encoders, fields)
    reads = given if kind == AUTO else ROUTERS.require(kind, "router").reads
    return bool(reads & given) or (kind != AUTO and not reads)
