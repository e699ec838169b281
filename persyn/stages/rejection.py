"""Ask a teacher for several samples, score them, and keep the best or the first that is good enough.

Rejection sampling of the prompts that are assigned. A round asks for responses, and the next one scores them. Samples
of a prompt are asked for one at a time where one may be good enough, otherwise all at once. The choice is stored with
the assignment; until then, the rows that a prompt still needs are a query.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, case, delete, exists, func, select, true, update
from sqlalchemy.orm import Session, aliased

from persyn.config import GenerationTable, load_config
from persyn.db import lookup
from persyn.db.catalog import Run
from persyn.db.results import (
    Assignment,
    Origin,
    Response,
    Score,
    answers_assignment,
    is_candidate,
    sample_indices,
)
from persyn.db.text import reason
from persyn.jobs.queue import Claim, ModelJobs
from persyn.llm.protocols import ModelSpec
from persyn.stages import answers, combining, scoring
from persyn.stages.answers import Wanted
from persyn.stages.batch import Batch, Done, JobPlan, Progress, make_jobs

_OPEN = and_(Assignment.sample.is_(None), ~Assignment.rejected)
#: A response of the assigned teacher in a subquery, and its quality.
_written, _score = aliased(Response), aliased(Score)


def plan(session: Session, run: Run) -> int:
    """Choose where enough is known; create jobs for the missing scores and responses, and return their number."""
    is_gone = Assignment.sample.is_not(None), ~exists(_of_prompt(run, kept=True))
    session.execute(_changing(run).where(*is_gone).values(sample=None))
    choose(session, run)
    made = _WANTED.plan(session, run)
    choose(session, run)  # of imported teachers: their missing responses are failures now
    size = run.config["run"]["job_prompts"]
    for scorer in lookup.quality_scorers(session, run):
        spec = scoring.spec_in(session, run, scorer)
        to_score = JobPlan(run.id, _WANTED.name, spec, scorer_id=scorer.id, size=size)
        made += make_jobs(session, to_score, _unscored(session, run, scorer.id))
    return made


def load(session: Session, job: Claim) -> Batch:
    """Build the requests of one job: to a teacher, or to the quality scorer."""
    if job.scorer_id is None:
        return _WANTED.load(session, job)
    return scoring.load(session, job, _unscored(session, session.get_one(Run, job.run_id), job.scorer_id))


def spec(session: Session, run: Run, of: ModelJobs) -> ModelSpec:
    """The model that jobs of a teacher, or of the quality scorer, load."""
    of_this = answers.spec if of.scorer_id is None else scoring.spec
    return of_this(session, run, of)


def save(session: Session, job: Claim, done: Sequence[Done]) -> None:
    """Store responses, or scores and what can be chosen by them."""
    if job.scorer_id is None:
        answers.save(session, job, done)
    else:
        scoring.save(session, job, done)
        run = session.get_one(Run, job.run_id)
        combining.store(session, run, _samples(run).where(Response.id.in_([item.request.id for item in done])))
        choose(session, run, prompts=(job.first_prompt_id, job.last_prompt_id))


def choose(session: Session, run: Run, *, prompts: tuple[int, int] | None = None) -> None:
    """Keep a sample of each prompt with a good one, and of those with all samples; reject prompts without a right one.

    prompts: the first and the last id of those to look at; None means all.
    """
    generation = _generation(run)
    counted = select(func.count(_written.id)).where(_is_sample(run)).correlate(Assignment).scalar_subquery()
    has_all = and_(counted == generation.samples, ~exists(_of_prompt(run, unscored=True)))
    changing = _changing(run).where(_OPEN)
    if prompts is not None:
        changing = changing.where(Assignment.prompt_id.between(*prompts))
    if generation.threshold is not None:
        is_good = exists(_of_prompt(run, at_least=generation.threshold))
        session.execute(changing.where(is_good).values(sample=_best(run)))
    if generation.keep == "correct":
        has_text = exists(_of_prompt(run).where(_written.text.is_not(None)))
        session.execute(changing.where(has_all, has_text).values(rejected=True))
    session.execute(changing.where(has_all).values(sample=_best(run)))


def _generation(run: Run) -> GenerationTable:
    return load_config(run.config).generation


def _changing(run: Run) -> Any:
    return update(Assignment).where(Assignment.run_id == run.id).execution_options(synchronize_session=False)


def _is_sample(run: Run) -> ColumnElement[bool]:
    return and_(is_candidate(_written), _written.sample < _generation(run).samples)


def _of_prompt(run: Run, *, kept: bool = False, unscored: bool = False, at_least: float | None = None) -> Select[Any]:
    """Select an assignment's samples: all, the kept one, those to be scored, or those of at least this quality."""
    found = select(_written.id).where(_is_sample(run)).correlate(Assignment)
    has_score = exists().where(_score.response_id == _written.id, _score.scorer_id == run.quality_scorer_id)
    if kept:
        found = found.where(_written.sample == Assignment.sample)
    if unscored:
        found = found.where(_written.text.is_not(None), ~has_score)
    return found if at_least is None else found.where(has_score.where(_score.value >= at_least))


def _best(run: Run) -> Any:
    """The sample of the highest quality, the first one between equals; beyond good enough, quality does not count.

    Without any score, the first sample with a text, else the first.
    """
    limit = _generation(run).threshold
    quality = _score.value if limit is None else case((_score.value >= limit, limit), else_=_score.value)
    return (
        select(_written.sample)
        .outerjoin(_score, and_(_score.response_id == _written.id, _score.scorer_id == run.quality_scorer_id))
        .where(_is_sample(run))
        .order_by(_written.text.is_(None), _score.value.is_(None), quality.desc(), _written.sample)
        .limit(1)
        .correlate(Assignment)
        .scalar_subquery()
    )


def _kept(run: Run) -> Select[Any]:
    """Select the run's assignments with the kept responses, null where none is chosen."""
    return (
        select(Assignment.prompt_id)
        .select_from(Assignment)
        .outerjoin(Response, answers_assignment())
        .where(Assignment.run_id == run.id)
    )


def _missing(run: Run, teacher_id: int | None) -> Select[Any]:
    """Select the samples to ask a teacher for now."""
    generation = _generation(run)
    samples = sample_indices(generation.samples)
    missing = (
        select(Assignment.prompt_id, samples.c.sample)
        .select_from(Assignment)
        .join(samples, true())
        .outerjoin(Response, and_(is_candidate(), Response.sample == samples.c.sample))
        .where(Assignment.run_id == run.id, Assignment.teacher_id == teacher_id, _OPEN, Response.id.is_(None))
    )
    if generation.threshold is None:
        return missing
    earlier = select(func.count(_written.id)).where(is_candidate(_written), _written.sample < samples.c.sample)
    is_next = earlier.correlate(Assignment, samples).scalar_subquery() == samples.c.sample
    return missing.where(is_next, ~exists(_of_prompt(run, unscored=True)))


def _samples(run: Run) -> Select[Any]:
    """Select the samples of the assigned prompts."""
    return (
        select(Response.prompt_id)
        .select_from(Assignment)
        .join(Response, and_(is_candidate(), Response.sample < _generation(run).samples))
        .where(Assignment.run_id == run.id)
    )


def _unscored(session: Session, run: Run, scorer_id: int) -> Select[Any]:
    """Select the samples that a scorer has to score before a choice."""
    is_wanted = combining.is_wanted(session, run, scorer_id)
    return _samples(run).where(_OPEN, Response.text.is_not(None), is_wanted)


def progress(session: Session, run: Run) -> Progress:
    """Count the prompts whose sample is kept or that are rejected (both done), failed, or undecided."""
    kept, rejected, failed, total = session.execute(
        _kept(run).with_only_columns(
            func.count(Response.text),
            func.count(case((Assignment.rejected, 1))),
            func.count(Response.failure),
            func.count(),
        )
    ).one()
    return Progress(total, kept + rejected, failed)


def failures(run: Run) -> Select[Any]:
    """Select the failure of each prompt for which every sample failed."""
    return _kept(run).with_only_columns(Response.failure).where(Response.failure.is_not(None))


def forget(session: Session, run: Run, reasons: Collection[str]) -> int:
    """Delete samples, and qualities of samples, that failed for these reasons; choose anew for their prompts."""
    scorers = [scorer.id for scorer in lookup.quality_scorers(session, run)]
    samples = _samples(run).with_only_columns(Response.id, Response.prompt_id)
    failed = samples.where(reason(Response.failure).in_(reasons), Response.origin == Origin.GENERATED)
    unscored = samples.join(Score, and_(Score.response_id == Response.id, Score.scorer_id.in_(scorers))).where(
        reason(Score.failure).in_(reasons), combining.is_undecided(session, run)
    )
    responses, scored = session.execute(failed).all(), session.execute(unscored).all()
    again = [{"prompt": prompt_id} for prompt_id in {row.prompt_id for row in (*responses, *scored)}]
    session.execute(delete(Response).where(Response.id.in_(failed.with_only_columns(Response.id))))
    of_samples = Score.response_id.in_(unscored.with_only_columns(Response.id))
    session.execute(delete(Score).where(of_samples, Score.scorer_id.in_(scorers), reason(Score.failure).in_(reasons)))
    combining.forget_stale(session, run, _samples(run))
    for row in again:
        session.execute(_changing(run).where(Assignment.prompt_id == row["prompt"]).values(sample=None, rejected=False))
    return len(responses) + len(scored)


def rounds(run: Run) -> int:
    """Rounds of asking and scoring until every prompt has all its samples."""
    return (1 + combining.rounds(run)) * _generation(run).samples


_WANTED = Wanted("generate", _kept, _missing)
