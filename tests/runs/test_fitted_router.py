"""A router as a file, used by a run of another store without calibration."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

import persyn
from persyn.analysis import summary
from persyn.config import load_config
from persyn.db.catalog import Prompt, Role, Run, RunPrompt
from persyn.db.connect import Database
from persyn.db.results import Response, Router, RouterScore
from persyn.errors import UsageError
from persyn.runs import fitted_router, run_file
from tests.run_files import write_run

TOPICS = ("sums", "poems", "code")


def write(folder: Path, router: str, **run: Any) -> Path:
    """A run whose router reads the prompts' topics, or is another one."""
    file = write_run(folder, **run)
    table = '[router]\nbackbone = "backbone"\nengine = "fake"'
    file.write_text(file.read_text().replace(table, f"[router]\n{router}"))
    rows = [{"prompt": f"Prompt {n}?", "answer": "7", "topic": TOPICS[n % 3]} for n in range(60)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The store and the exported router of a run that is done."""
    folder = tmp_path_factory.mktemp("first")
    file = write(folder, 'kind = "clusters"\nencoders = []\nfeatures = ["topic"]', calibration=24)
    with persyn.open(folder / "first.db", home=folder) as store:
        store.start(file).work()
    database = Database(f"sqlite:///{folder}/first.db")
    with database.read() as session:
        fitted_router.export(session, session.scalars(select(Run)).one(), folder / "topics.router")
    database.close()
    return folder, folder / "topics.router"


@pytest.fixture
def other(tmp_path: Path, exported: tuple[Path, Path]) -> Iterator[tuple[Database, str]]:
    """Another store, into which the router was imported, and its id."""
    with persyn.open(tmp_path / "other.db", home=tmp_path):
        pass
    database = Database(f"sqlite:///{tmp_path}/other.db")
    yield database, fitted_router.import_from(database, exported[1], tmp_path)
    database.close()


def scores(database: Database) -> dict[tuple[str, int], float]:
    """{(prompt, place of the teacher): score} of the prompts that were routed."""
    with database.read() as session:
        found = session.execute(
            select(Prompt.text, RouterScore.teacher_id, RouterScore.score)
            .join(RouterScore, RouterScore.prompt_id == Prompt.id)
            .join(RunPrompt, RunPrompt.prompt_id == Prompt.id)
            .where(RunPrompt.role == Role.TARGET)
        )
        return {(text, teacher_id): score for text, teacher_id, score in found}


def test_a_router_of_another_store_assigns_as_it_did_there_without_calibration(
    tmp_path: Path, exported: tuple[Path, Path], other: tuple[Database, str]
) -> None:
    database, router_id = other
    assert fitted_router.import_from(database, exported[1], tmp_path) == router_id  # twice is once

    with persyn.open(tmp_path / "other.db", home=tmp_path) as store:
        file = write(tmp_path, f'fitted = "{router_id}"', name="second")
        plan = store.plan(file)
        run = store.start(file).work()
        assert store.start(file) == run
        assert run.summary().stages[0].total == 0

    assert (plan.calibration, plan.undecided) == (0, 60)
    first = Database(f"sqlite:///{exported[0]}/first.db")
    mine, theirs = scores(database), scores(first)
    first.close()
    assert len(mine) == 60 * 3
    assert {key: mine[key] for key in theirs} == pytest.approx(theirs)
    with database.read() as session:
        row = session.scalars(select(Run)).one()
        assert session.scalar(select(func.count()).select_from(Router)) == 1
        assert session.scalar(select(func.count()).select_from(Response)) == 60
        assert load_config(row.config).router.features == ["topic"]
        verdict = summary.facts(session, row).verdict
    assert verdict is not None
    assert "the router assigns the remaining prompts" in (verdict.decided or "")


def test_each_difference_between_what_it_was_fitted_to_and_the_run_is_named(
    tmp_path: Path, other: tuple[Database, str]
) -> None:
    _, router_id = other
    file = write(tmp_path, f'fitted = "{router_id}"', name="second", alpha=0.7)
    file.write_text(file.read_text().replace('model = "bob"', 'model = "bob"\nsystem = "Be brief."'))

    with (
        persyn.open(tmp_path / "other.db", home=tmp_path) as store,
        pytest.raises(UsageError) as caught,
    ):
        store.start(file)

    said = str(caught.value)
    assert f"router {router_id} was fitted to other teachers or another reward" in said
    assert "teachers[1].system was not set and is 'Be brief.'" in said
    assert "reward.alpha was 0.4 and is 0.7" in said
    assert "teachers[0]" not in said
    with persyn.open(tmp_path / "other.db", home=tmp_path) as store:
        assert store.runs() == []


def test_a_router_that_was_not_imported_is_refused_with_those_that_were(
    tmp_path: Path, other: tuple[Database, str]
) -> None:
    with (
        persyn.open(tmp_path / "other.db", home=tmp_path) as store,
        pytest.raises(UsageError, match=rf"no router 'abc' was imported into this store; imported: {other[1]}"),
    ):
        store.start(write(tmp_path, 'fitted = "abc"'))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ('\nkind = "head"', "`router.kind` cannot be set beside `router.fitted`"),
        ("\n[strategy]\ncost_weight = 0.1", "without costs and limits, which need calibration prompts"),
    ],
)
def test_a_router_that_is_fitted_needs_no_description_and_leaves_no_calibration(
    tmp_path: Path, more: str, says: str
) -> None:
    file = write(tmp_path, f'fitted = "abc"{more}')
    if "strategy" in more:
        file.write_text(file.read_text().replace('[strategy]\nkind = "persyn"\nwhen_unsure = "route"\n', ""))
    with pytest.raises(UsageError, match=says):
        run_file.read(file)


@pytest.mark.parametrize("fault", ["stranger", "compressed", "code", "damaged", "text"])
def test_only_a_router_that_was_exported_is_imported(tmp_path: Path, exported: tuple[Path, Path], fault: str) -> None:
    file, out = exported[1], tmp_path / "bad.router"
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(out, "w") as made:
        for name in archive.namelist():
            content = archive.read(name)
            if fault == "damaged" and name.endswith("kind.json"):
                content = content.replace(b"sums", b"rums")
            kind = zipfile.ZIP_DEFLATED if fault == "compressed" else zipfile.ZIP_STORED
            made.writestr(zipfile.ZipInfo(name), content, kind)
        if fault in ("stranger", "code"):
            made.writestr("../evil.json" if fault == "stranger" else "checkpoint/evil.pkl", b"")
    if fault == "text":
        out.write_text("no archive")
    with persyn.open(tmp_path / "other.db", home=tmp_path):
        pass
    database = Database(f"sqlite:///{tmp_path}/other.db")

    with pytest.raises(UsageError, match=r"bad\.router"):
        fitted_router.import_from(database, out, tmp_path)

    assert not list(tmp_path.glob("routers/*"))
    assert not list(tmp_path.glob("evil*"))
    database.close()


def test_equal_routers_are_equal_files_and_none_is_replaced(tmp_path: Path, exported: tuple[Path, Path]) -> None:
    database = Database(f"sqlite:///{exported[0]}/first.db")
    with database.read() as session:
        run = session.scalars(select(Run)).one()
        fitted_router.export(session, run, tmp_path / "again.router")
        with pytest.raises(UsageError, match="exists; give another name"):
            fitted_router.export(session, run, tmp_path / "again.router")
    database.close()
    assert (tmp_path / "again.router").read_bytes() == exported[1].read_bytes()
    assert list(tmp_path.glob("*.unfinished")) == []
