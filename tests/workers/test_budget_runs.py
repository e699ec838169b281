"""A run stops before it would exceed its budget, goes on when it is raised, and says how far off its plan was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import func, select

from persyn.analysis import spending
from persyn.cli.main import persyn
from persyn.cli.run import EXIT_OUT_OF_BUDGET
from persyn.config import load_config
from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.results import Response
from persyn.db.spending import Expense, Price
from persyn.db.work import Event, Job
from persyn.jobs import expenses
from persyn.runs import pipeline, run_file
from persyn.settings import Settings
from persyn.workers.runner.worker import Worker
from tests.run_files import TEACHERS, write_run

#: Words, which are the fake engine's tokens: 5 of a prompt, 12 of a response.
TOKENS = 5 + 12


@pytest.fixture
def store(tmp_path: Path, migrated: Path) -> Database:
    shutil.copy(migrated, tmp_path / "persyn.db")
    return Database(f"sqlite:///{tmp_path / 'persyn.db'}")


def work(store: Database, folder: Path, budget: str, *, price_in: float = 1.0, **run: Any) -> int:
    """Start a run with this budget, or start it again, and work it until it has stopped."""
    file = write_run(folder, **run)
    more = f"price_in = {price_in}\nprice_out = 10.0\nsampling = {{ max_tokens = 20 }}\noptions = {{"
    file.write_text(file.read_text().replace("options = {", more) + budget)
    with store.write() as session:
        run_id = pipeline.start_run(session, run_file.read(file), actor="me").id
    spending.record(store, run_id, is_start=True)
    Worker(store, Settings.from_environment({"PERSYN_HOME": str(folder / "home")}), run_id=run_id).run()
    return run_id


def test_a_run_stops_below_its_budget_and_goes_on_when_it_is_raised(
    store: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = work(store, tmp_path, "[budget]\ntokens = 900\n")
    with store.read() as session:
        run = session.get_one(Run, run_id)
        found = spending.facts(session, run)
        assert (run.state, run.stage) == (RunState.PAUSED, "generate")
        assert str(run.error).startswith("budget: tokens of the run are used up: ")
        (standing,) = found.budget
        assert (standing.limit, standing.held) == (900, 0)
        assert 900 - 2 * 145 < standing.spent <= 900  # no request takes more than 145 tokens by its estimate
        needed = (len(TEACHERS) * 12 + 48) * TOKENS
        assert found.rest is not None
        assert found.rest.tokens == pytest.approx(needed - standing.spent, rel=0.05)
    monkeypatch.setenv("PERSYN_DATABASE_URL", f"sqlite:///{tmp_path / 'persyn.db'}")
    said = CliRunner().invoke(persyn, ["run", "watch", "test"])
    assert said.exit_code == EXIT_OUT_OF_BUDGET
    assert "raise [budget] in the run's file" in said.output

    assert work(store, tmp_path, "[budget]\ntokens = 5000\n", price_in=2.0) == run_id
    with store.read() as session:
        run = session.get_one(Run, run_id)
        assert (run.state, run.error) == (RunState.DONE, None)
        counted = select(func.sum(Expense.requests)).where(Expense.teacher_id.is_not(None))
        assert session.scalars(counted).one() == session.scalars(select(func.count(Response.id))).one()
        changes = [detail["changed"] for detail in session.scalars(select(Event.detail)) if "changed" in detail]
        assert changes == [[{"key": "budget.tokens", "was": 900, "now": 5000}]]
        # What was spent before the price changed keeps the old one.
        found = spending.facts(session, run)
        assert found.spent.tokens == needed
        before, after = (each[0] for each in _usd_by_price(session, run_id))
        assert found.spent.usd == pytest.approx(before + after)
        assert sorted(session.scalars(select(Price.usd).distinct())) == [1.0, 2.0, 10.0]
        generated = [model for model in found.models if model.stage == "generate"]
        assert all(abs(model.off["tokens"]) < 0.1 for model in generated)
    assert "off" in CliRunner().invoke(persyn, ["run", "status", "test"]).output

    again = work(store, tmp_path, "[budget]\ntokens = 1\n", name="again")
    with store.read() as session:
        assert session.get_one(Run, again).state is RunState.DONE  # all responses are reused
        assert not session.scalars(
            select(Expense.requests).join(Job).where(Job.run_id == again, Job.teacher_id > 0)
        ).all()


def _usd_by_price(session: Any, run_id: int) -> list[tuple[float]]:
    """What responses cost before and after the first price, by hand: $1 or $2 in, $10 out per million."""
    rows = session.execute(select(Expense.prompt_tokens, Expense.response_tokens, Expense.usd)).all()
    old = [(p + 10 * r) / 1e6 for p, r, usd in rows if usd is not None and usd == pytest.approx((p + 10 * r) / 1e6)]
    new = [(2 * p + 10 * r) / 1e6 for p, r, usd in rows if usd and usd == pytest.approx((2 * p + 10 * r) / 1e6)]
    assert old
    assert new
    return [(sum(old),), (sum(new),)]


def test_failed_requests_count_and_a_teacher_without_budget_leaves_the_others_at_work(
    store: Database, tmp_path: Path
) -> None:
    run_id = work(
        store,
        tmp_path,
        "[budget.teachers.ada]\ntokens = 1\n",
        options={"fail_every": 5},
        prompts=16,
        calibration=8,
    )
    with store.read() as session:
        run = session.get_one(Run, run_id)
        assert (run.state, run.stage) == (RunState.PAUSED, "calibrate")
        assert "tokens of teacher ada" in str(run.error)
        spent = expenses.amounts(session, run_id)
        names = expenses.teacher_names(session, run_id, load_config(run.config))
        requests = {names[key[1]]: amount.requests for key, amount in spent.items() if key[1] is not None}
        assert {name: requests.get(name, 0) for name in TEACHERS} == {"ada": 0, "bob": 8, "cyd": 8}
