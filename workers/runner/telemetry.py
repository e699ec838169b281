"""Report a worker's jobs: a log line at the beginning and the end of each, and an OpenTelemetry span between.

Spans are exported only under `opentelemetry-instrument persyn worker ...`, with that package installed.
Neither logs nor spans contain prompts or responses.
"""

from __future__ import annotations

import logging
from typing import Any

from persyn.jobs.queue import Claim

try:
    from opentelemetry import trace
except ImportError:
    trace = None  # type: ignore[assignment]

log = logging.getLogger(__name__)


class Telemetry:
    """Reports one worker's jobs.

    worker: its name as an owner of leases.
    """

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._spans: dict[int, Any] = {}

    def about(self, claim: Claim, **more: Any) -> dict[str, Any]:
        """The fields of every log line about a job."""
        of_job = {"run": claim.run_id, "stage": claim.stage, "queue": claim.queue, "job": claim.id}
        return {**of_job, "fence": claim.fence, "worker": self._worker, **more}

    def claimed(self, claim: Claim) -> None:
        """A job begins."""
        about = self.about(claim, attempts=claim.attempts)
        log.info("claimed", extra=about)
        if trace is not None:
            attributes = {f"persyn.{name}": value for name, value in about.items()}
            self._spans[claim.id] = trace.get_tracer("persyn").start_span(f"job {claim.stage}", attributes=attributes)

    def ended(self, claim: Claim, how: str, reason: str = "") -> None:
        """A job ends here: done, failed, lost, cancelled or released; `reason` explains a failed attempt."""
        if reason:
            log.warning("%s: %s", how, reason, extra=self.about(claim))
        else:
            log.info(how, extra=self.about(claim))
        span = self._spans.pop(claim.id, None)
        if span is not None:
            span.set_attribute("persyn.end", how)
            if reason:
                span.set_status(trace.StatusCode.ERROR, reason)
            span.end()
