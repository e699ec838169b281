"""Run a pilot: train small students on a run's calibration responses, ask each, and see which definition foretold it.

Every student is one folder of PERSYN_HOME/pilots, named by the digest of all that determines it. A pilot that was
killed, or is repeated with other settings, trains only students that are not there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray
from sqlalchemy import and_, select
from sqlalchemy.orm import Session

from persyn.config import Sampling, fingerprint_of, load_config
from persyn.db.catalog import Prompt, Run, Scorer
from persyn.db.connect import Database
from persyn.db.results import Response, Score
from persyn.llm.identity import require_unchanged
from persyn.llm.protocols import Generate, Judge, Judged, Result
from persyn.llm.template import Conversation
from persyn.settings import Settings
from persyn.stages import scoring
from persyn.stages.batch import TURNS, conversation, to_wire
from persyn.student import become
from persyn.student.become import Became, Job
from persyn.student.hosting import hosted, served
from persyn.student.lock import locked
from persyn.student.pilot_plan import Plan
from persyn.student.training_settings import TrainingCallback

#: The folder of PERSYN_HOME that holds what students became.
FOLDER = "pilots"
_CHUNK = 500

PilotCallback: TypeAlias = Callable[[str, int, int, str], object]
"""Called with what is done ("train" or "judge"), its total, how much of it is done, and a remark."""

Do: TypeAlias = Callable[[Job, Path, TrainingCallback], Became]
"""Does a job and stores its result in a folder: `become.in_child`, or `become.become` in this process."""


@dataclass(frozen=True, slots=True, eq=False)
class Outcomes:
    """What M students became: (M, S, A) scores for S seeds and A asked prompts, NaN where there is none.

    untrained: (1, 1, A) of the student before training.
    quality:   None where responses are not scored.
    """

    likelihood: NDArray[np.float64]
    quality: NDArray[np.float64] | None
    untrained_likelihood: NDArray[np.float64]
    untrained_quality: NDArray[np.float64] | None


def count_done(database: Database, plan: Plan, home: Path) -> tuple[int, int]:
    """The number of students that a plan needs, the untrained one included, and how many are there."""
    folders = [_folder(home, job) for job in _jobs(database, plan)]
    return len(folders), sum(folder.exists() for folder in folders)


def run(
    database: Database, plan: Plan, settings: Settings, progress: PilotCallback, do: Do = become.in_child
) -> Outcomes:
    """Train and ask every student of a plan, one after the other, and score their responses.

    Raises `UsageError` for a student that has changed, or a folder that holds something else, and `EngineError` when
    one cannot be trained; finished students are kept.
    """
    require_unchanged(plan.spec.model, plan.revision)
    trained = [
        _student(job, _folder(settings.home, job), do, _told(plan, place, progress))
        for place, job in enumerate(_jobs(database, plan))
    ]
    likelihood = np.stack([_per_prompt(plan, found.log_likelihoods) for found in trained])
    quality = _quality(database, plan, settings, trained, progress) if plan.is_scored else None
    return Outcomes(
        likelihood=_by_seed(plan, likelihood),
        quality=None if quality is None else _by_seed(plan, quality),
        untrained_likelihood=likelihood[None, :1],
        untrained_quality=None if quality is None else quality[None, :1],
    )


def n_steps(plan: Plan) -> int:
    """Steps of one student's training."""
    how = plan.settings.training
    return -(-len(plan.learn_ids) // how.batch_size) * how.epochs


def _told(plan: Plan, place: int, progress: PilotCallback) -> TrainingCallback:
    """Progress in steps over all students; the untrained one, which is the first, has none."""
    n_students, steps = len(plan.choices) * plan.settings.seeds, n_steps(plan)

    def told(done: int, total: int, loss: float | None) -> None:
        finished = 0 if place == 0 else (place - 1) * steps + round(done / total * steps)
        of = f"student {place} of {n_students}" + ("" if loss is None else f", loss {loss:.3f}")
        progress("train", n_students * steps, finished, of if place else "the untrained student")

    return told


def _student(job: Job, folder: Path, do: Do, progress: TrainingCallback) -> Became:
    """What a student became, from its folder or by training it."""
    key = job.key()
    if (found := become.find(folder, key)) is None:
        with locked(become.training_folder(folder)) as require_mine:
            if (found := become.find(folder, key)) is None:

                def step(done: int, total: int, loss: float | None) -> None:
                    require_mine()
                    progress(done, total, loss)

                progress(0, 1, None)
                found = do(job, folder, step)
    shutil.rmtree(become.training_folder(folder), ignore_errors=True)
    progress(1, 1, None)
    return found


def _folder(home: Path, job: Job) -> Path:
    return home / FOLDER / job.key()[:16]


def _jobs(database: Database, plan: Plan) -> Iterator[Job]:
    """The untrained student, then those of each choice and seed; only one job's texts are in memory at a time."""
    with database.read() as session:
        asked, judged = _asked(session, plan), _judged(session, plan)
    untrained = Job(plan.spec, plan.revision, settings=None, conversations=[], asked=asked, judged=judged)
    yield untrained
    for choice in plan.choices:
        for seed, teachers in enumerate(choice.teachers):
            chosen = {
                prompt_id: plan.teacher_ids[column]
                for prompt_id, column in zip(plan.learn_ids, teachers.tolist(), strict=True)
            }
            with database.read() as session:
                rows = _responses(session, plan, set(chosen.items()))
            how = msgspec.structs.replace(plan.settings.training, seed=plan.settings.training.seed + seed)
            conversations = [_conversation(rows[cell]) for cell in chosen.items()]
            yield msgspec.structs.replace(untrained, settings=how, conversations=conversations)


def _responses(session: Session, plan: Plan, cells: set[tuple[int, int]]) -> dict[tuple[int, int], Any]:
    """The sample of the highest quality of each (prompt, teacher), the first of equal ones, with the prompt's turns."""
    run = session.get_one(Run, plan.run_id)
    is_its_quality = and_(Score.response_id == Response.id, Score.scorer_id == run.quality_scorer_id)
    found: dict[tuple[int, int], Any] = {}
    prompt_ids = sorted({prompt_id for prompt_id, _ in cells})
    for start in range(0, len(prompt_ids), _CHUNK):
        rows = session.execute(
            select(Response.prompt_id, Response.teacher_id, Response.text.label("response"), Response.reasoning)
            .add_columns(Response.tool_calls, *TURNS, Prompt.tools)
            .join(Prompt, Prompt.id == Response.prompt_id)
            .outerjoin(Score, is_its_quality)
            .where(Response.prompt_id.in_(prompt_ids[start : start + _CHUNK]), Response.text.is_not(None))
            .where(Response.sample < load_config(run.config).run.samples)
            .order_by(Response.prompt_id, Response.teacher_id, Score.value.desc().nulls_last(), Response.sample)
        )
        for row in rows:
            if (cell := (row.prompt_id, row.teacher_id)) in cells:
                found.setdefault(cell, row)
    return found


def _conversation(row: Any) -> Conversation:
    return Conversation(conversation(row), row.response, row.reasoning, row.tool_calls, row.tools)


def _asked(session: Session, plan: Plan) -> list[Generate]:
    """A request for each prompt to ask; none where responses are not scored."""
    if not plan.is_scored:
        return []
    sampling = Sampling(max_tokens=plan.settings.max_tokens, temperature=0.0)
    rows = _prompts(session, plan.asked_ids)
    return [
        Generate(place, conversation(rows[prompt_id]), sampling, seed=0, tools=rows[prompt_id].tools)
        for place, prompt_id in enumerate(plan.asked_ids)
    ]


def _judged(session: Session, plan: Plan) -> list[Judge]:
    """The best responses to the prompts to ask, prompt by prompt; see `_shown`."""
    cells = [(plan.asked_ids[row], plan.teacher_ids[column]) for row, column in _shown(plan)]
    rows = _responses(session, plan, set(cells))
    return [
        Judge(
            place,
            conversation(rows[cell]),
            rows[cell].response,
            reasoning=rows[cell].reasoning,
            tools=rows[cell].tools,
            tool_calls=rows[cell].tool_calls,
        )
        for place, cell in enumerate(cells)
    ]


def _shown(plan: Plan) -> list[tuple[int, int]]:
    """(row, column) of the best responses, in the order in which they are judged."""
    return [(int(row), int(column)) for row, column in np.argwhere(plan.best)]


def _per_prompt(plan: Plan, values: Sequence[float | None]) -> NDArray[np.float64]:
    """(A,) means over the tied best responses to each asked prompt; NaN without any."""
    cells = np.full(plan.best.shape, np.nan)
    for cell, value in zip(_shown(plan), values, strict=True):
        cells[cell] = np.nan if value is None else value
    count = (~np.isnan(cells)).sum(axis=1)
    return np.asarray(np.divide(np.nansum(cells, axis=1), count, out=np.full(len(count), np.nan), where=count > 0))


def _by_seed(plan: Plan, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(M, S, A) from the values of all students, of which the first is untrained."""
    return values[1:].reshape(len(plan.choices), plan.settings.seeds, -1)


def _prompts(session: Session, prompt_ids: Sequence[int]) -> Mapping[int, Any]:
    rows = session.execute(
        select(Prompt.id, *TURNS, Prompt.tools, Prompt.answer, Prompt.meta).where(Prompt.id.in_(prompt_ids))
    )
    return {row.id: row for row in rows}


def _quality(
    database: Database, plan: Plan, settings: Settings, trained: Sequence[Became], progress: PilotCallback
) -> NDArray[np.float64]:
    """(1 + M S, A) quality of every student's responses; the scorer is loaded once, for those without a score.

    Scores are stored as they arrive.
    """
    with database.read() as session:
        scorer_run = session.get_one(Run, plan.run_id)
        scorer = session.get_one(Scorer, scorer_run.quality_scorer_id)
        (table,) = load_config(scorer_run.config).scorers
        spec = scoring.spec_of(scorer, model=table.model, gpus=table.gpus, options=table.options)
        rows = _prompts(session, plan.asked_ids)
        judged_by = fingerprint_of([(rows[each].answer, rows[each].meta) for each in plan.asked_ids])
        name = f"quality-{scorer.fingerprint[:16]}-{judged_by[:16]}.json"
    files = [settings.home / FOLDER / found.key[:16] / name for found in trained]
    values = [_read(file, len(plan.asked_ids)) for file in files]
    requests = [
        Judge(
            student * len(plan.asked_ids) + place,
            conversation(row := rows[prompt_id]),
            text,
            tools=row.tools,
            answer=row.answer,
            meta=to_wire(row.meta),
        )
        for student, became in enumerate(trained)
        for place, (prompt_id, text) in enumerate(zip(plan.asked_ids, became.responses, strict=True))
        if text is not None and values[student][place] is None
    ]
    if requests:
        with hosted(spec, settings) as host:
            n_done = 0
            for results in served(host, requests):
                n_done += len(results)
                for student in _take(results, values):
                    _write(files[student], values[student])
                progress("judge", len(requests), n_done, "")
    return np.array(values, dtype=np.float64)


def _take(results: Sequence[Result], values: list[list[float | None]]) -> set[int]:
    """Put scores among the values of M students, each of A prompts; return the students that got some."""
    found = {each.id: each.value for each in results if isinstance(each, Judged) and isfinite(each.value)}
    places = {divmod(number, len(values[0])): value for number, value in found.items()}
    for (student, place), value in places.items():
        values[student][place] = value
    return {student for student, _ in places}


def _read(file: Path, n: int) -> list[float | None]:
    """Stored values, None for those that are missing: not scored yet, or failed, which is asked again."""
    return msgspec.json.decode(file.read_bytes(), type=list[float | None]) if file.exists() else [None] * n


def _write(file: Path, values: Sequence[float | None]) -> None:
    """Write values in one step, so that a killed process leaves no part of them."""
    new = file.with_suffix(f".{os.getpid()}")
    new.write_bytes(msgspec.json.encode(values))
    new.replace(file)
