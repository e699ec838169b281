"""Check the fields that a router reads, before anything is generated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from persyn.config import load_config
from persyn.db.catalog import Prompt, Role, Run, RunPrompt
from persyn.errors import UsageError, shorten
from persyn.method.strategies import STRATEGIES
from persyn.method.verdict import is_group
from persyn.stages.labels import LABELLED, SOURCE, labels

#: Fields named in an error.
_MOST = 10


def check(session: Session, run: Run) -> list[str]:
    """Compare the fields in `features` with the drawn calibration prompts; return warnings.

    Raises `UsageError` for a field that none of them has: no router could learn anything from it.
    """
    config = load_config(run.config)
    fields = config.router.features
    reads = STRATEGIES.require(config.strategy.kind, "strategy").decided_by == "router"
    if not fields or not reads or config.router.fitted is not None:
        return []
    prompts = session.execute(
        select(*LABELLED)
        .join(RunPrompt, RunPrompt.prompt_id == Prompt.id)
        .where(RunPrompt.run_id == run.id, RunPrompt.role != Role.TARGET)
    ).all()
    found = [labels(prompt, fields) for prompt in prompts]
    said: list[str] = []
    for name in fields:
        known = [row[name] for row in found if row[name] is not None]
        if not known:
            raise UsageError(
                f"[router] features: none of {len(prompts):,} calibration prompts has a field {name!r} in its row; "
                f"available: {', '.join(_available(prompts))}. 'persyn responses import --prompt-field NAME' stores a "
                "field of imported responses with their prompts"
            )
        said += _warnings(name, known, len(prompts))
    return said


def _warnings(name: str, known: Sequence[str | None], total: int) -> Iterator[str]:
    """What limits how much a router learns from a field; known: the labels of the prompts that have one."""
    if len(known) < total / 2:
        yield f"only {len(known):,} of {total:,} calibration prompts have a field {name!r}, which the router reads"
    if not is_group(known):
        yield (
            f"the field {name!r}, which the router reads, has {len(set(known)):,} different values on {len(known):,} "
            "calibration prompts: too few prompts share one to learn from it"
        )


def _available(prompts: Sequence[Any]) -> list[str]:
    names = sorted({name for prompt in prompts for name, value in prompt.meta.items() if value is not None})
    return [SOURCE, *(shorten(repr(name), most=60) for name in names[:_MOST]), *["..."] * (len(names) > _MOST)]
