"""Run code as a script."""

from __future__ import annotations

from typing import Any

from persyn.llm.sandbox.child import run


def work(job: dict[str, Any], missing: dict[str, str]) -> None:
    """Run `job["code"]`."""
    run(job["code"], "__main__", {})
