"""A run whose router is chosen by evidence, on the command line: from an imported grid to an explanation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import func, select

from persyn import api
from persyn.db.catalog import Prompt, Run
from persyn.db.connect import Database
from persyn.db.results import Assignment, Router, RouterScore
from persyn.errors import UsageError
from persyn.llm.identity import identify_embedding
from tests import tiny_models
from tests.cli.conftest import Persyn

TEACHERS = ("ada", "bob", "cyd")
#: The last one colours a terminal.
TOPICS = ("sums", "poems", "\x1b[31mcode")
PROMPTS, CALIBRATION = 75, 60


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Three topics, each of which one teacher masters; the words do not tell them apart."""
    rows = [
        {
            "prompt": f"Task {number}.",
            "model": name,
            "output": f"{name} says {number}.",
            "right": number % 3 == place,
            "topic": TOPICS[number % 3],
        }
        for number in range(PROMPTS)
        for place, name in enumerate(TEACHERS)
    ]
    path = tmp_path / "grid.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_file(folder: Path, router: str) -> str:
    text = (
        f'[run]\nname = "grid"\nsetting = "instruct"\nalpha = 0\ncalibration = {CALIBRATION}\nholdout = 0.2\n'
        '[prompts]\nsource = "grid.jsonl"\n'
        '[student]\nname = "student"\nmodel = "student"\nengine = "fake"\n'
        '[quality]\nkind = "imported"\nmodel = "right"\n'
        f"[router]\n{router}\n"
    )
    text += "".join(f'[[teachers]]\nname = "{name}"\nmodel = "{name}"\nengine = "imported"\n' for name in TEACHERS)
    (folder / "run.toml").write_text(text)
    return str(folder / "run.toml")


def imported(persyn: Persyn, grid: Path) -> None:
    done = persyn("responses", "import", str(grid), "--prompt-field", "topic", "--score", "right")
    assert done.returncode == 0, done.stderr


def test_a_router_that_reads_the_topic_is_chosen_stored_and_shown(persyn: Persyn, tmp_path: Path, grid: Path) -> None:
    imported(persyn, grid)
    started = persyn("run", "start", run_file(tmp_path, 'encoders = ["tfidf"]\nfeatures = ["topic"]'))
    assert started.returncode == 0, started.stderr

    database = Database(f"sqlite:///{tmp_path / 'home' / 'persyn.db'}")
    with database.read() as session:
        router = session.scalars(select(Router)).one()
        assert session.scalars(select(Run.config["router"]["kind"].as_string())).one() == "auto"
        assert router.kind == router.metrics["kind"] != "static"
        assert (router.backbone, router.metrics["features"]) == ("", ["topic"])
        crossed = select(func.count(func.distinct(RouterScore.prompt_id))).where(RouterScore.cross_fitted.is_not(None))
        assert session.scalars(crossed).one() == CALIBRATION * 4 / 5
        assigned = session.execute(
            select(Prompt.id, Prompt.meta, Assignment.reason, Assignment.teacher_id)
            .join(Assignment, Assignment.prompt_id == Prompt.id)
            .where(Assignment.reason != "calibration")
        ).all()
    assert {row.reason for row in assigned} == {f"router: {router.kind}"}
    assert len(assigned) == PROMPTS - CALIBRATION
    assert {router.teacher_ids.index(row.teacher_id) == TOPICS.index(row.meta["topic"]) for row in assigned} == {True}

    # New prompts are routed by their labels; an unknown one has none.
    with api.open(str(database.url), home=tmp_path / "home") as opened:
        table = opened.run("grid").route(["A task."] * 4, labels={"topic": [*reversed(TOPICS), "unknown"]})
        with pytest.raises(UsageError, match="reads 'topic', and labels has none"):
            opened.run("grid").route("A task.")
    assert table.column("teacher").to_pylist()[:3] == list(reversed(TEACHERS))

    said = persyn("router", "show", "grid").stdout
    assert f"kind: {router.kind}" in said
    assert "chosen: " in said
    assert {"static", "clusters", "linear", "head", "stacked"} <= {
        line.split()[0] for line in said.splitlines() if line
    }
    assert f"router: {router.metrics['why']}" in persyn("run", "status", "grid").stdout


def test_the_calibration_prompts_that_decided_are_named(persyn: Persyn, tmp_path: Path, grid: Path) -> None:
    imported(persyn, grid)
    started = persyn("run", "start", run_file(tmp_path, 'kind = "neighbours"\nencoders = []\nfeatures = ["topic"]'))
    assert started.returncode == 0, started.stderr
    database = Database(f"sqlite:///{tmp_path / 'home' / 'persyn.db'}")
    with database.read() as session:
        routed = select(Prompt).join(Assignment, Assignment.prompt_id == Prompt.id)
        prompt = session.scalars(routed.where(Assignment.reason == "router: neighbours").limit(1)).one()
        topics = dict(session.execute(select(Prompt.id, Prompt.meta["topic"].as_string())).all())
        texts = dict(session.execute(select(Prompt.id, Prompt.text)).all())

    explained = persyn("trace", "grid", str(prompt.id), "--explain", "--json")

    assert explained.returncode == 0, explained.stderr
    (reason,) = json.loads(explained.stdout)["reasons"]
    assert (reason["router"], reason["weight"]) == ("neighbours", None)
    assert {topics[row["prompt_id"]] for row in reason["rows"]} == {prompt.meta["topic"]}
    assert all(row["text"] == texts[row["prompt_id"]] for row in reason["rows"])


def test_an_embedding_is_read_by_the_router_of_a_run(persyn: Persyn, tmp_path: Path, grid: Path, tiny: Path) -> None:
    model = tiny_models.embedding_model(tmp_path / "embedder", tiny)
    imported(persyn, grid)
    started = persyn(
        "run", "start", run_file(tmp_path, f'kind = "neighbours"\nencoders = ["embedding"]\nembedding = "{model}"')
    )
    assert started.returncode == 0, started.stderr

    database = Database(f"sqlite:///{tmp_path / 'home' / 'persyn.db'}")
    with database.read() as session:
        router = session.scalars(select(Router)).one()
        scores = session.scalars(select(RouterScore.score)).all()
        assigned = session.scalars(select(func.count()).where(Assignment.reason != "calibration")).one()
    assert (router.kind, router.backbone, router.metrics["encoders"]) == ("neighbours", "", ["embedding"])
    assert router.metrics["embedding_version"] == identify_embedding(str(model)).revision
    assert len(scores) == CALIBRATION * len(TEACHERS)
    assert len(set(scores)) > len(TEACHERS)  # it differs between prompts
    assert assigned == PROMPTS - CALIBRATION


def test_a_field_that_no_prompt_has_is_refused_before_anything_is_stored(
    persyn: Persyn, tmp_path: Path, grid: Path
) -> None:
    imported(persyn, grid)
    refused = persyn("run", "start", run_file(tmp_path, 'encoders = []\nfeatures = ["domain"]'))

    assert refused.returncode == 2
    assert (
        "none of 60 calibration prompts has a field 'domain' in its row; available: source, 'topic'" in refused.stderr
    )
    assert persyn("run", "list", "--json").stdout.strip() in ("", "[]")


@pytest.mark.parametrize(
    ("router", "said"),
    [
        ('kind = "nearest"', "`router.kind` is 'nearest'; allowed: 'auto', 'static'"),
        (
            'kind = "neighbours"\nencoders = ["tfidf"]',
            "reads nothing of its encoders and features; it can read backbone",
        ),
        ("encoders = []", "a router of kind 'auto' reads nothing"),
        ('encoders = ["embedding"]', "an embedding needs both keys"),
        ('kind = "auto"\ntune = "full"', "`router.tune` is 'full', which trains a head that reads the backbone alone"),
        ('features = ["a", "a"]', "`router.features` names 'a' more than once"),
        ('encoders = ["embedding"]\nembedding = "/nowhere"', "there is no model folder /nowhere"),
    ],
)
def test_a_router_that_cannot_work_is_refused(persyn: Persyn, tmp_path: Path, router: str, said: str) -> None:
    refused = persyn("run", "start", run_file(tmp_path, router))
    assert refused.returncode == 2
    assert said in refused.stderr
