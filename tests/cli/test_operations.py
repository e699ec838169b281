"""The commands that change a run as a whole, and the one that copies a store."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import persyn as package
from persyn.cli.main import persyn
from persyn.db.connect import Database
from persyn.errors import UsageError
from persyn.runs import pipeline, run_file
from tests.run_files import write_run

Typed = Callable[..., Result]


@pytest.fixture
def typed(home: Path, tmp_path: Path) -> Typed:
    """Types a command in a home with the run `test`."""
    store = Database(f"sqlite:///{home / 'persyn.db'}")
    store.require_head()
    with store.write() as session:
        pipeline.start_run(session, run_file.read(write_run(tmp_path)), actor="me")
    store.close()

    def run(*arguments: str, says: str | None = None) -> Result:
        return CliRunner().invoke(persyn, arguments, input=says)

    return run


def test_a_run_is_prioritised_renamed_and_deleted(typed: Typed, home: Path) -> None:
    assert "priority" not in typed("run", "list").output
    assert typed("run", "priority", "test", "-5").output == "run test has priority -5\n"
    assert typed("run", "priority", "test", "1001").exit_code == 2
    assert "priority" in typed("run", "list").output
    assert json.loads(typed("run", "list", "--json").output)[0]["priority"] == -5
    assert "60 prompts, priority -5" in typed("run", "status", "test").output

    (home / "datasets" / "test").mkdir(parents=True)
    said = typed("run", "rename", "test", "maths").output
    assert said.startswith('run test is now maths; in its run file, write: name = "maths"\n')
    assert f"its dataset is now in {home / 'datasets' / 'maths'}" in said

    refused = typed("run", "delete", "maths", says="n\n")
    assert "delete run maths (running, 60 prompts)?" in refused.output
    assert str(refused.exception) == "nothing was deleted"
    said = typed("run", "delete", "maths", "--yes").output
    assert "run maths is deleted: 60 run prompts, " in said
    assert f"kept: {home / 'datasets' / 'maths'}" in said
    assert json.loads(typed("run", "list", "--json").output) == []
    assert isinstance(typed("run", "delete", "maths", "--yes").exception, UsageError)


def test_a_store_is_copied(typed: Typed, home: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy.db"
    said = typed("store", "copy", str(home / "persyn.db"), str(target))
    assert said.exit_code == 0, said.output
    assert "rows are in both stores, with the same content" in said.output
    assert f"PERSYN_DATABASE_URL=sqlite:///{target}" in said.output
    again = typed("store", "copy", str(home / "persyn.db"), str(target))
    assert "is not empty: it has the table" in str(again.exception)
    copied = json.loads(typed("store", "copy", str(home / "persyn.db"), str(tmp_path / "other.db"), "--json").stdout)
    assert copied["rows"]["run_prompts"] == 60


def test_a_run_is_changed_in_python(typed: Typed, home: Path) -> None:
    with package.open() as store:
        run = store.run("test")
        run.priority = 3
        assert run.priority == 3
        run.pause("a test")
        assert run.state == "paused"
        with pytest.raises(package.PersynError, match=r"run test is paused: by .*: a test; call resume\(\), then work"):
            run.work()
        run.rename("maths")
        assert store.run("maths") == run
        assert run.name == "maths"
        assert run.delete().deleted["run_prompts"] == 60
        assert store.runs() == []
        copied = package.copy_store(home / "persyn.db", home / "copy.db")
        assert copied.rows["prompts"] == 60
