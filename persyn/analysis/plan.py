"""Estimate the requests, tokens, costs and time of a run before it starts.

A run that does not exist yet is created in a temporary store with the usual code, next to copies of what the store has
for the same prompts and versions. It can then be counted like an existing run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from msgspec import Struct, structs
from sqlalchemy import Float, Select, and_, case, cast, func, literal, null, select
from sqlalchemy.orm import Session

from persyn.analysis import planned_scores, shifts, summary
from persyn.analysis.text_table import text_table
from persyn.config import IMPORTED, RunConfig, TeacherTable, load_config
from persyn.db import bulk, lookup
from persyn.db.base import Base
from persyn.db.catalog import Prompt, Role, Run, RunPrompt, RunTeacher, Scorer, Student, Teacher
from persyn.db.connect import Database, scratch
from persyn.db.results import Assignment, Response, Router, Score
from persyn.db.work import Event, Job, Load
from persyn.ingest.versions import Identities
from persyn.llm.engines import ENGINES
from persyn.method.strategies import STRATEGIES
from persyn.runs import pipeline, run_file, same_run, start
from persyn.stages import answers, assign
from persyn.stages.batch import CHARACTERS, TOKENS_PER_CHARACTER, TURNS

#: The number of a teacher's latest responses from which its response length is estimated.
_LAST = 10_000
#: With at least so many responses to a run's own prompts, its lengths are estimated from these alone.
_ENOUGH = 30
_CHUNK = 1_000


class Basis(Struct, frozen=True):
    """The sources of the estimates for one teacher version."""

    teacher: str
    engine: str
    gpus: int
    #: Tokens per response: the mean in the store, or the sampling limit.
    response_tokens: float
    response_tokens_from: Literal["run", "store", "max_tokens"]
    #: Measured on the responses in the store, or a default.
    tokens_per_character: float
    prompt_tokens_from: Literal["store", "characters"]
    #: Characters of the messages that precede each prompt, and of the chat template.
    opening_characters: int
    #: Response tokens per second of one busy engine; None if the store has no measurement.
    tokens_per_second: float | None
    #: Time to load its model once; None if the store has no measurement.
    load_seconds: float | None
    #: US dollars per million tokens.
    price_in: float | None
    price_out: float | None
    #: The number of responses whose lengths were measured, and the standard deviation of these lengths.
    measured: int = 0
    response_deviation: float = 0.0


class Amount(Struct, frozen=True):
    """Responses to request, with their tokens and costs; None where unknown."""

    responses: float
    prompt_tokens: float
    response_tokens: float
    #: US dollars.
    cost: float | None
    #: Without model loads; several engines share these hours.
    engine_hours: float | None
    #: As a budget counts engine hours: times GPUs, one on the CPU; 0 behind a server.
    gpu_hours: float | None


_Samples: TypeAlias = Mapping[Role, range]
"""The samples that a stage wants of a teacher's responses to a prompt of each role."""

_NOTHING = Amount(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


class Share(Struct, frozen=True):
    """One teacher's part of a run's work."""

    #: calibrate; generate; undecided: as if it alone answered the unassigned prompts; all: as if every teacher answered
    #: all prompts.
    stage: str
    teacher: str
    prompts: int
    #: Its stored responses, including failed ones: none of them is requested again.
    stored: int
    ask: Amount
    #: Stored scores, and an upper bound on those to compute: in calibrate, of all scorers; in generate and undecided,
    #: of the quality's, if responses are scored as they come. Imported scores are not counted.
    scores_stored: int
    scores_to_make: int


class Plan(Struct, frozen=True):
    """The remaining work of a run."""

    name: str
    #: None for a run that does not exist yet.
    state: str | None
    strategy: str
    prompts: int
    #: Prompts that all teachers answer.
    calibration: int
    #: Prompts whose teacher is decided during the run.
    undecided: int
    teachers: list[Basis]
    shares: list[Share]
    #: Totals with the cheapest and the most expensive teacher for undecided prompts, figure by figure; if a sample may
    #: be good enough, the first one is in `least`, and none in the other figures.
    least: Amount
    most: Amount
    #: Totals if the teachers share undecided prompts evenly; None if there are none, or one teacher gets all.
    even: Amount | None
    #: Totals if all teachers answer all prompts.
    generate_all: Amount

    def __repr__(self) -> str:
        """The estimates as text tables: one row per stage and teacher, and the totals."""
        columns = "requests", "tokens in", "tokens out", "US dollars", "hours"
        shares = [
            (share.stage, share.teacher, share.prompts, share.stored, *_rounded(share.ask))
            for share in self.shares
            if share.stage != "all"
        ]
        totals: dict[str, Amount | None] = {"this run": self.least}
        if not self.undecided and self.least != self.most:
            totals = {"if the first sample is good enough": self.least, "with all samples": self.most}
        if self.undecided:
            totals = {"with the cheapest teacher": self.least, "at an even split": self.even}
            totals["with the most expensive"] = self.most
        totals["all teachers answer all"] = self.generate_all
        return "\n\n".join(
            (
                f"run {self.name} ({self.state or 'not started'}): {self.prompts:,} prompts, {self.calibration:,} of "
                f"them for all teachers; strategy {self.strategy}",
                text_table(("stage", "teacher", "prompts", "stored", *columns), shares),
                text_table(("total", *columns), [(name, *_rounded(each)) for name, each in totals.items() if each]),
            )
        )


@dataclass(frozen=True, slots=True)
class _Pile:
    """Prompts of one role assigned to one teacher or none; or one teacher's responses of one sample to such prompts."""

    role: Role
    assigned_id: int | None
    teacher_id: int | None
    sample: int
    count: int
    characters: int
    failed: int
    scores: int

    def is_of(self, stage: str, teacher: Teacher, wanted: _Samples) -> bool:
        """Whether a stage needs a teacher's responses to such prompts, or contains them."""
        in_stage = {
            "calibrate": True,
            "generate": self.assigned_id == teacher.id,
            "undecided": self.assigned_id is None,
            "all": True,
        }
        samples = wanted[self.role]
        is_wanted = bool(samples) if self.teacher_id is None else self.sample in samples
        return in_stage[stage] and self.teacher_id in (None, teacher.id) and is_wanted


def of_file(
    session: Session,
    config: RunConfig,
    known: Identities,
    *,
    on_rows: Callable[[int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Plan:
    """The plan of a run that does not exist yet; the store is only read.

    Raises `UsageError` like `pipeline.start_run`, which also documents the arguments.
    """
    with scratch() as database, database.write() as there:
        for model in (Student, Teacher, Scorer):
            _copy(there, model, session, select(*model.__table__.columns))
        if config.router.fitted is not None:
            _copy(there, Router, session, select(*Router.__table__.columns).where(Router.learned.is_not(None)))
        for source in config.prompts.sources:
            prompts = select(
                Prompt.content_hash, *TURNS, Prompt.tools, Prompt.response_schema, Prompt.source, Prompt.meta
            )
            _copy(there, Prompt, session, prompts.where(Prompt.source == source))
        start.require_imported(session, config)
        run = pipeline.enlist(there, config, known, on_rows=on_rows, say=say)
        _copy_results(there, run, session)
        if run_file.n_calibration(config) == 0:
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
    """The plan of a configuration; for an existing run, of the remaining work.

    identify: called for a new run, outside any transaction; see `start.identities`.
    say:      called with notices for the user, such as changes of the prompts since the run was started.
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
    """The plan of the remaining work of an existing run.

    past: the store with its teachers' history, if that is another one.
    """
    teachers, config = lookup.teachers(session, run.id), load_config(run.config)
    bases = [
        _basis(past or session, *pair, run_id=run.id if past is None else None)
        for pair in zip(teachers, config.teachers, strict=True)
    ]
    scorers = [scorer for scorer in lookup.asked(session, run) if scorer.kind != IMPORTED]
    piles = _piles(session, run, scorers)
    asked = config.generation.samples

    def shares(stage: str, *, split: int = 1, asked: int = asked) -> list[Share]:
        wanted = _wanted(stage, config.run.samples, asked)
        of_each = [[pile for pile in piles if pile.is_of(stage, teacher, wanted)] for teacher in teachers]
        n_scorers = planned_scores.per_response(run, stage, scorers)
        found = [
            _share(stage, basis, mine, wanted, split, n_scorers) for basis, mine in zip(bases, of_each, strict=True)
        ]
        return [share for share in found if share.prompts]

    calibrate, generate, undecided, everything = map(shares, ("calibrate", "generate", "undecided", "all"))
    # The first sample may be good enough.
    fewest = asked if config.generation.threshold is None else 1
    least: list[Share | Amount] = [
        *calibrate,
        *shares("generate", asked=fewest),
        _merge(min, shares("undecided", asked=fewest)),
    ]
    strategy = config.strategy
    reads_prompts = STRATEGIES.require(strategy.kind, "strategy").decided_by in ("router", "function")
    evenly = shares("undecided", split=len(teachers)) if reads_prompts else []
    return Plan(
        name=run.name,
        state=run.state,
        strategy=strategy.name,
        prompts=everything[0].prompts if everything else 0,
        calibration=calibrate[0].prompts if calibrate else 0,
        undecided=undecided[0].prompts if undecided else 0,
        teachers=bases,
        shares=calibrate + generate + undecided + everything,
        least=_merge(sum, least),
        even=_merge(sum, [*calibrate, *generate, *evenly]) if evenly else None,
        most=_merge(sum, [*calibrate, *generate, _merge(max, undecided)]),
        generate_all=_merge(sum, everything),
    )


def _wanted(stage: str, samples: int, asked: int) -> _Samples:
    """The samples that a stage wants.

    samples: of a cell of the grid. asked: of an assigned prompt, at most; the grid's samples count.
    """
    if stage == "calibrate":
        of_grid, of_target = range(samples), range(0)
    elif stage == "all":
        of_grid, of_target = range(1), range(1)
    else:
        of_grid, of_target = range(samples, asked), range(asked)
    return {Role.CALIBRATION: of_grid, Role.HOLDOUT: of_grid, Role.TARGET: of_target}


def _copy(there: Session, model: type[Base], session: Session, rows: Any) -> None:
    found = session.execute(rows, execution_options={"yield_per": _CHUNK}).mappings()
    for part in found.partitions():
        bulk.insert_new(there, model, [dict(row) for row in part])


def _copy_results(there: Session, run: Run, session: Session) -> None:
    """Copy which responses and scores exist for the run's prompts, without their content."""
    teacher_ids = there.scalars(select(RunTeacher.teacher_id).where(RunTeacher.run_id == run.id)).all()
    scorer_ids = {run.quality_scorer_id, *(scorer.id for scorer in lookup.asked(there, run))}
    prompts = select(Prompt.id, Prompt.content_hash).join(RunPrompt).where(RunPrompt.run_id == run.id)
    prompts = prompts.order_by(Prompt.id).limit(_CHUNK)
    last, columns = 0, (Response.id, Response.teacher_id, Response.sample, Response.failure, Response.origin)
    responses = select(Prompt.content_hash, *columns).join(Prompt).where(Response.teacher_id.in_(teacher_ids))
    scores = select(Score.response_id, Score.scorer_id).join(Response).join(Prompt)
    scores = scores.where(Response.teacher_id.in_(teacher_ids), Score.scorer_id.in_(scorer_ids))
    if session.execute(responses.limit(1)).first() is None:
        return
    while chunk := there.execute(prompts.where(Prompt.id > last)).all():
        last = chunk[-1].id
        id_of = {content_hash: prompt_id for prompt_id, content_hash in chunk}
        rows = [
            dict(row)
            for row in session.execute(responses.where(bulk.among(session, Prompt.content_hash, id_of))).mappings()
        ]
        for row in rows:
            row |= {"prompt_id": id_of[row.pop("content_hash")], "text": None if row["failure"] else ""}
        bulk.insert_new(there, Response, rows)
        marks = session.execute(scores.where(bulk.among(session, Prompt.content_hash, id_of))).mappings()
        bulk.insert_new(there, Score, [{**mark, "value": 0.0, "detail": {}} for mark in marks])


def _piles(session: Session, run: Run, scorers: Sequence[Scorer]) -> list[_Pile]:
    """Count the prompts and responses of a run.

    scorers: those whose scores are counted.
    """
    assigned = and_(Assignment.run_id == RunPrompt.run_id, Assignment.prompt_id == RunPrompt.prompt_id)
    group = RunPrompt.role, Assignment.teacher_id
    prompts = select(*group).select_from(RunPrompt).join(Prompt).outerjoin(Assignment, assigned)
    prompts = prompts.where(RunPrompt.run_id == run.id).group_by(*group)
    responses = prompts.join(Response, Response.prompt_id == RunPrompt.prompt_id)
    responses = responses.group_by(Response.teacher_id, Response.sample)
    sums = func.count(), func.sum(CHARACTERS)
    sums_of_responses = *sums, func.count(Response.failure), func.sum(planned_scores.stored(run, scorers))
    counted = (
        prompts.add_columns(null(), literal(0), *sums, literal(0), literal(0)),
        responses.add_columns(Response.teacher_id, Response.sample, *sums_of_responses),
    )
    return [_Pile(*row) for each in counted for row in session.execute(each)]


def _share(stage: str, basis: Basis, piles: Sequence[_Pile], wanted: _Samples, split: int, n_scorers: int) -> Share:
    """A teacher's part of a stage; it is asked for 1/`split` of the missing responses."""
    owed = [pile for pile in piles if pile.teacher_id is None]
    there = [pile for pile in piles if pile.teacher_id is not None]
    prompts, stored = sum(pile.count for pile in owed), sum(pile.count for pile in there)
    responses = sum(pile.count * len(wanted[pile.role]) for pile in owed)
    characters = sum(pile.characters * len(wanted[pile.role]) for pile in owed) - sum(pile.characters for pile in there)
    # Imported teachers are never asked: their missing responses stay missing.
    missing = 0 if basis.engine == IMPORTED else responses - stored
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
    return Amount(responses, prompt_tokens, response_tokens, cost, hours, _gpu_hours(basis, hours))


def _gpu_hours(basis: Basis, hours: float | None) -> float | None:
    kind = ENGINES.get(basis.engine)
    if kind is not None and kind.model == "server":
        return 0.0
    return None if hours is None else hours * max(1, basis.gpus)


def _merge(how: Callable[[Iterable[Any]], Any], parts: Sequence[Share | Amount]) -> Amount:
    """Combine amounts figure by figure; a figure unknown in one is unknown in the result."""
    amounts = [part.ask if isinstance(part, Share) else part for part in parts] or [_NOTHING]
    columns = zip(*(structs.astuple(amount) for amount in amounts), strict=True)
    figures: Iterable[Any] = (None if None in column else how(column) for column in columns)
    return Amount(*figures)


def _rounded(amount: Amount) -> tuple[float | None, ...]:
    counts = (round(count) for count in (amount.responses, amount.prompt_tokens, amount.response_tokens))
    return (*counts, amount.cost, amount.engine_hours)


def _basis(session: Session, teacher: Teacher, table: TeacherTable, *, run_id: int | None) -> Basis:
    """The estimates for a teacher, from its responses to a run's prompts or, if there are too few, from all of them."""
    opening = answers.opening_characters(teacher.system, teacher.few_shot)
    last = (
        select(Response.prompt_tokens, Response.response_tokens, (CHARACTERS + opening).label("characters"))
        .join(Prompt)
        .where(Response.teacher_id == teacher.id, Response.text.is_not(None))
        .order_by(Response.id.desc())
        .limit(_LAST)
    )
    of_run = last.where(Response.prompt_id.in_(select(RunPrompt.prompt_id).where(RunPrompt.run_id == run_id)))
    length, square, measured, tokens, characters = _lengths(session, of_run)
    is_of_run = measured >= _ENOUGH
    if not is_of_run:
        length, square, measured, tokens, characters = _lengths(session, last)
    tokens_per_second, load_seconds = _pace(session, teacher.id)
    return Basis(
        teacher=teacher.name,
        engine=teacher.engine,
        gpus=table.gpus,
        response_tokens=float(teacher.sampling["max_tokens"] if length is None else length),
        response_tokens_from="max_tokens" if length is None else "run" if is_of_run else "store",
        tokens_per_character=tokens / characters if tokens else TOKENS_PER_CHARACTER,
        prompt_tokens_from="store" if tokens else "characters",
        opening_characters=opening,
        tokens_per_second=tokens_per_second,
        load_seconds=load_seconds,
        price_in=teacher.price_in,
        price_out=teacher.price_out,
        measured=measured,
        response_deviation=0.0 if length is None else max(0.0, float(square) - float(length) ** 2) ** 0.5,
    )


def _lengths(session: Session, responses: Select[Any]) -> Any:
    """Mean, mean square and number of the lengths of responses, and the tokens and characters of their prompts."""
    read = responses.subquery()
    length, characters = read.c.response_tokens, case((read.c.prompt_tokens.is_not(None), read.c.characters))
    square = func.avg(cast(length, Float) * length)
    sums = func.sum(read.c.prompt_tokens), func.sum(characters)
    return session.execute(select(func.avg(length), square, func.count(length), *sums)).one()


def _pace(session: Session, teacher_id: int) -> tuple[float | None, float | None]:
    """Response tokens per second of work, and seconds per model load.

    Work is the time with jobs in hand, since responses are generated concurrently and their durations overlap.
    """
    jobs = select(Job.id).where(Job.teacher_id == teacher_id)
    written = select(func.sum(Response.response_tokens)).where(Response.teacher_id == teacher_id)
    tokens = session.scalar(written.where(Response.job_id.is_not(None)))
    loads = select(func.sum(Load.seconds), func.avg(Load.seconds)).where(Load.job_id.in_(jobs))
    loading, load_seconds = session.execute(loads).one()
    worked = shifts.of_jobs(session, Event.job_id.in_(jobs)).values()
    seconds = sum(shift.work_seconds for shift in worked) - (loading or 0.0)
    return tokens / seconds if tokens and seconds > 0 else None, load_seconds
