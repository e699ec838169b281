"""An interface for observing the progress of workers in this process."""

from __future__ import annotations

from persyn.llm.protocols import ModelSpec


class Listener:
    """Receives workers' events and ignores them; subclasses override. Each worker calls from its own thread."""

    def loading(self, spec: ModelSpec) -> None:
        """A model starts to load."""

    def loaded(self, spec: ModelSpec, seconds: float) -> None:
        """A model is in memory."""

    def saved(self, stage: str, done: int, failed: int) -> None:
        """More rows are saved, this many done and failed."""

    def waiting(self, reason: str) -> None:
        """A server is unavailable and will be retried later."""
