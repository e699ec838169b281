"""Every prompt gets its teacher: the router's best, or for a calibration prompt the one who did best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sqlalchemy import Select, and_, func, select
from sqlalchemy.orm import Session

from persyn import rewards
from persyn.config import thaw
from persyn.db import bulk, grid
from persyn.db.catalog import Prompt, Run, RunPrompt
from persyn.db.results import Assignment, Router, RouterScore
from persyn.errors import EngineError
from persyn.llm.protocols import Failed, ModelSpec, Route, Routed
from persyn.queue import Claim
from persyn.stages.batch import Batch, Done, Plan, Progress, conversation, in_part, make_jobs


def plan(session: Session, run: Run) -> int:
    """Assign calibration prompts by their rewards; make jobs for all others; return how many jobs."""
    _assign_calibration(session, run)
    router = session.get_one(Router, run.router_id)
    size = run.config["run"]["job_prompts"] * _ROUTING_IS_CHEAP
    return make_jobs(session, Plan(run.id, "assign", _spec(run, router), size=size), _missing(run.id))


#: Those of [router]'s options that still mean something when the router is fitted.
_ROUTE_OPTIONS = ("dtype", "batch_tokens")
#: One forward pass and no tokens written: a job of routing holds this many times more prompts.
_ROUTING_IS_CHEAP = 8


def load(session: Session, job: Claim) -> Batch:
    """The job's prompts that have no teacher yet."""
    run = session.get_one(Run, job.run_id)
    prompts = session.execute(
        in_part(_missing(run.id), job)
        .join(Prompt, Prompt.id == RunPrompt.prompt_id)
        .add_columns(Prompt.id, Prompt.text, Prompt.history)
    )
    router = session.get_one(Router, run.router_id)
    return Batch(_spec(run, router), [Route(id=prompt.id, messages=conversation(prompt)) for prompt in prompts])


def save(session: Session, job: Claim, done: Sequence[Done]) -> None:
    """Store all the router's scores and the teacher that won; saved twice, they are there once."""
    router_id = session.scalars(select(Run.router_id).where(Run.id == job.run_id)).one()
    teacher_ids = session.scalars(select(Router.teacher_ids).where(Router.id == router_id)).one()
    scores, assignments = [], []
    for item in done:
        if isinstance(item.result, Failed):
            raise EngineError(f"the router cannot score prompt {item.request.id}: {item.result.reason}")
        assert isinstance(item.result, Routed)
        prompt_id, row = item.request.id, item.result.scores
        scores += [
            {"router_id": router_id, "prompt_id": prompt_id, "teacher_id": teacher_id, "score": score}
            for teacher_id, score in zip(teacher_ids, row, strict=True)
        ]
        runner_up, best = sorted(row)[-2:]
        assignments.append(
            {
                "run_id": job.run_id,
                "prompt_id": prompt_id,
                "teacher_id": teacher_ids[row.index(best)],
                "score": best,
                "margin": best - runner_up,
                "reason": "router",
                "job_id": job.id,
            }
        )
    bulk.insert_new(session, RouterScore, scores)
    bulk.insert_new(session, Assignment, assignments)


def progress(session: Session, run: Run) -> Progress:
    """Count the run's prompts by whether they have a teacher."""
    assigned = and_(Assignment.run_id == RunPrompt.run_id, Assignment.prompt_id == RunPrompt.prompt_id)
    total, done = session.execute(
        select(func.count(), func.count(Assignment.teacher_id))
        .select_from(RunPrompt)
        .outerjoin(Assignment, assigned)
        .where(RunPrompt.run_id == run.id)
    ).one()
    return Progress(total, done, failed=0)


def _missing(run_id: int) -> Select[Any]:
    assigned = and_(Assignment.run_id == run_id, Assignment.prompt_id == RunPrompt.prompt_id)
    return (
        select(RunPrompt.prompt_id)
        .outerjoin(Assignment, assigned)
        .where(RunPrompt.run_id == run_id, Assignment.prompt_id.is_(None))
    )


def _assign_calibration(session: Session, run: Run) -> None:
    """Keep the best response a calibration prompt already has; where no response has a reward, the router decides."""
    config = thaw(run.config)
    cells = grid.read(session, run)
    combined = rewards.combine(cells.quality, cells.learnability, alpha=config.run.alpha, how=config.run.normalise)
    rows = []
    for prompt_id, row in zip(cells.prompt_ids.tolist(), combined, strict=True):
        present = np.sort(row[~np.isnan(row)])
        if not present.size:
            continue
        rows.append(
            {
                "run_id": run.id,
                "prompt_id": prompt_id,
                "teacher_id": int(cells.teacher_ids[np.nanargmax(row)]),
                "score": float(present[-1]),
                "margin": float(present[-1] - present[-2]) if present.size > 1 else None,
                "reason": "calibration",
                "job_id": None,
            }
        )
    bulk.insert_new(session, Assignment, rows)


def _spec(run: Run, router: Router) -> ModelSpec:
    config = thaw(run.config).router
    if config.engine == "fake":
        return ModelSpec("fake", config.backbone, options={**config.options, "teachers": len(router.teacher_ids)})
    options = {key: config.options[key] for key in _ROUTE_OPTIONS if key in config.options}
    return ModelSpec("router", router.path, gpus=config.gpus, options={**options, "sha256": router.sha256})
