"""Change what a run may spend, also while it is worked; tell a run whose budget is used up from other paused ones."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace
from sqlalchemy.orm import Session

from persyn.config import RunConfig, load_config
from persyn.db import notes
from persyn.db.catalog import Run, RunState
from persyn.jobs import expenses
from persyn.runs import same_run


def change(session: Session, run: Run, config: RunConfig, *, actor: str) -> bool:
    """Adopt the budget of a configuration that is otherwise the run's; return whether it differs.

    Workers read it before they send the next requests. No row is computed again.
    """
    if load_config(run.config).budget == config.budget:
        return False
    session.refresh(run, with_for_update={"key_share": True})
    was = load_config(run.config)
    changed = same_run.differences(_budget(was), _budget(config), "budget")
    taken = replace(was, budget=config.budget)
    run.config, run.config_hash = taken.frozen(), taken.digest()
    detail = {"changed": [each._asdict() for each in changed]}
    notes.note(session, run, detail, actor=actor)
    session.flush()
    return True


def is_used_up(run: Run) -> bool:
    """Whether a run is paused because its budget is used up, and not by a person."""
    return run.state is RunState.PAUSED and (run.error or "").startswith(f"{expenses.BUDGET}:")


def _budget(config: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = config.frozen().get("budget", {})
    return found
