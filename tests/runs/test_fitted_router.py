"""A router as a file, used by a run of another store without calibration."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import func, select

import persyn
from persyn.analysis import summary
from persyn.config import load_config
from persyn.db import lookup
from persyn.db.catalog import Role, Run, RunPrompt, RunState
from persyn.db.connect import Database
from persyn.db.results import Router
from persyn.db.work import Job
from persyn.errors import UsageError
from persyn.llm.protocols import Route, Routed
from persyn.router import checkpoint, route
from persyn.router.checkpoint import CheckpointManifest
from persyn.router.kinds.base import Examples, Prompts
from persyn.router.kinds.registry import ROUTERS
from persyn.runs import fitted_router, pipeline, run_file
from persyn.stages import assign, verdict
from tests.run_files import TEACHERS, write_run

TOPICS = ("sums", "poems", "code")


def write(folder: Path, router: str, **run: Any) -> Path:
    """A run whose router reads the prompts' topics, or is another one."""
    file = write_run(folder, **run)
    table = '[router]\nbackbone = "backbone"\nengine = "fake"'
    file.write_text(file.read_text().replace(table, f"[router]\n{router}"))
    rows = [{"prompt": f"Prompt {n}?", "answer": "7", "topic": TOPICS[n % 3]} for n in range(60)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def start(database: Database, file: Path) -> int:
    with database.write() as session:
        return pipeline.start_run(session, run_file.read(file), actor="me").id


def fit(folder: Path) -> tuple[Path, str]:
    """A checkpoint of a router that sends each topic to one teacher, and its hash."""
    topics = {"topic": [TOPICS[n % 3] for n in range(30)]}
    made = ROUTERS["clusters"].fit(Prompts(fields=topics), Examples(np.eye(3)[np.arange(30) % 3]))
    manifest = CheckpointManifest(
        backbone="",
        revision=None,
        tune="head",
        teachers=list(TEACHERS),
        max_tokens=1,
        add_bos=None,
        versions={},
        kind="clusters",
        features=["topic"],
    )
    return folder / "fitted", checkpoint.write(folder / "fitted", made, manifest)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The store and the exported router of a run that has assigned its prompts."""
    folder = tmp_path_factory.mktemp("first")
    path, sha256 = fit(folder)
    with persyn.open(folder / "first.db", home=folder):
        pass
    database = Database(f"sqlite:///{folder}/first.db")
    run_id = start(database, write(folder, 'kind = "clusters"\nencoders = []\nfeatures = ["topic"]'))
    with database.write() as session:
        run = session.get_one(Run, run_id)
        ids = [teacher.id for teacher in lookup.teachers(session, run_id)]
        metrics = {"encoders": [], "features": ["topic"]}
        router = Router(
            fingerprint="f" * 64,
            backbone="",
            kind="clusters",
            tune="head",
            options={},
            teacher_ids=ids,
            metrics=metrics,
            path=str(path),
            sha256=sha256,
        )
        session.add(router)
        session.flush()
        run.router_id, run.stage = router.id, "generate"
        verdict.record(session, run, "route", None, [ids[2], ids[0], ids[1]])
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


def test_a_router_of_another_store_is_used_without_calibration(
    tmp_path: Path, exported: tuple[Path, Path], other: tuple[Database, str]
) -> None:
    database, router_id = other
    assert fitted_router.import_from(database, exported[1], tmp_path) == router_id  # twice is once
    file = write(tmp_path, f'fitted = "{router_id}"', name="second")
    with persyn.open(tmp_path / "other.db", home=tmp_path) as store:
        plan = store.plan(file)

    run_id = start(database, file)

    assert (plan.calibration, plan.undecided) == (0, 60)
    assert start(database, file) == run_id
    with database.read() as session:
        run = session.get_one(Run, run_id)
        assert (run.stage, run.state) == ("assign", RunState.RUNNING)
        assert session.execute(select(Job.stage, func.sum(Job.n_prompts)).group_by(Job.stage)).all() == [("assign", 60)]
        assert set(session.scalars(select(RunPrompt.role))) == {Role.TARGET}
        assert session.scalar(select(func.count()).select_from(Router)) == 1
        router = load_config(run.config).router
        assert (router.kind, router.features, router.encoders) == ("clusters", ["topic"], [])
        decided = verdict.decision(session, run)
        teachers = [teacher.id for teacher in lookup.teachers(session, run_id)]
        spec, facts = assign.route_spec(session, run), summary.facts(session, run)
    assert decided is not None
    assert (decided.verdict, decided.routes) == ("route", True)
    assert decided.ranking == [teachers[2], teachers[0], teachers[1]]
    assert facts.verdict is not None
    assert "its router was imported" in facts.verdict.says
    engine = route.load(spec, lambda: None)
    engine.submit([Route(n, [], labels={"topic": topic}) for n, topic in enumerate(TOPICS)])
    assert [int(np.argmax(each.scores)) for each in engine.step() if isinstance(each, Routed)] == [0, 1, 2]


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
        store.plan(write(tmp_path, 'fitted = "abc"'))


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
