"""`persyn plan` on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from persyn.analysis import plan as planning
from persyn.db.connect import Database
from persyn.db.spending import Place
from persyn.jobs import expenses, queue
from persyn.jobs.expenses import Bill, Tariff
from persyn.llm.rates import Usage
from persyn.runs import pipeline, run_file
from tests.cli.conftest import Persyn
from tests.cli.test_commands import require_refused
from tests.run_files import TEACHERS, write_run


def renamed(file: Path, name: str, strategy: str) -> str:
    text = file.read_text().replace('name = "test"', f'name = "{name}"').replace('"persyn"', f'"{strategy}"')
    other = file.with_name(f"{name}.toml")
    other.write_text(text)
    return str(other)


def responses(persyn: Persyn) -> int:
    rows = json.loads(persyn("sql", "select count(*) as n from responses", "--json").stdout)
    return int(rows[0]["n"])


def test_without_a_store_it_plans_and_makes_none(persyn: Persyn, tmp_path: Path) -> None:
    file = str(write_run(tmp_path))
    done = persyn("plan", file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("run test: not started\n60 prompts, 12 of them for all teachers; strategy persyn\n")
    (row,) = [line.split() for line in done.stdout.splitlines() if line.startswith("calibrate  ada")]
    assert row[2:5] == ["12", "0", "12"]
    assert "upper bounds" in done.stdout
    assert "estimated at 4 characters per token" in done.stdout
    assert "at an even split" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "run.toml"]


def test_figures_can_be_read_at_a_glance(persyn: Persyn, tmp_path: Path) -> None:
    file = write_run(tmp_path, prompts=20_000, calibration=1_000)
    done = persyn("plan", str(file))
    assert done.returncode == 0, done.stderr
    assert "20,000 prompts, 1,000 of them for all teachers" in done.stdout
    (row,) = [line.split() for line in done.stdout.splitlines() if line.startswith("calibrate  ada")]
    assert row[2:5] == ["1,000", "0", "1,000"]
    # Prices and speed are unknown: a line says so, instead of a column of dashes.
    assert "US dollars" not in done.stdout
    assert "cost unknown: every teacher needs price_in and price_out" in done.stdout
    assert "engine hours unknown" in done.stdout


def test_whoever_ends_it_half_way_finds_nothing_of_it(tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    plan = [sys.executable, "-m", "persyn.cli", "plan", str(write_run(tmp_path, prompts=100_000))]
    places = {"PERSYN_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary")}
    with subprocess.Popen(plan, env={**os.environ, **places}, stderr=subprocess.DEVNULL) as process:
        while not any((tmp_path / "temporary").iterdir()):
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
    assert process.returncode == 143
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_finished_run_has_nothing_left_and_its_store_stays_as_it_was(persyn: Persyn, tmp_path: Path) -> None:
    file = write_run(tmp_path)
    assert persyn("run", "start", str(file)).returncode == 0
    store = tmp_path / "home" / "persyn.db"
    before = store.read_bytes()

    done = persyn("plan", str(file))
    assert "run test: done; 'persyn run status test' shows its progress" in done.stdout
    assert "no prompts are left to generate" in done.stdout
    found = json.loads(persyn("plan", str(file), "--json").stdout)
    assert (found["state"], found["undecided"], found["most"]["responses"]) == ("done", 0, 0)

    again = json.loads(persyn("plan", renamed(file, "again", "persyn"), "--json").stdout)
    grid = [share for share in again["shares"] if share["stage"] == "calibrate"]
    assert [(s["teacher"], s["prompts"], s["stored"]) for s in grid] == [(name, 12, 12) for name in TEACHERS]
    assert [(s["scores_stored"], s["scores_to_make"]) for s in grid] == [(24, 0)] * 3
    assert store.read_bytes() == before


def test_what_was_planned_is_what_is_asked(persyn: Persyn, tmp_path: Path) -> None:
    file = write_run(tmp_path)
    assert persyn("run", "start", str(file)).returncode == 0
    before = responses(persyn)
    second = renamed(file, "second", "mix")
    found = json.loads(persyn("plan", second, "--json").stdout)
    assert 0 < found["least"]["responses"] == found["most"]["responses"] < 60
    assert found["least"]["response_tokens"] == 12 * found["least"]["responses"]  # a fake response has twelve words
    assert found["least"]["engine_hours"] > 0

    assert persyn("run", "start", second).returncode == 0
    assert responses(persyn) - before == found["least"]["responses"]


def test_json_has_all_of_it(persyn: Persyn, tmp_path: Path) -> None:
    found = json.loads(persyn("plan", str(write_run(tmp_path)), "--json").stdout)
    assert set(found) == {
        *("name", "state", "strategy", "prompts", "calibration", "undecided", "teachers", "shares"),
        *("least", "most", "even", "generate_all"),
    }
    assert {share["stage"] for share in found["shares"]} == {"calibrate", "undecided", "all"}
    assert set(found["even"]) == {"responses", "prompt_tokens", "response_tokens", "cost", "engine_hours", "gpu_hours"}
    assert {basis["response_tokens_from"] for basis in found["teachers"]} == {"max_tokens"}


def test_what_a_start_would_refuse_is_refused(persyn: Persyn, tmp_path: Path) -> None:
    require_refused(persyn("plan", "none.toml"), "none.toml", "persyn init")
    file = write_run(tmp_path, calibraton=3)
    require_refused(persyn("plan", str(file)), "calibraton", "did you mean 'calibration'")
    file = write_run(tmp_path, calibration=61)
    require_refused(persyn("plan", str(file)), "61 calibration prompts cannot be drawn from 60 prompts")
    file = write_run(tmp_path)
    with (tmp_path / "prompts.jsonl").open("a") as rows:
        rows.write('{"prompt": ""}\n')
    require_refused(persyn("plan", str(file)), "prompts.jsonl:61: empty prompt")
    assert not (tmp_path / "home").exists()


def test_a_name_that_another_run_has_is_refused(persyn: Persyn, tmp_path: Path) -> None:
    assert persyn("run", "start", str(write_run(tmp_path))).returncode == 0
    require_refused(persyn("plan", str(write_run(tmp_path, alpha=0.5))), "another configuration (changed: run.alpha)")


def test_an_older_store_is_left_as_it_is_and_named(persyn: Persyn, database_url: str, tmp_path: Path) -> None:
    store = Database(database_url)
    with store.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0001'")
    refused = persyn("plan", str(write_run(tmp_path)), PERSYN_DATABASE_URL=database_url)
    require_refused(refused, "at revision 0001", "run 'persyn db upgrade'")
    assert store.revision() == "0001"
    store.close()


def test_an_empty_database_is_no_store_and_stays_empty(
    persyn: Persyn, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("postgres").create("nothing")
    done = persyn("plan", str(write_run(tmp_path)), PERSYN_DATABASE_URL=url)
    assert done.returncode == 0, done.stderr
    store = Database(url)
    assert not store.is_there()
    store.close()


def test_what_an_existing_run_has_spent_is_no_longer_left_of_its_budget(
    persyn: Persyn, database: Database, database_url: str, tmp_path: Path
) -> None:
    file = write_run(tmp_path, prompts=12, calibration=12, options={})
    with database.write() as session:
        run = pipeline.start_run(session, run_file.read(file), actor="me")
        session.flush()
        found = planning.of_run(session, run).most
    tokens = found.prompt_tokens + found.response_tokens
    file.write_text(f"{file.read_text()}[budget]\ntokens = {int(tokens) + 500}\n")
    assert "the run would stop" not in persyn("plan", str(file), PERSYN_DATABASE_URL=database_url).stdout
    with database.write() as session:
        claim = queue.claim(session, owner="me")
        assert claim is not None
        expenses.settle(session, claim, Tariff(Place.ENGINE), Bill(1, usage=Usage(400, 600)))
    said = persyn("plan", str(file), PERSYN_DATABASE_URL=database_url).stdout
    allowed = f"[budget] tokens = {int(tokens) + 500:,} allows after 1,000"
    assert f"the plan is more than what {allowed}: the run would stop there" in said
