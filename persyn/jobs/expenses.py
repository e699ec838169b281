"""What requests cost a run, over all workers: hold an upper estimate before they are sent, settle with their results.

Everything is counted under the claim that sent it. A result is settled in the transaction that stores it, which checks
the fence, so nothing is counted twice; what a lost worker had in flight is settled by whoever takes its job.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy import and_, case, func, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from persyn.config import BudgetTable, Limits, RunConfig, load_config
from persyn.db.catalog import Run, RunTeacher
from persyn.db.spending import Expense, Place, Price, PriceKind
from persyn.db.time import now
from persyn.db.work import Batch, Job, JobState
from persyn.llm import engines
from persyn.llm.engines import ENGINES
from persyn.llm.protocols import ModelSpec
from persyn.llm.rates import NOTHING, Usage

if TYPE_CHECKING:
    from persyn.jobs.queue import Claim

#: First key of the advisory locks under which the workers of a run hold amounts; an arbitrary unique number.
_BUDGET_LOCK = 0x504255
#: The prices of requests that are sent one by one, and of those in a batch.
KINDS = {
    False: (PriceKind.INPUT, PriceKind.OUTPUT),
    True: (PriceKind.BATCH_INPUT, PriceKind.BATCH_OUTPUT),
}
_OVER = (JobState.CANCELLED, JobState.FAILED, JobState.DONE)


@dataclass(frozen=True, slots=True)
class Tariff:
    """At what the requests of a claim are charged: the prices when it was claimed, in US dollars per million tokens."""

    place: Place
    price_in: float | None = None
    price_out: float | None = None
    has_budget: bool = False

    def usd(self, usage: Usage) -> float | None:
        """The price of some tokens; None if it is unknown."""
        if self.price_in is None or self.price_out is None:
            return None
        return (usage.prompt_tokens * self.price_in + usage.response_tokens * self.price_out) / 1e6


@dataclass(frozen=True, slots=True)
class Bill:
    """What is to be settled for some results of a claim.

    held, held_usage: requests that are no longer in flight, and what was held for them.
    serial: counts the changes of a claim. A transaction that is repeated, because it was not known to have ended,
            changes nothing; 0 is not checked.
    """

    requests: int = 0
    repeats: int = 0
    uncounted: int = 0
    usage: Usage = NOTHING
    held: int = 0
    held_usage: Usage = NOTHING
    engine_seconds: float = 0.0
    serial: int = 0


@dataclass(slots=True)
class Amount:
    """What was spent by some of a run's claims, and what they hold for requests in flight."""

    requests: int = 0
    #: Of the requests: those counted by an upper estimate.
    repeats: int = 0
    uncounted: int = 0
    lost: int = 0
    tokens: int = 0
    usd: float = 0.0
    #: Claims with tokens of no known price.
    unpriced: int = 0
    engine_hours: float = 0.0
    held: int = 0
    held_tokens: int = 0
    held_usd: float = 0.0
    #: Of the held requests: those whose claim a worker has. The others are those of batches that wait for one.
    attended: int = 0

    def add(self, other: Amount) -> None:
        """Include another amount."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True, slots=True)
class Shortage:
    """A limit that does not allow the next request.

    scope: "the run", "teacher NAME" or "stage NAME".
    left:  in words, without what is in flight.
    is_passing: requests that workers wait for may turn out to cost less than is held for them.
    """

    scope: str
    key: str
    left: str
    is_passing: bool = False

    def __str__(self) -> str:
        return f"{BUDGET}: {self.key} of {self.scope} {self.left}"


Admitted: TypeAlias = tuple[int, Shortage | None]
"""How many requests a budget allows, and what it lacks for the next one."""

#: The first word of the error of a job, and of a run, that stopped for its budget.
BUDGET = "budget"


@dataclass(slots=True)
class _Room:
    """What a scope's limits still allow, while requests are admitted one by one."""

    scope: str
    limits: Limits
    spent: Amount
    is_late: bool
    #: What is sent at once.
    unit: str = "request"
    asked: Usage = field(default=NOTHING)
    asked_usd: float = 0.0

    def lacks(self, usage: Usage, usd: float) -> Shortage | None:
        """Why one more request is not allowed; None if it is."""
        limits, spent, is_passing = self.limits, self.spent, bool(self.spent.attended or self.asked.tokens)
        if self.is_late:
            return Shortage(self.scope, "deadline", f"was {limits.deadline:%Y-%m-%d %H:%M} UTC")
        if limits.engine_hours is not None and spent.engine_hours >= limits.engine_hours:
            hours = f"{spent.engine_hours:,.2f} of {limits.engine_hours:,g} are spent"
            return Shortage(self.scope, "engine_hours", f"are used up: {hours}")
        tokens = spent.tokens + spent.held_tokens + self.asked.tokens + usage.tokens
        if limits.tokens is not None and tokens > limits.tokens and usage.tokens:
            left = (
                f"{spent.tokens:,} of {limits.tokens:,} are spent, and the next {self.unit} may take {usage.tokens:,}"
            )
            return Shortage(self.scope, "tokens", f"are used up: {left}", is_passing)
        if limits.usd is not None and spent.usd + spent.held_usd + self.asked_usd + usd > limits.usd and usd:
            left = f"${spent.usd:,.4f} of ${limits.usd:,.4f} are spent, and the next {self.unit} may cost ${usd:,.4f}"
            return Shortage(self.scope, "usd", f"is used up: {left}", is_passing)
        return None

    def take(self, usage: Usage, usd: float) -> None:
        self.asked = self.asked.plus(usage)
        self.asked_usd += usd


def tariff(session: Session, claim: Claim, spec: ModelSpec) -> Tariff:
    """What the requests of a job that is being loaded are charged at."""
    kind, has_budget = ENGINES.get(spec.engine), session.get_one(Run, claim.run_id).config.get("budget") is not None
    if engines.batch_size(spec):
        place = Place.BATCH
    else:
        is_server = kind is not None and kind.reference(spec.options) == "server"
        place = Place.SERVER if is_server else Place.ENGINE
    if claim.teacher_id is None and not (kind and kind.is_nested):
        return Tariff(place, has_budget=has_budget)
    found = prices(session, claim.run_id, teacher_id=claim.teacher_id, scorer_id=claim.scorer_id)
    price_in, price_out = (found.get(each) for each in KINDS[place is Place.BATCH])
    return Tariff(place, price_in, price_out, has_budget)


def has_budget(session: Session, run_id: int) -> bool:
    """Whether a run has a budget now."""
    return session.scalars(select(Run.config["budget"]).where(Run.id == run_id)).one() is not None


def total(usages: Iterable[Usage]) -> Usage:
    """The sum of several usages."""
    return Usage(*(sum(column) for column in zip(NOTHING, *usages, strict=True)))


def prices(
    session: Session, run_id: int, *, teacher_id: int | None, scorer_id: int | None = None
) -> dict[PriceKind, float]:
    """The prices of a model that are valid now in a run: its own, whatever other runs name."""
    valid = select(Price.kind, Price.usd).where(
        Price.teacher_id == teacher_id if teacher_id is not None else Price.scorer_id == scorer_id,
        or_(Price.run_id == run_id, Price.run_id.is_(None)),
        Price.valid_from <= now(),
    )
    is_own = Price.run_id.is_not(None)
    return {row.kind: row.usd for row in session.execute(valid.order_by(is_own, Price.valid_from, Price.id))}


def settle(session: Session, claim: Claim, charged: Tariff, bill: Bill) -> None:
    """Count what was spent under a claim, and no longer hold what was held for it."""
    if replace(bill, serial=0) == Bill():
        return
    _add(
        session,
        claim,
        charged,
        requests=bill.requests,
        repeats=bill.repeats,
        uncounted=bill.uncounted,
        prompt_tokens=bill.usage.prompt_tokens,
        response_tokens=bill.usage.response_tokens,
        usd=charged.usd(bill.usage) if bill.usage.tokens else None,
        engine_seconds=bill.engine_seconds,
        serial=bill.serial,
        **_held(charged, -bill.held, NOTHING.plus(bill.held_usage, -1)),
    )


def settle_late(session: Session, claim: Claim, charged: Tariff, bill: Bill) -> None:
    """Count results that are not stored because the claim was lost, unless they were counted when it was taken away."""
    row = session.get(Expense, (claim.id, claim.fence))
    if not bill.held or (row is not None and row.held >= bill.held):
        settle(session, claim, charged, bill)


def admit(
    session: Session, claim: Claim, charged: Tariff, wanted: Sequence[Usage], *, serial: int = 0, is_look: bool = False
) -> Admitted:
    """Hold an upper estimate for the first requests of a list, as many as the budget allows.

    The requests of a batch are admitted together; those of one that was sent before, always. Call it in a transaction
    that holds the job's lease. If the budget was removed meanwhile, everything is held and nothing is lacking.

    serial:  as in a `Bill`.
    is_look: hold nothing.
    """
    if not wanted:
        return 0, None
    config = load_config(session.scalars(select(Run.config).where(Run.id == claim.run_id)).one())
    if session.get_bind().dialect.name == "postgresql" and not is_look:  # SQLite allows one writer at a time anyway
        session.execute(select(func.pg_advisory_xact_lock(_BUDGET_LOCK, claim.run_id)))
    is_sent = charged.place is Place.BATCH and _take_over(session, claim, is_look=is_look)
    count, lacking = len(wanted), None
    if not is_sent and config.budget is not None:
        is_batch = charged.place is Place.BATCH
        count, lacking = _allowed(session, claim, config, charged, [total(wanted)] if is_batch else wanted)
        count = count * len(wanted) if is_batch else count
    if count and not is_look:
        usage = total(wanted[:count])
        _add(session, claim, charged, serial=serial, **_held(charged, count, usage))
    return count, lacking


def close(session: Session, job_id: int, fence: int) -> None:
    """A claim is over: what is still in flight is lost, and spent if a server may charge it.

    A batch that was sent remains in flight: the next claim of the job collects it.
    """
    is_server, is_batch = Expense.place == Place.SERVER, Expense.place == Place.BATCH
    is_sent = select(Batch.key).where(Batch.job_id == job_id, Batch.collected_at.is_(None)).exists()
    session.execute(
        update(Expense)
        .where(Expense.job_id == job_id, Expense.fence == fence, Expense.held > 0, ~(is_batch & is_sent))
        .values(
            lost=Expense.lost + case((is_batch, 0), else_=Expense.held),
            prompt_tokens=Expense.prompt_tokens + case((is_server, Expense.held_prompt_tokens), else_=0),
            response_tokens=Expense.response_tokens + case((is_server, Expense.held_response_tokens), else_=0),
            usd=case(
                (and_(is_server, Expense.held_usd > 0), func.coalesce(Expense.usd, 0.0) + Expense.held_usd),
                else_=Expense.usd,
            ),
            **_NONE_HELD,
        )
        .execution_options(synchronize_session=False)
    )


def amounts(session: Session, run_id: int) -> dict[tuple[str, int | None, int | None], Amount]:
    """What was spent and is held by stage, teacher and scorer."""
    tokens = Expense.prompt_tokens + Expense.response_tokens
    held_tokens = Expense.held_prompt_tokens + Expense.held_response_tokens
    counts = Expense.requests, Expense.repeats, Expense.uncounted, Expense.lost, tokens
    is_unpriced = case((and_(Expense.usd.is_(None), tokens > 0), 1), else_=0)
    is_attended = select(Job.id).where(
        Job.id == Expense.job_id, Job.fence == Expense.fence, Job.state == JobState.RUNNING
    )
    attended = case((and_(Expense.held > 0, is_attended.exists()), Expense.held), else_=0)
    rest = Expense.engine_seconds, Expense.held, held_tokens, Expense.held_usd, attended
    sums = [func.sum(each) for each in (*counts, func.coalesce(Expense.usd, 0.0), is_unpriced, *rest)]
    group = Expense.stage, Expense.teacher_id, Expense.scorer_id
    found = {}
    for stage, teacher_id, scorer_id, *row in session.execute(
        select(*group, *sums).where(Expense.run_id == run_id).group_by(*group)
    ):
        requests, repeats, uncounted, lost, spent, usd, unpriced, seconds, *in_flight = row
        held, held_spent, held_usd, attended = in_flight
        found[stage, teacher_id, scorer_id] = Amount(
            requests=int(requests),
            repeats=int(repeats),
            uncounted=int(uncounted),
            lost=int(lost),
            tokens=int(spent),
            usd=float(usd),
            unpriced=int(unpriced),
            engine_hours=float(seconds) / 3600,
            held=int(held),
            held_tokens=int(held_spent),
            held_usd=float(held_usd),
            attended=int(attended),
        )
    return found


def scopes(
    budget: BudgetTable, spent: Mapping[tuple[str, int | None, int | None], Amount], names: Mapping[int, str]
) -> Iterator[tuple[str, Limits, Amount]]:
    """The parts of a run that have limits, as (words, limits, what they have spent).

    names: of the run's teachers, by id.
    """
    yield "the run", budget, _total(spent.values())
    for stage, limits in budget.stages.items():
        yield f"stage {stage}", limits, _total(amount for (of, _, _), amount in spent.items() if of == stage)
    for teacher, limits in budget.teachers.items():
        mine = (amount for (_, of, _), amount in spent.items() if of is not None and names.get(of) == teacher)
        yield f"teacher {teacher}", limits, _total(mine)


def teacher_names(session: Session, run_id: int, config: RunConfig) -> dict[int, str]:
    """The names of a run's teachers in its configuration, by id."""
    positions = session.execute(select(RunTeacher.teacher_id, RunTeacher.position).where(RunTeacher.run_id == run_id))
    return {teacher_id: config.teachers[position].name for teacher_id, position in positions}


def _allowed(session: Session, claim: Claim, config: RunConfig, charged: Tariff, wanted: Sequence[Usage]) -> Admitted:
    assert config.budget is not None
    names = teacher_names(session, claim.run_id, config)
    mine = {"the run", f"stage {claim.stage}", f"teacher {names.get(claim.teacher_id or 0)}"}
    unit = "batch" if charged.place is Place.BATCH else "request"
    at: datetime = session.scalars(select(now())).one()
    rooms = [
        _Room(scope, limits, spent, limits.deadline is not None and at >= limits.deadline, unit)
        for scope, limits, spent in scopes(config.budget, amounts(session, claim.run_id), names)
        if scope in mine
    ]
    for count, usage in enumerate(wanted):
        usd = charged.usd(usage) or 0.0
        if lacking := next(filter(None, (room.lacks(usage, usd) for room in rooms)), None):
            return count, lacking
        for room in rooms:
            room.take(usage, usd)
    return len(wanted), None


def _take_over(session: Session, claim: Claim, *, is_look: bool) -> bool:
    """Whether a job's batch was sent under an earlier claim; what was held for it is no longer held there.

    The batch may be that of another job of the same part of the run, as in `persyn.db.batches.take`.
    """
    job = session.get_one(Job, claim.id)
    same = (Job.run_id == job.run_id, Job.stage == job.stage, Job.teacher_id == job.teacher_id)
    overlaps = Job.first_prompt_id <= job.last_prompt_id, Job.last_prompt_id >= job.first_prompt_id
    jobs = select(Job.id).where(or_(Job.id == job.id, and_(*same, *overlaps, Job.state.in_(_OVER))))
    earlier = Expense.job_id.in_(jobs), or_(Expense.job_id != job.id, Expense.fence < claim.fence)
    if not is_look:
        session.execute(
            update(Expense)
            .where(*earlier, Expense.held > 0)
            .values(**_NONE_HELD)
            .execution_options(synchronize_session=False)
        )
    is_open = select(Batch.key).where(Batch.job_id.in_(jobs), Batch.collected_at.is_(None))
    return session.scalars(is_open.limit(1)).first() is not None


_NONE_HELD: dict[str, Any] = {"held": 0, "held_prompt_tokens": 0, "held_response_tokens": 0, "held_usd": 0.0}


def _held(charged: Tariff, count: int, usage: Usage) -> dict[str, Any]:
    tokens = {"held_prompt_tokens": usage.prompt_tokens, "held_response_tokens": usage.response_tokens}
    return {"held": count, **tokens, "held_usd": charged.usd(usage) or 0.0}


def _total(parts: Any) -> Amount:
    total = Amount()
    for part in parts:
        total.add(part)
    return total


#: The columns of a claim that amounts are added to.
_ADDED = (
    *("requests", "repeats", "uncounted", "prompt_tokens", "response_tokens", "engine_seconds"),
    *("held", "held_prompt_tokens", "held_response_tokens", "held_usd"),
)


def _add(session: Session, claim: Claim, charged: Tariff, **amounts: Any) -> None:
    """Add to the row of a claim, which is created if it does not exist."""
    of = {"run_id": claim.run_id, "stage": claim.stage, "teacher_id": claim.teacher_id, "scorer_id": claim.scorer_id}
    row = {"job_id": claim.id, "fence": claim.fence, "place": charged.place, **of, "usd": None, "lost": 0}
    row |= dict.fromkeys((*_ADDED, "serial"), 0) | amounts
    session.connection().execute(_adding(session.get_bind().dialect.name), row)


@cache  # building the statement takes longer than executing it
def _adding(dialect: str) -> Any:
    statement = (sqlite if dialect == "sqlite" else postgresql).insert(Expense)
    usd = statement.excluded.usd
    added: dict[str, Any] = {name: getattr(Expense, name) + statement.excluded[name] for name in _ADDED}
    added["usd"] = case((usd.is_not(None), func.coalesce(Expense.usd, 0.0) + usd), else_=Expense.usd)
    serial = statement.excluded.serial
    added["serial"] = case((serial > Expense.serial, serial), else_=Expense.serial)
    is_new = or_(serial == 0, serial > Expense.serial)
    return statement.on_conflict_do_update(index_elements=["job_id", "fence"], set_=added, where=is_new)
