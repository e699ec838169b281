"""Whoever wants to see work go on in this process."""

from __future__ import annotations

from persyn.llm.protocols import ModelSpec


class Listener:
    """Is told what workers do; this one does nothing with it. Several workers tell from a thread each."""

    def loading(self, spec: ModelSpec) -> None:
        """A model begins to load."""

    def loaded(self, spec: ModelSpec, seconds: float) -> None:
        """It is in memory."""

    def saved(self, stage: str, done: int, failed: int) -> None:
        """So many rows more are written."""

    def waiting(self, reason: str) -> None:
        """A server is away, and is asked again later."""
