"""The view of `persyn run watch` on a run worked by others."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from sqlalchemy import make_url, text, update

from persyn.cli.progress import Meter
from persyn.cli.watch import View
from persyn.db.catalog import Run, RunState, Teacher
from persyn.db.connect import Database
from persyn.db.time import now
from persyn.db.work import JobState
from tests.cli.conftest import Persyn
from tests.cluster import wait_for
from tests.factories import make_assignment, make_job, make_response, make_run
from tests.postgres import Postgres

_LONG = "meta-llama/Llama-3.3-70B-Instruct-with-a-name-of-very-many-words:" + "x" * 30


@contextmanager
def following(database: Database, run_id: int, console: Console) -> Iterator[Callable[[], RunState | None]]:
    """A running view; yields a function that waits for its end and returns the run's final state."""
    view = View(database, run_id, Meter(console, line_seconds=0.0), interval=0.05)
    closed, ends = threading.Event(), []
    thread = threading.Thread(target=lambda: ends.append(view.follow(closed)))
    thread.start()

    def ended() -> RunState | None:
        thread.join(20)
        return ends[0] and ends[0].state

    yield ended
    closed.set()
    thread.join(20)


@contextmanager
def opened(folder: Path) -> Iterator[Database]:
    """The store used by the `persyn` command."""
    database = Database(f"sqlite:///{folder / 'home' / 'persyn.db'}")
    database.require_head()
    yield database
    database.close()


def set_state(database: Database, run_id: int, state: RunState) -> None:
    with database.write() as session:
        session.execute(update(Run).where(Run.id == run_id).values(state=state))


def test_everything_fits_eighty_columns_however_long_the_names(database: Database) -> None:
    with database.write() as session:
        made = make_run(session, name="n" * 100, teachers=(_LONG, "bob"), prompts=20, stage="generate")
        session.execute(update(Teacher).where(Teacher.name == "bob").values(name="\x1b[2J[bold]bob"))
        job = {"state": "running", "lease_until": now(), "stage": "generate"}
        for number, teacher_id in enumerate(made.teacher_ids):
            job_id = make_job(session, made.id, owner=f"{'h' * 70}.1/{number}/9/ab", teacher_id=teacher_id, **job)
            make_response(session, made.prompt_ids[number], teacher_id, job_id=job_id)
            make_assignment(session, made.id, made.prompt_ids[number], teacher_id)
        make_assignment(session, made.id, made.prompt_ids[2], made.teacher_ids[0])
        make_response(session, made.prompt_ids[2], made.teacher_ids[0], None, failure="\x1b[31mtoo_long: 9,213 tokens")
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None, legacy_windows=False)
    with following(database, made.id, console) as ended:
        wait_for(lambda: "failed in" in screen.getvalue(), 10, "the tables are shown")
        set_state(database, made.id, RunState.DONE)
        assert ended() is RunState.DONE
    frame = screen.getvalue().rpartition("started")[2]
    lines = [line.rpartition("\x1b[2K")[2] for line in frame.splitlines()]
    assert all(len(line) <= 80 for line in lines), lines
    assert any(line.startswith("generate ") and "3/3" in line and "1 failed" in line for line in lines)
    assert "…" not in frame  # a long name is folded
    assert any("expired" in line for line in lines)
    assert any("\\x1b[2J[bold]bob" in line for line in lines)
    assert "\x1b[2J" not in screen.getvalue()
    assert "\x1b[31m" not in screen.getvalue()


def test_without_a_terminal_there_is_a_line_for_each_change_and_no_control_code(database: Database) -> None:
    with database.write() as session:
        made = make_run(session, prompts=2, stage="generate")
        for prompt_id in made.prompt_ids:
            make_assignment(session, made.id, prompt_id, made.teacher_ids[0])
        make_response(session, made.prompt_ids[0], made.teacher_ids[0], None, failure="refused")
    out = io.StringIO()
    with following(database, made.id, Console(file=out, width=80)) as ended:
        wait_for(lambda: "generate: 1 of 2" in out.getvalue(), 10, "the first row")
        with database.write() as session:
            make_response(session, made.prompt_ids[1], made.teacher_ids[0])
        wait_for(lambda: "generate: 2 of 2" in out.getvalue(), 10, "the second row")
        set_state(database, made.id, RunState.FAILED)
        assert ended() is RunState.FAILED
    lines = out.getvalue().splitlines()
    assert "generate: 1 of 2, 1 failed, 0 workers" in lines
    assert lines[-1] == "generate: 1 failed: refused"
    assert len(lines) == len(set(lines))
    assert out.getvalue().replace("\n", "").isprintable()


def test_the_last_count_is_of_the_end(postgres: Postgres) -> None:
    """A count in progress when the run ends may have started before its last row."""
    database = Database(postgres.create("ending", template="migrated"))
    with database.write() as session:
        made = make_run(session, prompts=2, stage="generate")
        for prompt_id in made.prompt_ids:
            make_assignment(session, made.id, prompt_id, made.teacher_ids[0])
    out = io.StringIO()
    with following(database, made.id, Console(file=out, width=80)) as ended:
        wait_for(lambda: "generate: 0 of 2" in out.getvalue(), 10, "the first count")
        with database.write() as session:
            session.execute(text("LOCK TABLE assignments IN ACCESS EXCLUSIVE MODE"))
            waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
            wait_for(lambda: session.scalars(waiting).one(), 10, "a count that cannot go on")
            with database.write() as other:
                for prompt_id in made.prompt_ids:
                    make_response(other, prompt_id, made.teacher_ids[0])
            set_state(database, made.id, RunState.DONE)
            time.sleep(1)
        assert ended() is RunState.DONE
    assert out.getvalue().splitlines()[-1].startswith("generate: 2 of 2")
    database.close()


def test_a_database_that_goes_away_is_waited_for(postgres: Postgres) -> None:
    url = postgres.create("watched", template="migrated")
    database = Database(url)
    with database.write() as session:
        made = make_run(session, stage="generate")
    out = io.StringIO()
    with following(database, made.id, Console(file=out, width=80)) as ended:
        wait_for(lambda: "fit_router" in out.getvalue(), 10, "the first look")
        name = make_url(url).database
        postgres.administer(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        postgres.cut()
        wait_for(lambda: "does not answer" in out.getvalue(), 10, "the outage is told of")
        postgres.administer(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        wait_for(lambda: "answers again" in out.getvalue(), 10, "its end is told of")
        set_state(database, made.id, RunState.DONE)
        assert ended() is RunState.DONE
    assert out.getvalue().count("does not answer") == 1
    database.close()


def test_a_run_that_is_over_is_told_of_at_once_and_decides_the_exit_code(persyn: Persyn, tmp_path: Path) -> None:
    with opened(tmp_path) as database, database.write() as session:
        for state in (RunState.DONE, RunState.FAILED, RunState.CANCELLED):
            made = make_run(session, name=state, stage="generate")
            session.execute(update(Run).where(Run.id == made.id).values(state=state, error="stage x"))
    done = persyn("run", "watch", "done")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "run done is done; 'persyn run status done' shows its results"
    failed = persyn("run", "watch", "failed")
    assert failed.returncode == 1
    assert failed.stderr == (
        "error: run failed failed in stage x; correct the cause, then: persyn run resume failed; "
        "or start a changed run file under another name\n"
    )
    cancelled = persyn("run", "watch", "cancelled")
    assert cancelled.returncode == 1
    assert cancelled.stderr == "error: run cancelled was cancelled; continue with: persyn run resume cancelled\n"


def test_ctrl_c_closes_the_view_of_a_database_that_is_away(postgres: Postgres) -> None:
    url = postgres.create("away", template="migrated")
    database = Database(url)
    with database.write() as session:
        make_run(session)
    database.close()
    with subprocess.Popen(
        [sys.executable, "-m", "persyn.cli", "run", "watch", "run", "--interval", "0.1"],
        env={**os.environ, "PERSYN_DATABASE_URL": url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("calibrate: 0 of 0")
        postgres.administer(f"ALTER DATABASE {make_url(url).database} ALLOW_CONNECTIONS false")
        postgres.cut()
        assert "does not answer" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said.startswith("the run continues without this window")


def watching(tmp_path: Path) -> subprocess.Popen[str]:
    """`persyn run watch run` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "persyn.cli", "run", "watch", "run", "--interval", "0.1"],
        env={**os.environ, "PERSYN_HOME": str(tmp_path / "home")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_closes_the_view_and_leaves_the_run_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as database:
        with database.write() as session:
            made = make_run(session)
        with watching(tmp_path) as process:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("calibrate: 0 of 0")
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)
        assert process.returncode == 130
        assert said.strip() == "the run continues without this window. Watch it again with: persyn run watch run"
        with database.read() as session:
            assert session.get_one(Run, made.id).state is RunState.RUNNING


def test_a_run_that_nobody_works_is_said_to_be_stopped(tmp_path: Path) -> None:
    with opened(tmp_path) as database:
        with database.write() as session:
            make_job(session, make_run(session).id, stage="calibrate", state=JobState.QUEUED)
        with watching(tmp_path) as process:
            assert process.stdout is not None
            until = (line for line in process.stdout if "no worker holds a job of the run" in line)
            assert "continue it here: persyn run resume run" in next(until)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said.strip() == "no worker holds a job of the run; start workers, or continue it here: persyn run resume run"
