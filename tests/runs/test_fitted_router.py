"""A router as a file, used by a run of another store without calibration."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from sqlalchemy import func, select

import persyn
from persyn.analysis import explain, extension, summary
from persyn.analysis.extension import Teller
from persyn.config import load_config
from persyn.db import lookup
from persyn.db.catalog import Role, Run, RunPrompt, RunState
from persyn.db.connect import Database
from persyn.db.results import Router
from persyn.db.work import Job
from persyn.errors import UsageError
from persyn.ingest.prompt_import import PromptFiles
from persyn.llm.protocols import Route, Routed
from persyn.router import checkpoint, route
from persyn.router.checkpoint import CheckpointManifest
from persyn.router.kinds.base import Examples, Prompts
from persyn.router.kinds.registry import ROUTERS
from persyn.runs import fitted_router, pipeline, run_file
from persyn.stages import assign, verdict
from tests import whole_runs
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


def fit(folder: Path) -> str:
    """Write a checkpoint of a router that sends each topic to one teacher; return its hash."""
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
    return checkpoint.write(folder, made, manifest)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The store and the exported router of a run that has assigned its prompts."""
    folder = tmp_path_factory.mktemp("first")
    sha256 = fit(folder / "fitted")
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
            path="fitted",
            sha256=sha256,
        )
        session.add(router)
        session.flush()
        run.router_id, run.stage = router.id, "generate"
        verdict.record(session, run, "route", None, [ids[2], ids[0], ids[1]])
    with database.read() as session:
        fitted_router.export(session, session.scalars(select(Run)).one(), folder / "topics.router", folder)
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
    assert spec.model == f"routers/{router_id}-imported"  # wherever the home is
    engine = route.load(structs.replace(spec, model=str(tmp_path / spec.model)), lambda: None)
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


FAULTS = ("stranger", "compressed", "code", "damaged", "text", "folder", "root", "twice", "encrypted", "newer", "bits")
#: Of `learned.json`: what stands there, and what is put in its place.
UNLEARNED = {
    "id": (b'"backbone":', b'"id":7,"backbone":'),
    "no hash": (b'"sha256":', b'"hash":'),
    "verdict": (b'"verdict":"route"', b'"verdict":"maybe"'),
    "ranking": (b'"ranking":[2,0,1]', b'"ranking":[2,0,0]'),
    "encoders": (b'"encoders":[]', b'"encoders":[7]'),
}


@pytest.mark.parametrize("fault", [*FAULTS, *UNLEARNED])
def test_only_a_router_that_was_exported_is_imported(tmp_path: Path, exported: tuple[Path, Path], fault: str) -> None:
    file, out = exported[1], tmp_path / "bad.router"
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(out, "w") as made:
        for name in archive.namelist():
            content = archive.read(name)
            if fault == "damaged" and name.endswith("kind.json"):
                content = content.replace(b"sums", b"rums")
            if fault in UNLEARNED and name == "learned.json":
                assert UNLEARNED[fault][0] in content
                content = content.replace(*UNLEARNED[fault])
            kind = zipfile.ZIP_DEFLATED if fault == "compressed" else zipfile.ZIP_STORED
            made.writestr(zipfile.ZipInfo(name), content, kind)
        more = {"stranger": "../evil.json", "code": "checkpoint/evil.pkl", "folder": "checkpoint/evil/"}
        more |= {"root": "checkpoint", "twice": "checkpoint/kind.json"}
        if fault in more:
            made.NameToInfo.clear()  # which would have a second member of a name refused
            made.writestr(more[fault], b"")
    spoil(out, fault)
    with persyn.open(tmp_path / "other.db", home=tmp_path):
        pass
    database = Database(f"sqlite:///{tmp_path}/other.db")

    with pytest.raises(UsageError, match=r"bad\.router"):
        fitted_router.import_from(database, out, tmp_path)

    assert not list(tmp_path.glob("routers/*"))
    assert not list(tmp_path.glob("evil*"))
    database.close()


def spoil(file: Path, fault: str) -> None:
    """Change bytes of an archive: what its directory says of the first member, or that member's content."""
    content = bytearray(file.read_bytes())
    entry = content.index(b"PK\x01\x02")
    if fault == "encrypted":
        content[entry + 8] |= 1
    elif fault == "newer":
        content[entry + 6] = 99
    elif fault == "bits":
        content[content.index(b'"clusters"')] ^= 1
    elif fault == "text":
        content = bytearray(b"no archive")
    file.write_bytes(content)


def test_members_that_share_their_bytes_are_refused(tmp_path: Path, exported: tuple[Path, Path]) -> None:
    out = tmp_path / "bomb.router"
    with zipfile.ZipFile(exported[1]) as archive, zipfile.ZipFile(out, "w") as made:
        for name in archive.namelist():
            made.writestr(zipfile.ZipInfo(name), archive.read(name))
        largest = max(made.infolist(), key=lambda member: member.file_size)
        for number in range(20):
            other = zipfile.ZipInfo(f"checkpoint/{number}.json")
            other.header_offset, other.CRC = largest.header_offset, largest.CRC
            other.file_size = other.compress_size = largest.file_size
            made.filelist.append(other)

    with pytest.raises(UsageError, match="contains a part twice"):
        fitted_router.read(out)


def test_what_decided_is_unknown_where_the_calibration_prompts_are_not(other: tuple[Database, str]) -> None:
    with other[0].read() as session:
        title, rows = explain._nearest(session, [], [3, 0], [0.9, 0.5])

    assert title == "the most similar calibration prompts, which are not in this store"
    assert rows == [{"similarity": 0.9}, {"similarity": 0.5}]


def test_the_router_of_a_run_is_read_wherever_its_home_is(tiny: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with persyn.open(tmp_path / "store.db", home=home):
        pass
    database = Database(f"sqlite:///{tmp_path}/store.db")
    given = f'kind = "neighbours"\nbackbone = "{tiny}"'
    run_id = whole_runs.work(database, home, write(tmp_path, given, calibration=30, when_unsure="static"))
    (tmp_path / "more.jsonl").write_text('{"prompt": "Sing!"}\n')

    found = extension.measure(database, run_id, PromptFiles([tmp_path / "more.jsonl"]), home, Teller(pytest.fail))
    with database.read() as session:
        learned = fitted_router.export(session, session.get_one(Run, run_id), tmp_path / "fitted.router", home)
    database.close()

    assert found is not None
    assert (found.on, found.calibration, found.measured) == ("states", 22, 1)
    assert learned.router.kind == "neighbours"
    assert fitted_router.read(tmp_path / "fitted.router") == learned


def test_equal_routers_are_equal_files_and_none_is_replaced(tmp_path: Path, exported: tuple[Path, Path]) -> None:
    database = Database(f"sqlite:///{exported[0]}/first.db")
    with database.read() as session:
        run = session.scalars(select(Run)).one()
        fitted_router.export(session, run, tmp_path / "again.router", exported[0])
        with pytest.raises(UsageError, match="exists; give another name"):
            fitted_router.export(session, run, tmp_path / "again.router", exported[0])
    database.close()
    assert (tmp_path / "again.router").read_bytes() == exported[1].read_bytes()
    assert list(tmp_path.glob("*.unfinished")) == []
