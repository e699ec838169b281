"""What [fallback] and `generation.check` need of the other tables of a run file."""

from __future__ import annotations

from pathlib import Path

from persyn.config import IMPORTED, RunConfig
from persyn.errors import UsageError
from persyn.llm import quality


def require(path: Path, config: RunConfig) -> None:
    """Raise `UsageError` for what needs checks that are not made, and for checks by a quality that was imported."""
    generation = config.generation
    if generation.when_worse is not None and (generation.is_choice or not generation.check):
        raise UsageError(
            f"{path}: `generation.when_worse` is {generation.when_worse!r}, but responses are not scored as they come; "
            "set [generation] check = true, without a choice among samples, or remove it"
        )
    if generation.check and any(scorer.kind == IMPORTED for scorer in config.scorers):
        raise UsageError(
            f"{path}: `generation.check` is true, but an imported quality has no score of new responses; use another "
            "quality, or check = false"
        )
    if config.fallback is None or "wrong" not in config.fallback.on:
        return
    if not quality.may_be_verdict(config):
        raise UsageError(
            f"{path}: `fallback.on` has 'wrong', but quality {quality.name(config)} does not say what is right; remove "
            "'wrong', or use a quality that does"
        )
    if not (generation.check or generation.is_choice):
        raise UsageError(
            f"{path}: `fallback.on` has 'wrong', but responses are not scored as they come; set [generation] check = "
            "true, or remove 'wrong'"
        )
