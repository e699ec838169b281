"""Scores whose responses were not published: they are rewards at alpha 0, and never a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select

from persyn.config import COMBINED
from persyn.dataset import export
from persyn.dataset.options import ExportOptions
from persyn.db import combined, grid
from persyn.db.catalog import Run, Scorer
from persyn.db.connect import Database
from persyn.db.results import NO_TEXT, Response, Score
from persyn.errors import UsageError
from persyn.ingest import responses
from persyn.ingest.imports import ImportReport
from persyn.ingest.response_rows import Layout
from tests.cli.conftest import Persyn
from tests.factories import digest

SCORED = Layout(score=("right",), scores_only=True)
TEACHERS = ("ada", "bob")


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def cell(number: int, teacher: str, right: float | None, **more: Any) -> dict[str, Any]:
    return {"prompt": f"{number} + 1?", "teacher": teacher, "right": right, **more}


def load(database: Database, path: Path, layout: Layout = SCORED) -> ImportReport:
    with database.write() as session:
        return responses.import_responses(session, [path], layout=layout)


def test_a_score_without_a_response_is_a_score_and_no_text(database: Database, tmp_path: Path) -> None:
    path = write(tmp_path / "scores.jsonl", cell(1, "ada", 0.5), cell(1, "bob", 0))

    report = load(database, path)

    assert (report.new, report.new_scores) == (2, 2)
    with database.read() as session:
        stored = session.scalars(select(Response).order_by(Response.id)).all()
        assert [(each.text, each.failure) for each in stored] == [
            (None, f"{NO_TEXT}: only scores of this response were imported")
        ] * 2
        assert session.scalars(select(Score.value).order_by(Score.response_id)).all() == [0.5, 0.0]
    assert load(database, path).new_scores == 0


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (cell(1, "ada", 1, response="Two."), "has a response, but the file is imported as scores only"),
        (cell(1, "ada", None), "neither a response nor a score"),
    ],
)
def test_a_file_is_either_scores_only_or_not(database: Database, tmp_path: Path, row: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load(database, write(tmp_path / "scores.jsonl", cell(2, "ada", 1), row))
    with pytest.raises(UsageError, match="with --scores-only"):
        load(database, write(tmp_path / "scores.jsonl", cell(2, "ada", 1)), Layout(score=("right",)))


def test_a_text_that_comes_later_replaces_the_score_that_may_be_of_another(database: Database, tmp_path: Path) -> None:
    load(database, write(tmp_path / "scores.jsonl", cell(1, "ada", 1), cell(1, "bob", 0)))

    report = load(
        database, write(tmp_path / "texts.jsonl", cell(1, "ada", 0, response="Three.")), Layout(score=("right",))
    )
    later = load(database, write(tmp_path / "scores.jsonl", cell(1, "ada", 1)))

    assert (report.replaced, later.new_scores) == (1, 0)
    with database.read() as session:
        found = session.execute(select(Response.text, Score.value).join(Score).order_by(Response.teacher_id)).all()
    assert [tuple(row) for row in found] == [("Three.", 0.0), (None, 0.0)]


def test_scores_that_are_left_out_are_counted_and_said(database: Database, tmp_path: Path, persyn: Persyn) -> None:
    both = Layout(score=("right", "second"), scores_only=True)
    rows = [
        cell(1, "ada", 1, second=0.5),
        cell(1, "ada", 0),  # differs, and has no second score
        cell(1, "ada", 1),  # the same again
        cell(1, "bob", None, second=0.25),
    ]
    first = load(database, write(tmp_path / "scores.jsonl", *rows), both)
    assert (first.rows, first.new_scores, first.other_scores, first.missing_scores) == (4, 3, 1, 3)
    stored = load(database, write(tmp_path / "later.jsonl", cell(1, "ada", 0), cell(1, "bob", 1)))
    assert (stored.new_scores, stored.other_scores, stored.missing_scores) == (1, 1, 0)
    texts = [cell(1, "ada", 1, response="Two."), cell(1, "ada", 0, response="2"), cell(2, "bob", 1, response="")]
    report = load(database, write(tmp_path / "texts.jsonl", *texts), Layout(score=("right",)))
    # Another text than the stored one, and none at all.
    assert (report.new_scores, report.other_scores) == (1, 2)

    assert persyn("db", "upgrade").returncode == 0
    said = persyn(
        *("responses", "import", str(tmp_path / "scores.jsonl"), "--scores-only", "--score", "right"),
        *("--score", "second"),
    )
    assert "; 3 new scores" in said.stdout
    assert "1 scores differ from the stored one of the same response, which is kept" in said.stderr
    assert "3 values are missing in the fields with scores" in said.stderr


def test_a_combined_quality_follows_scores_that_are_imported_later(database: Database, tmp_path: Path) -> None:
    both = Layout(score=("right", "style"), scores_only=True)
    load(database, write(tmp_path / "first.jsonl", cell(1, "ada", 1), cell(1, "bob", 1, style=0)), both)
    with database.write() as session:
        right, style = session.scalars(select(Scorer).order_by(Scorer.model)).all()
        parts = [{"scorer": right.fingerprint, "weight": None}, {"scorer": style.fingerprint, "weight": 1.0}]
        quality = Scorer(fingerprint=digest("both"), kind=COMBINED, model="", options={"parts": parts})
        first = session.scalars(select(Response.id).order_by(Response.id).limit(1)).one()
        session.add_all(
            [quality, Score(response_id=first, scorer_id=style.id, failure="not_imported: none", detail={})]
        )
        session.flush()
        of_quality = select(Score.value, Score.failure).where(Score.scorer_id == quality.id)
        combined.follow(session, [style.id], [first])
        assert session.execute(of_quality).one().failure == "not_imported: imported: none"

    load(database, write(tmp_path / "later.jsonl", cell(1, "ada", 1, style=0)), both)

    with database.read() as session:
        assert session.execute(of_quality).one().value == 1.5  # 1 + 1 / (1 + e^0)


def run_file(folder: Path, alpha: float) -> Path:
    text = (
        f'[run]\nname = "a{alpha:g}"\nsetting = "instruct"\ncalibration = 20\nholdout = 0.5\nalpha = {alpha}\n'
        '[prompts]\nsource = "scores.jsonl"\n'
        '[quality]\nkind = "imported"\nmodel = "right"\n[router]\nbackbone = "b"\nengine = "fake"\n'
    )
    text += '[student]\nname = "s"\nmodel = "s"\nengine = "fake"\n' if alpha else ""
    text += "".join(f'[[teachers]]\nname = "{name}"\nmodel = "{name}"\nengine = "imported"\n' for name in TEACHERS)
    path = folder / f"run{alpha:g}.toml"
    path.write_text(text)
    return path


def test_a_run_on_scores_routes_and_compares_and_exports_nothing(persyn: Persyn, tmp_path: Path) -> None:
    rows = [cell(n, name, float(n % 2 == k)) for n in range(24) for k, name in enumerate(TEACHERS)]
    write(tmp_path / "scores.jsonl", *rows)
    assert persyn("db", "upgrade").returncode == 0
    alone = persyn("responses", "import", str(tmp_path / "scores.jsonl"), "--scores-only")
    assert "--scores-only needs --score NAME" in alone.stderr
    imported = persyn("responses", "import", str(tmp_path / "scores.jsonl"), "--scores-only", "--score", "right")
    assert imported.returncode == 0, imported.stderr

    refused = persyn("run", "start", str(run_file(tmp_path, 0.4)))
    started = persyn("run", "start", str(run_file(tmp_path, 0)))
    compared = persyn("compare", "a0")
    exported = persyn("export", "a0")
    reported = persyn("report", "a0", "-o", "report.md")
    learned = persyn("compare", "a0", "--alpha", "0.4")

    assert "40 responses to calibration prompts were imported as scores only" in refused.stderr
    assert "set alpha = 0 in [run]" in refused.stderr
    assert started.returncode == 0, started.stderr
    assert "dataset   none: the responses were imported as scores only" in started.stdout
    assert not list(tmp_path.glob("home/datasets/*"))
    assert compared.returncode == 0, compared.stderr
    assert "learnability" not in compared.stdout.partition("unavailable")[0]
    assert "car: needs learnability, and no response has one" in compared.stdout
    assert reported.returncode == 0, reported.stderr
    assert "none answered; 24 were imported as scores only" in exported.stderr
    assert "there is no reward at alpha 0.4: the run is at alpha 0 and scores no learnability" in learned.stderr
    database = Database(f"sqlite:///{tmp_path / 'home' / 'persyn.db'}")
    with database.read() as session:
        run = session.scalars(select(Run).where(Run.name == "a0")).one()
        cells = grid.read(session, run)
        assert not np.isnan(cells.rewards()).any()
        assert (cells.n_responses == 0).all()
    with pytest.raises(UsageError, match="nothing to export as preference: 20 calibration prompts: no_reward 20"):
        export.preview(database, run.id, ExportOptions(kind="preference"))
    database.close()
