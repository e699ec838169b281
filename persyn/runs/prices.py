"""Dated prices of runs: those of a run file are valid from when they are read; earlier expenses keep earlier ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from sqlalchemy import update
from sqlalchemy.orm import Session

from persyn.config import IMPORTED, QualityTable, RunConfig, TeacherTable
from persyn.db import lookup
from persyn.db.catalog import Run
from persyn.db.spending import Expense, Place, Price, PriceKind
from persyn.db.time import now
from persyn.ingest import versions
from persyn.jobs import expenses
from persyn.llm import engines, litellm_prices
from persyn.llm.engines import ENGINES
from persyn.llm.protocols import ModelSpec


class Rates(NamedTuple):
    """What a model of a run costs, in US dollars per million tokens of prompts and of responses."""

    price_in: float | None
    price_out: float | None
    source: str
    is_batch: bool = False

    @property
    def by_kind(self) -> dict[PriceKind, float]:
        """The known prices."""
        kinds = expenses.KINDS[self.is_batch]
        known = zip(kinds, (self.price_in, self.price_out), strict=True)
        return {kind: price for kind, price in known if price is not None}


def unpriced(config: RunConfig) -> list[str]:
    """The models behind servers of which a price is not known, as messages name them."""
    found = [
        (f"teacher {table.name}", of_teacher(table))
        for table in config.teachers
        if table.engine != IMPORTED and ENGINES[table.engine].reference(table.options) == "server"
    ]
    found += [
        ("the judge (in its options)", of_judge(scorer))
        for scorer in config.scorers
        if ENGINES[scorer.kind].is_nested and ENGINES[scorer.kind].reference(scorer.options) == "server"
    ]
    return [whose for whose, rates in found if None in (rates.price_in, rates.price_out)]


def of_teacher(table: TeacherTable) -> Rates:
    """The prices of a teacher in a run, whose mode may be cheaper."""
    is_batch = bool(engines.batch_size(ModelSpec(table.engine, table.model, options=table.options)))
    is_said = None not in (table.price_in, table.price_out)
    found = versions.prices(table)
    return Rates(found["price_in"], found["price_out"], _source(table.engine, is_said=is_said), is_batch)


def of_judge(table: QualityTable) -> Rates:
    """The prices of the model that judges."""
    engine, said = table.options["engine"], (table.options.get("price_in"), table.options.get("price_out"))
    listed = ENGINES[engine].prices(table.model.strip()) if engine in ENGINES else (None, None)
    prices = [each if each is not None else other for each, other in zip(said, listed, strict=True)]
    return Rates(prices[0], prices[1], _source(engine, is_said=None not in said))


def note(session: Session, run: Run, config: RunConfig, teacher_ids: list[int]) -> None:
    """Store the prices of a configuration that differ from the latest ones, valid from now on.

    The first prices of a model in a run also apply to what it has spent there without them.
    """
    for teacher_id, table in zip(teacher_ids, config.teachers, strict=True):
        _note(session, run, of_teacher(table), teacher_id=teacher_id)
    for given, scorer in zip(config.scorers, lookup.quality_scorers(session, run), strict=True):
        if ENGINES[given.kind].is_nested:
            _note(session, run, of_judge(given), scorer_id=scorer.id)


def _source(engine: str, *, is_said: bool) -> str:
    return "run file" if is_said or ENGINES[engine].prices is not litellm_prices.of else "table of litellm"


def _note(
    session: Session, run: Run, rates: Rates, *, teacher_id: int | None = None, scorer_id: int | None = None
) -> None:
    model = {"teacher_id": teacher_id, "scorer_id": scorer_id}
    known = expenses.prices(session, run.id, **model)
    source = f"{rates.source} of {run.name}" if rates.source == "run file" else rates.source
    for kind, usd in rates.by_kind.items():
        if known.get(kind) != usd:
            session.add(Price(**model, run_id=run.id, kind=kind, usd=usd, valid_from=now(), source=source))
    session.flush()
    pair = expenses.KINDS[rates.is_batch]
    valid = known | rates.by_kind
    if not set(pair) <= known.keys() and set(pair) <= valid.keys():
        mine = Expense.teacher_id == teacher_id if teacher_id is not None else Expense.scorer_id == scorer_id
        price_in, price_out = (valid[kind] for kind in pair)
        _price_earlier(session, (Expense.run_id == run.id, mine), price_in, price_out, is_batch=rates.is_batch)


def _price_earlier(session: Session, of: Iterable[Any], price_in: float, price_out: float, *, is_batch: bool) -> None:
    """Price what was spent before both prices of a model were known."""
    tokens = Expense.prompt_tokens * price_in + Expense.response_tokens * price_out
    is_same = (Expense.place == Place.BATCH) if is_batch else (Expense.place != Place.BATCH)
    session.execute(
        update(Expense)
        .where(*of, is_same, Expense.usd.is_(None), Expense.prompt_tokens + Expense.response_tokens > 0)
        .values(usd=tokens / 1e6)
        .execution_options(synchronize_session=False)
    )
