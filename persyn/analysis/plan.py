"""What a run would ask of its teachers, and what that comes to, before anything of it is started.

A run that is not there yet is made in a scratch store, by the code that starts runs, beside what the store has of the
same prompts and versions. So it is counted as one that is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from msgspec import Struct, structs
from sqlalchemy import Text, and_, case, cast, func, literal, null, select
from sqlalchemy.orm import Session

from persyn.analysis import summary
from persyn.config import IMPORTED, RunConfig, thaw
from persyn.db import bulk
from persyn.db.base import Base
from persyn.db.catalog import Prompt, Role, Run, RunPrompt, RunTeacher, Scorer, Student, Teacher
from persyn.db.connect import Database, scratch
from persyn.db.results import Assignment, Response, Score
from persyn.db.work import Event, Job, Load
from persyn.ingest.versions import Identities
from persyn.runs import pipeline, same_run, start
from persyn.stages import answers, assign

#: So many of a teacher's last responses say how long its responses are.
_LAST = 10_000
#: Where no response tells.
_TOKENS_PER_CHARACTER = 0.25
_CHUNK = 1_000
_CHARACTERS = func.length(Prompt.text) + func.coalesce(func.length(cast(Prompt.history, Text)), 0)


class Basis(Struct, frozen=True):
    """What the figures of one teacher version rest on."""

    teacher: str
    engine: str
    gpus: int
    #: Of one response: the mean in the store, or the most that may be sampled.
    response_tokens: float
    response_tokens_from: Literal["store", "max_tokens"]
    #: By what it read for the responses in the store, or a guess.
    tokens_per_character: float
    prompt_tokens_from: Literal["store", "characters"]
    #: Of what it is shown before each prompt.
    opening_characters: int
    #: Response tokens by one engine while it had work; None where the store has no work of it.
    tokens_per_second: float | None
    #: One load of its model; None where none was seen.
    load_seconds: float | None
    #: US dollars per million tokens.
    price_in: float | None
    price_out: float | None


class Amount(Struct, frozen=True):
    """Responses to be asked for, and what they come to; None where it cannot be known."""

    responses: float
    prompt_tokens: float
    response_tokens: float
    #: US dollars.
    cost: float | None
    #: Loads left out; several engines share them.
    engine_hours: float | None


_NOTHING = Amount(0.0, 0.0, 0.0, 0.0, 0.0)


class Share(Struct, frozen=True):
    """One teacher's part of a run's work."""

    #: calibrate; generate; undecided: as if it alone answered what has no teacher yet; all: as if all answered all.
    stage: str
    teacher: str
    prompts: int
    #: Responses of it that are there, failed ones too: none of them is asked for again.
    stored: int
    ask: Amount
    #: In calibrate, of scores that are not imported: those that are there, and those to be made at most.
    scores_stored: int
    scores_to_make: int


class Plan(Struct, frozen=True):
    """What is left to ask for a run."""

    name: str
    #: None of a run that is not there yet.
    state: str | None
    strategy: str
    prompts: int
    #: Prompts that all teachers answer.
    calibration: int
    #: Prompts whose teacher is decided only while the run goes on.
    undecided: int
    teachers: list[Basis]
    shares: list[Share]
    #: In all, with each figure's cheapest and dearest teacher for what is undecided.
    least: Amount
    most: Amount
    #: If teachers share evenly what is undecided; None where nothing is, or one teacher will have it all.
    even: Amount | None
    #: If all teachers answer all prompts.
    generate_all: Amount


@dataclass(frozen=True, slots=True)
class _Pile:
    """Prompts of one role that were assigned to one teacher, or to none; or one teacher's responses to such prompts."""

    role: Role
    assigned_id: int | None
    teacher_id: int | None
    count: int
    characters: int
    failed: int
    scores: int

    def is_of(self, stage: str, teacher: Teacher) -> bool:
        """Whether a stage asks a teacher for responses to such prompts, or finds them there."""
        in_stage = {
            "calibrate": self.role != Role.TARGET,
            "generate": self.role == Role.TARGET and self.assigned_id == teacher.id,
            "undecided": self.role == Role.TARGET and self.assigned_id is None,
            "all": True,
        }
        return in_stage[stage] and self.teacher_id in (None, teacher.id)


def of_file(
    session: Session,
    config: RunConfig,
    known: Identities,
    *,
    on_rows: Callable[[int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Plan:
    """The plan of a run that is not there yet; what is read of the store changes nothing in it.

    Raises `UsageError` for whatever `pipeline.start_run` would refuse, which also explains the arguments.
    """
    with scratch() as database, database.write() as there:
        for model in (Student, Teacher, Scorer):
            _copy(there, model, session, select(*model.__table__.columns))
        for source in config.prompts.sources:
            prompts = select(Prompt.content_hash, Prompt.text, Prompt.history, Prompt.source, Prompt.meta)
            _copy(there, Prompt, session, prompts.where(Prompt.source == source))
        start.require_imported(session, config)
        run = pipeline.enlist(there, config, known, on_rows=on_rows, say=say)
        _copy_results(there, run, session)
        if config.n_calibration == 0:
            assign.plan(there, run)
        return structs.replace(of_run(there, run, past=session), state=None)


def of_config(
    database: Database,
    config: RunConfig,
    *,
    identify: Callable[[RunConfig], Identities],
    on_rows: Callable[[int], None] | None = None,
    say: Callable[[str], None],
) -> Plan:
    """The plan of a configuration: of what is left, where its run is there already.

    identify: called for a new run, outside any transaction; see `start.identities`.
    say:      called with what a person should know, such as how the prompts changed since the run was started.
    Raises `UsageError` for whatever `pipeline.start_run` would refuse.
    """
    with database.read() as session:
        run = start.find(session, config)
        if run is not None:
            if (change := same_run.look(session, run, config)) is not None:
                say(str(change))
            return of_run(session, run)
    known = identify(config)
    with database.read() as session:
        return of_file(session, config, known, on_rows=on_rows, say=say)


def of_run(session: Session, run: Run, *, past: Session | None = None) -> Plan:
    """The plan of what is left of a run that is there.

    past: where it is kept what its teachers did before, if that is another store.
    """
    teachers = answers.teachers_of(session, run.id)
    bases = [_basis(past or session, teacher) for teacher in teachers]
    is_used = Scorer.id.in_((run.quality_scorer_id, run.learnability_scorer_id))
    scorer_ids = session.scalars(select(Scorer.id).where(is_used, Scorer.kind != IMPORTED)).all()
    piles = _piles(session, run, scorer_ids)

    def shares(stage: str, *, split: int = 1) -> list[Share]:
        of_each = [[pile for pile in piles if pile.is_of(stage, teacher)] for teacher in teachers]
        n_scorers = len(scorer_ids) if stage == "calibrate" else 0
        found = [_share(stage, basis, mine, split, n_scorers) for basis, mine in zip(bases, of_each, strict=True)]
        return [share for share in found if share.prompts]

    calibrate, generate, undecided, everything = map(shares, ("calibrate", "generate", "undecided", "all"))
    fixed = _merge(sum, calibrate + generate)
    strategy = thaw(run.config).strategy
    evenly = shares("undecided", split=len(teachers)) if strategy.kind in ("persyn", "python") else []
    return Plan(
        name=run.name,
        state=run.state,
        strategy=strategy.name,
        prompts=everything[0].prompts,
        calibration=calibrate[0].prompts if calibrate else 0,
        undecided=undecided[0].prompts if undecided else 0,
        teachers=bases,
        shares=calibrate + generate + undecided + everything,
        least=_merge(sum, [fixed, _merge(min, undecided)]),
        even=_merge(sum, [*calibrate, *generate, *evenly]) if evenly else None,
        most=_merge(sum, [fixed, _merge(max, undecided)]),
        generate_all=_merge(sum, everything),
    )


def _copy(there: Session, model: type[Base], session: Session, rows: Any) -> None:
    found = session.execute(rows, execution_options={"yield_per": _CHUNK}).mappings()
    for part in found.partitions():
        bulk.insert_new(there, model, [dict(row) for row in part])


def _copy_results(there: Session, run: Run, session: Session) -> None:
    """Copy which responses and scores there are to the run's prompts, and not what they say."""
    teacher_ids = there.scalars(select(RunTeacher.teacher_id).where(RunTeacher.run_id == run.id)).all()
    scorer_ids = run.quality_scorer_id, run.learnability_scorer_id
    prompts = select(Prompt.id, Prompt.content_hash).join(RunPrompt).where(RunPrompt.run_id == run.id)
    prompts = prompts.order_by(Prompt.id).limit(_CHUNK)
    responses = select(Prompt.content_hash, Response.id, Response.teacher_id, Response.failure, Response.origin)
    responses = responses.join(Prompt).where(Response.teacher_id.in_(teacher_ids), Response.sample == 0)
    scores = select(Score.response_id, Score.scorer_id).join(Response).join(Prompt).where(Response.sample == 0)
    scores = scores.where(Response.teacher_id.in_(teacher_ids), Score.scorer_id.in_(scorer_ids))
    last = 0
    while chunk := there.execute(prompts.where(Prompt.id > last)).all():
        last = chunk[-1].id
        id_of = {content_hash: prompt_id for prompt_id, content_hash in chunk}
        rows = [dict(row) for row in session.execute(responses.where(Prompt.content_hash.in_(id_of))).mappings()]
        for row in rows:
            row |= {"prompt_id": id_of[row.pop("content_hash")], "text": None if row["failure"] else "", "sample": 0}
        bulk.insert_new(there, Response, rows)
        marks = session.execute(scores.where(Prompt.content_hash.in_(id_of))).mappings()
        bulk.insert_new(there, Score, [{**mark, "value": 0.0, "detail": {}} for mark in marks])


def _piles(session: Session, run: Run, scorer_ids: Sequence[int]) -> list[_Pile]:
    assigned = and_(Assignment.run_id == RunPrompt.run_id, Assignment.prompt_id == RunPrompt.prompt_id)
    group = RunPrompt.role, Assignment.teacher_id
    prompts = select(*group).select_from(RunPrompt).join(Prompt).outerjoin(Assignment, assigned)
    prompts = prompts.where(RunPrompt.run_id == run.id).group_by(*group)
    responses = prompts.join(Response, and_(Response.prompt_id == RunPrompt.prompt_id, Response.sample == 0))
    responses = responses.group_by(Response.teacher_id)
    sums = func.count(), func.sum(_CHARACTERS)
    scores = select(func.count()).where(Score.response_id == Response.id, Score.scorer_id.in_(scorer_ids))
    in_grid = case((RunPrompt.role != Role.TARGET, scores.scalar_subquery()), else_=0)
    sums_of_responses = *sums, func.count(Response.failure), func.sum(in_grid)
    counted = (
        prompts.add_columns(null(), *sums, literal(0), literal(0)),
        responses.add_columns(Response.teacher_id, *sums_of_responses),
    )
    return [_Pile(*row) for each in counted for row in session.execute(each)]


def _share(stage: str, basis: Basis, piles: Sequence[_Pile], split: int, n_scorers: int) -> Share:
    """A teacher's part of a stage; asked of it is one in `split` of what is missing."""
    owed = [pile for pile in piles if pile.teacher_id is None]
    there = [pile for pile in piles if pile.teacher_id is not None]
    prompts, stored = sum(pile.count for pile in owed), sum(pile.count for pile in there)
    characters = sum(pile.characters for pile in owed) - sum(pile.characters for pile in there)
    # An imported teacher is never asked: what it did not bring stays away.
    missing = 0 if basis.engine == IMPORTED else prompts - stored
    scores = sum(pile.scores for pile in there) if n_scorers else 0
    texts = stored + missing - sum(pile.failed for pile in there)
    ask = _amount(basis, missing / split, characters / split)
    return Share(stage, basis.teacher, prompts, stored, ask, scores, n_scorers * texts - scores)


def _amount(basis: Basis, responses: float, characters: float) -> Amount:
    if not responses:
        return _NOTHING
    prompt_tokens = basis.tokens_per_character * (characters + responses * basis.opening_characters)
    response_tokens = basis.response_tokens * responses
    has_prices = basis.price_in is not None and basis.price_out is not None
    hours = response_tokens / basis.tokens_per_second / 3600 if basis.tokens_per_second else None
    cost = summary.priced(prompt_tokens, response_tokens, basis) if has_prices else None
    return Amount(responses, prompt_tokens, response_tokens, cost, hours)


def _merge(how: Callable[[Iterable[Any]], Any], parts: Sequence[Share | Amount]) -> Amount:
    """One amount of several, figure by figure; what is not known of one is not known."""
    amounts = [part.ask if isinstance(part, Share) else part for part in parts] or [_NOTHING]
    columns = zip(*(structs.astuple(amount) for amount in amounts), strict=True)
    figures: Iterable[Any] = (None if None in column else how(column) for column in columns)
    return Amount(*figures)


def _basis(session: Session, teacher: Teacher) -> Basis:
    opening = sum(len(turn["content"]) for turn in answers.opening_of(teacher.system, teacher.few_shot))
    last = (
        select(Response.prompt_tokens, Response.response_tokens, (_CHARACTERS + opening).label("characters"))
        .join(Prompt)
        .where(Response.teacher_id == teacher.id, Response.text.is_not(None))
        .order_by(Response.id.desc())
        .limit(_LAST)
        .subquery()
    )
    read = case((last.c.prompt_tokens.is_not(None), last.c.characters))
    length, tokens, characters = session.execute(
        select(func.avg(last.c.response_tokens), func.sum(last.c.prompt_tokens), func.sum(read))
    ).one()
    tokens_per_second, load_seconds = _pace(session, teacher.id)
    return Basis(
        teacher=teacher.name,
        engine=teacher.engine,
        gpus=teacher.gpus,
        response_tokens=float(teacher.sampling["max_tokens"] if length is None else length),
        response_tokens_from="max_tokens" if length is None else "store",
        tokens_per_character=tokens / characters if tokens else _TOKENS_PER_CHARACTER,
        prompt_tokens_from="store" if tokens else "characters",
        opening_characters=opening,
        tokens_per_second=tokens_per_second,
        load_seconds=load_seconds,
        price_in=teacher.price_in,
        price_out=teacher.price_out,
    )


def _pace(session: Session, teacher_id: int) -> tuple[float | None, float | None]:
    """Response tokens in a second of work, and seconds of a load.

    Work is the time with jobs in hand: responses are written side by side, so that the seconds of each overlap.
    """
    jobs = select(Job.id).where(Job.teacher_id == teacher_id)
    written = select(func.sum(Response.response_tokens)).where(Response.teacher_id == teacher_id)
    tokens = session.scalar(written.where(Response.job_id.is_not(None)))
    loads = select(func.sum(Load.seconds), func.avg(Load.seconds)).where(Load.job_id.in_(jobs))
    loading, load_seconds = session.execute(loads).one()
    shifts = summary.shifts(session, Event.job_id.in_(jobs)).values()
    seconds = sum(shift.work_seconds for shift in shifts) - (loading or 0.0)
    return tokens / seconds if tokens and seconds > 0 else None, load_seconds
