"""What kinds of routers read of a prompt; needs no model library."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from persyn.config import RouterTable
from persyn.router.kinds.base import Source
from persyn.router.kinds.registry import ROUTERS

#: Stands for a kind in the run file: choose one.
AUTO = "auto"
_SOURCES: Mapping[str, Source] = {"backbone": "states", "embedding": "states", "tfidf": "texts"}


def sources(encoders: Collection[str], fields: Collection[str]) -> frozenset[Source]:
    """The parts of `Prompts` that encoders and fields fill."""
    found: set[Source] = {_SOURCES[name] for name in encoders}
    return frozenset(found | {"fields"} if fields else found)


def needed(kind: str, encoders: Sequence[str]) -> list[str]:
    """Those of the encoders that a kind reads; all of them to choose a kind."""
    return [name for name in encoders if kind == AUTO or _SOURCES[name] in ROUTERS.require(kind, "router").reads]


def needed_encoders(router: RouterTable) -> list[str]:
    """The encoders that a run's router reads with."""
    return needed(router.chosen_kind, router.encoders)


def can_read(kind: str, encoders: Collection[str], fields: Collection[str]) -> bool:
    """Whether a kind reads anything of these, or needs nothing."""
    reads = frozenset() if kind == AUTO else ROUTERS.require(kind, "router").reads
    return not reads or bool(reads & sources(encoders, fields))
