"""Fit a router to the grid's rewards, in one job."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from sqlalchemy import literal, select
from sqlalchemy.orm import Session

from persyn.config import load_config
from persyn.db import bulk, grid, lookup
from persyn.db.catalog import Prompt, Role, Run, RunPrompt
from persyn.db.results import Router, RouterScore
from persyn.errors import EngineError, UsageError
from persyn.jobs.queue import Claim
from persyn.llm.protocols import Failed, Fit, Fitted, ModelSpec
from persyn.method.strategies import STRATEGIES
from persyn.router.inputs import AUTO, needed_encoders
from persyn.stages import unassigned
from persyn.stages.batch import TURNS, Batch, Done, JobPlan, Progress, conversation, make_jobs
from persyn.stages.labels import LABELLED, labels
from persyn.stages.stage import Stage

#: Fields that fits did not have in all versions, and what the fits of a version without them did: they keep their
#: fingerprints.
_ADDED: dict[str, Any] = {
    "errors": None,
    "kind": "head",
    "encoders": ["backbone"],
    "labels": {},
    "embedding": "",
    "embedding_version": None,
    "is_weighed": False,
}


def plan(session: Session, run: Run) -> int:
    """Reuse a router that was fitted to an identical grid, or create the one job that fits it.

    Raises `UsageError` for a grid without any reward: a router of it would assign prompts by nothing.
    """
    if not _needs_router(run):
        return 0
    if run.router_id is None:
        spec, fit = fit_of(session, run)
        if np.isnan(fit.rewards).all() and session.execute(unassigned.missing(run.id).limit(1)).first() is not None:
            raise UsageError("no response of the calibration grid has a reward")
        wanted = _fingerprint(spec, fit, _teacher_ids(session, run))
        # Locked against a deletion of the last run that has it, which takes away its fingerprint first.
        same = select(Router.id).where(Router.fingerprint == wanted)
        run.router_id = session.scalar(same.with_for_update(read=True, key_share=True))
    if run.router_id is not None:
        return 0
    return make_jobs(session, JobPlan(run.id, "fit_router", _spec(run)), select(literal(0).label("prompt_id")))


def load(session: Session, job: Claim) -> Batch:
    """Read the whole grid as rewards."""
    run = session.get_one(Run, job.run_id)
    spec, fit = fit_of(session, run)
    # Each fit writes to its own folder: a worker that was suspended during a fit, and resumes after another has
    # finished it, must not replace files whose hash is already stored.
    folder = f"routers/{_fingerprint(spec, fit, _teacher_ids(session, run))[:16]}-{run.id}-{uuid.uuid4().hex[:8]}"
    return Batch(spec, [msgspec.structs.replace(fit, folder=folder)])


def fit_of(session: Session, run: Run, kind: str | None = None) -> tuple[ModelSpec, Fit]:
    """The fit of a run, without a target folder yet; kind: another kind than the run's."""
    config = load_config(run.config)
    cells = grid.read(session, run)
    found = session.execute(
        select(Prompt.id, *TURNS, *LABELLED)
        .join(RunPrompt, RunPrompt.prompt_id == Prompt.id)
        .where(RunPrompt.run_id == run.id, RunPrompt.role != Role.TARGET)
    )
    of_id = {prompt.id: prompt for prompt in found}
    prompts = [of_id[prompt_id] for prompt_id in cells.prompt_ids.tolist()]
    labelled = [labels(prompt, config.router.features) for prompt in prompts]
    errors = cells.reward_errors()
    encoders = needed_encoders(config.router, kind)
    chosen = kind or config.router.chosen_kind
    fit = Fit(
        id=0,
        conversations=[conversation(prompt) for prompt in prompts],
        rewards=cells.rewards().tolist(),
        errors=None if errors is None else errors.tolist(),
        is_holdout=cells.is_holdout.tolist(),
        teachers=[teacher.name for teacher in lookup.teachers(session, run.id)],
        tune=config.router.tune,
        preferences=config.router.preferences,
        seed=run.seed,
        folder="",
        kind=chosen,
        encoders=encoders,
        labels={name: [row[name] for row in labelled] for name in config.router.features},
        is_weighed=chosen == AUTO and config.strategy.is_limited,
    )
    if "embedding" in encoders and config.router.embedding:
        version = config.router.embedding_version or config.router.embedding_revision
        fit = msgspec.structs.replace(fit, embedding=config.router.embedding, embedding_version=version)
    return _spec(run, kind), fit


def save(session: Session, job: Claim, done: Sequence[Done]) -> None:
    """Store the router and link it to the run; raise `EngineError` if the fit failed, since the run cannot continue."""
    for item in done:
        if isinstance(item.result, Failed):
            raise EngineError(f"the router cannot be fitted: {item.result.reason}")
        assert isinstance(item.result, Fitted)
        run = session.get_one(Run, job.run_id)
        row = _row(session, run, item)
        bulk.insert_new(session, Router, [row])
        run.router_id = session.scalars(select(Router.id).where(Router.fingerprint == row["fingerprint"])).one()
        bulk.insert_new(session, RouterScore, _score_rows(session, run, item.result))


def is_used(session: Session, fitted: Fitted) -> bool:
    """Whether a stored router uses this checkpoint; the folder of an unused one can be deleted."""
    return session.scalar(select(Router.id).where(Router.path == fitted.folder).limit(1)) is not None


def progress(session: Session, run: Run) -> Progress:
    """Count one router, or none where the strategy needs none."""
    return Progress(total=int(_needs_router(run)), done=int(run.router_id is not None), failed=0)


def _expected(session: Session, run: Run) -> int:
    return int(_needs_router(run))


def _needs_router(run: Run) -> bool:
    return STRATEGIES.require(load_config(run.config).strategy.kind, "strategy").decided_by == "router"


def _row(session: Session, run: Run, item: Done) -> dict[str, Any]:
    assert isinstance(item.request, Fit)
    assert isinstance(item.result, Fitted)
    spec = _spec(run)
    teacher_ids = _teacher_ids(session, run)
    return {
        "fingerprint": _fingerprint(spec, item.request, teacher_ids),
        "backbone": spec.model,
        "revision": spec.revision,
        "kind": item.result.metrics.get("kind", item.request.kind),
        "tune": item.result.metrics.get("tune", item.request.tune),
        "options": spec.options,
        "teacher_ids": teacher_ids,
        "metrics": item.result.metrics,
        "path": item.result.folder,
        "sha256": item.result.sha256,
    }


def _score_rows(session: Session, run: Run, fitted: Fitted) -> list[dict[str, Any]]:
    """The router's scores for all prompts of the grid, and the cross-fitted ones of those that it was trained on."""
    teacher_ids, prompt_ids = _teacher_ids(session, run), grid.read(session, run).prompt_ids.tolist()
    none = [None] * len(teacher_ids)
    cross_fitted = fitted.cross_fitted or [None] * len(prompt_ids)
    return [
        {
            "router_id": run.router_id,
            "prompt_id": prompt_id,
            "teacher_id": teacher_id,
            "score": score,
            "cross_fitted": without,
        }
        for prompt_id, row, others in zip(prompt_ids, fitted.scores, cross_fitted, strict=True)
        for teacher_id, score, without in zip(teacher_ids, row, others or none, strict=True)
    ]


def _teacher_ids(session: Session, run: Run) -> list[int]:
    """The ids of the run's teachers in head order."""
    return [teacher.id for teacher in lookup.teachers(session, run.id)]


def _fingerprint(spec: ModelSpec, fit: Fit, teacher_ids: Sequence[int]) -> str:
    """A hash of backbone, training data and teachers; it does not depend on where the checkpoint is stored."""
    fields = msgspec.to_builtins(msgspec.structs.replace(fit, folder=""))
    for name, before in _ADDED.items():
        if fields[name] == before:
            del fields[name]
    return hashlib.sha256(msgspec.msgpack.encode((spec, fields, teacher_ids))).hexdigest()


def _spec(run: Run, kind: str | None = None) -> ModelSpec:
    router = load_config(run.config).router
    is_fake = router.engine != "router"
    has_backbone = is_fake or "backbone" in needed_encoders(router, kind)
    return ModelSpec(
        engine=router.engine if is_fake else "router_fit",
        model=router.backbone if has_backbone else "",
        revision=(router.version or router.revision) if has_backbone else None,
        gpus=router.gpus,
        options=router.options,
    )


STAGE = Stage(
    name="fit_router",
    style=("purple", ":"),
    plan=plan,
    load=load,
    spec=lambda session, run, _: _spec(run),
    save=save,
    progress=progress,
    expected=_expected,
)
