"""Create valid rows for tests that need a run without working one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from persyn.config import RunConfig
from persyn.db.base import Base
from persyn.db.catalog import Prompt, Role, Run, RunPrompt, RunTeacher, Scorer, Student, Teacher
from persyn.db.results import Assignment, Response, Router
from persyn.db.work import Job


@dataclass(frozen=True, slots=True)
class MadeRun:
    """The ids of a run and its rows, in head order and prompt order."""

    id: int
    teacher_ids: list[int]
    prompt_ids: list[int]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_config(name: str = "run", teachers: Sequence[str] = ("a", "b"), **run: Any) -> RunConfig:
    """A run file with fake models."""
    return msgspec.convert(
        {
            "run": {"name": name, "setting": "instruct", "calibration": 4, "holdout": 0.25, **run},
            "prompts": {"file": "prompts.jsonl"},
            "student": {"name": "student", "model": "", "engine": "fake"},
            "quality": {"kind": "fake"},
            "router": {"engine": "fake"},
            "teachers": [{"name": teacher, "model": "", "engine": "fake"} for teacher in teachers],
        },
        RunConfig,
    )


def make_run(
    session: Session,
    *,
    name: str = "run",
    teachers: Sequence[str] = ("a", "b"),
    prompts: int = 10,
    calibration: int = 0,
    holdout: int = 0,
    stage: str = "calibrate",
) -> MadeRun:
    """Create a running run with its student, scorers, teachers and prompts.

    calibration, holdout: how many prompts, from the first on, have these roles; the others are targets.
    Runs of different names share the student, the scorers, and teachers of the same name.
    """
    config = make_config(name, teachers)
    student_id = make_student(session)
    run_id = _add(
        session,
        Run(
            name=name,
            stage=stage,
            config=config.frozen(),
            config_hash=config.digest(),
            seed=config.run.seed,
            student_id=student_id,
            quality_scorer_id=make_scorer(session, "fake"),
            learnability_scorer_id=make_scorer(session, "log_likelihood", student_id=student_id),
        ),
    )
    teacher_ids = [make_teacher(session, teacher) for teacher in teachers]
    prompt_ids = [make_prompt(session, f"{name}: prompt {number}?") for number in range(prompts)]
    roles = [Role.CALIBRATION] * calibration + [Role.HOLDOUT] * holdout
    roles += [Role.TARGET] * (prompts - len(roles))
    session.add_all(
        RunTeacher(run_id=run_id, position=position, teacher_id=teacher_id)
        for position, teacher_id in enumerate(teacher_ids)
    )
    session.add_all(
        RunPrompt(run_id=run_id, prompt_id=prompt_id, role=role)
        for prompt_id, role in zip(prompt_ids, roles, strict=True)
    )
    session.flush()
    return MadeRun(run_id, teacher_ids, prompt_ids)


def make_prompt(session: Session, text: str, **columns: Any) -> int:
    row = {"content_hash": digest(text), "text": text, "source": "prompts.jsonl", "meta": {}, **columns}
    return _add(session, Prompt(**row))


def make_teacher(session: Session, name: str, **columns: Any) -> int:
    """The teacher of this name, created on first use."""
    row = {
        "name": name,
        "fingerprint": digest(f"teacher {name}"),
        "engine": "fake",
        "model": name,
        "options": {},
        "sampling": {"max_tokens": 64},
        "few_shot": [],
        **columns,
    }
    return _found_or_added(session, Teacher, row)


def make_student(session: Session, name: str = "student") -> int:
    return _found_or_added(session, Student, {"name": name, "fingerprint": digest(f"student {name}"), "model": name})


def make_scorer(session: Session, kind: str, *, student_id: int | None = None) -> int:
    row: dict[str, Any] = {
        "fingerprint": digest(f"scorer {kind} {student_id}"),
        "kind": kind,
        "model": "",
        "options": {},
        "student_id": student_id,
    }
    return _found_or_added(session, Scorer, row)


def make_job(session: Session, run_id: int, **columns: Any) -> int:
    """Create a waiting job."""
    values = {"stage": "generate", "queue": "vllm.a", "first_prompt_id": 1, "last_prompt_id": 9, "n_prompts": 9}
    return _add(session, Job(run_id=run_id, **values | columns))


def make_response(session: Session, prompt_id: int, teacher_id: int, text: str | None = "Yes.", **columns: Any) -> int:
    """Create a finished response; pass `text=None` and `failure` for a failed one."""
    row = {
        "prompt_id": prompt_id,
        "teacher_id": teacher_id,
        "text": text,
        "finish_reason": None if text is None else "stop",
        "response_tokens": None if text is None else len(text.split()),
        "engine": "fake 1",
        **columns,
    }
    return _add(session, Response(**row))


def make_assignment(session: Session, run_id: int, prompt_id: int, teacher_id: int, **columns: Any) -> None:
    row = {"run_id": run_id, "prompt_id": prompt_id, "teacher_id": teacher_id, "reason": "router", **columns}
    session.add(Assignment(**row))
    session.flush()


def make_router(session: Session, run: MadeRun, **columns: Any) -> int:
    """Create a fitted router without checkpoint files."""
    row = {
        "fingerprint": digest(f"router {run.id}"),
        "backbone": "b",
        "tune": "head",
        "options": {},
        "teacher_ids": run.teacher_ids,
        "metrics": {},
        "path": "routers/1",
        "sha256": digest("files"),
        **columns,
    }
    return _add(session, Router(**row))


def _found_or_added(session: Session, model: Any, row: dict[str, Any]) -> int:
    found: int | None = session.scalar(select(model.id).where(model.fingerprint == row["fingerprint"]))
    return found if found is not None else _add(session, model(**row))


def _add(session: Session, row: Base) -> int:
    session.add(row)
    session.flush()
    made: int = row.id  # type: ignore[attr-defined]
    return made
