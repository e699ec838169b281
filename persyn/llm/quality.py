"""What a run's quality says: that of one scorer, or of several that are combined."""

from __future__ import annotations

from persyn.config import QualityPart, QualityTable, RunConfig
from persyn.llm import needs
from persyn.llm.engines import ENGINES
from persyn.llm.needs import Need


def name(config: RunConfig) -> str:
    """The kind of its scorer; of several, the gates, and the others with their weights."""
    return ", ".join(map(_named, config.scorers))


def _named(scorer: QualityTable) -> str:
    if not isinstance(scorer, QualityPart):
        return scorer.kind
    return f"{scorer.kind} as a gate" if scorer.gate else f"{scorer.weight:g} {scorer.kind}"


def gates(config: RunConfig) -> list[bool]:
    """Which of its scorers are gates."""
    return [isinstance(scorer, QualityPart) and scorer.gate for scorer in config.scorers]


def unit(config: RunConfig) -> str:
    """The meaning of a value."""
    found = gates(config)
    if all(found):
        return "1 if all gates are passed, else 0"
    if any(found):
        return "1 to 2 if the gates are passed, else 0"
    if len(found) > 1:
        return "weighted sum"
    kind = ENGINES.get(config.scorers[0].kind)
    return (kind and kind.unit) or f"as {config.scorers[0].kind} scores it"


def is_gated(config: RunConfig) -> bool:
    """Whether a response must pass a gate: 0 is then wrong, and 1 and more is right."""
    return any(gates(config))


def may_be_verdict(config: RunConfig) -> bool:
    """Whether its values may say what is right: it is gated, or its one scorer says so."""
    kind = ENGINES.get(config.scorers[0].kind)
    return is_gated(config) or (len(config.scorers) == 1 and kind is not None and kind.may_be_verdict)


def need(config: RunConfig) -> Need | None:
    """What it needs from a prompt; None if any prompt will do."""
    found = [need for scorer in config.scorers if (need := ENGINES[scorer.kind].need(scorer.options)) is not None]
    return needs.all_of(found) if found else None
