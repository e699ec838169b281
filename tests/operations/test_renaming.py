"""A renamed run is found, started and trained under its new name, and its datasets move with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import select

from persyn.config import load_config
from persyn.db.catalog import Run, Student
from persyn.db.connect import Database
from persyn.db.trained import Training
from persyn.db.work import Event
from persyn.errors import UsageError
from persyn.operations.renaming import rename
from persyn.runs import pipeline, run_file, start
from persyn.student import identity
from tests.factories import make_run
from tests.operations.test_deletion import _train
from tests.run_files import write_run


def test_a_renamed_run_is_the_run_of_a_file_with_the_new_name(database: Database, tmp_path: Path) -> None:
    file = write_run(tmp_path)
    with database.write() as session:
        run_id = pipeline.start_run(session, run_file.read(file), actor="me").id
    (tmp_path / "datasets/test").mkdir(parents=True)

    moved = rename(database, run_id, "better", tmp_path, actor="me")

    assert moved == [tmp_path / "datasets" / "better"]
    file.write_text(file.read_text().replace('name = "test"', 'name = "better"'))
    with database.write() as session:
        assert pipeline.start_run(session, run_file.read(file), actor="me").id == run_id
        run = session.get_one(Run, run_id)
        config = load_config(run.config)
        assert (run.name, config.run.name, run.config_hash) == ("better", "better", config.digest())
        details = session.scalars(select(Event.detail).where(Event.run_id == run_id)).all()
    assert {"renamed": "better", "was": "test"} in [json.loads(json.dumps(detail)) for detail in details]


def test_a_name_whose_dataset_was_kept_is_refused(database: Database, tmp_path: Path) -> None:
    with database.write() as session:
        run = make_run(session, name="one")
    for folder in ("datasets/one", "datasets-preference/two"):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(UsageError, match=r"there is a dataset in .*datasets-preference/two already"):
        rename(database, run.id, "two", tmp_path, actor="me")
    with database.read() as session:
        assert session.get_one(Run, run.id).name == "one"
    assert (tmp_path / "datasets/one").is_dir()


def test_a_renaming_that_was_interrupted_moves_what_is_left(database: Database, tmp_path: Path) -> None:
    with database.write() as session:
        run = make_run(session, name="one")
    rename(database, run.id, "two", tmp_path, actor="me")
    for folder in ("datasets/one", "datasets-preference/one", "datasets-preference/two"):
        (tmp_path / folder).mkdir(parents=True)

    with pytest.raises(UsageError, match=r"the run is renamed, but .*datasets-preference/one was not moved"):
        rename(database, run.id, "two", tmp_path, actor="me")
    assert (tmp_path / "datasets/two").is_dir()
    (tmp_path / "datasets-preference/two").rmdir()
    assert rename(database, run.id, "two", tmp_path, actor="me") == [tmp_path / "datasets-preference/two"]
    assert rename(database, run.id, "two", tmp_path, actor="me") == []

    with database.write() as session:
        make_run(session, name="one", prompts=0)
    (tmp_path / "datasets/one").mkdir()  # that of the new run
    with pytest.raises(UsageError, match="there is a run named 'two' already"):
        rename(database, run.id, "two", tmp_path, actor="me")


def test_a_name_that_another_process_has_just_taken_is_refused(database: Database) -> None:
    with database.write() as session:
        run, other = (session.get_one(Run, make_run(session, name=name).id) for name in ("one", "other"))
        run.name = other.name
        with pytest.raises(UsageError, match="there is a run named 'other' already"):
            start.write_name(session, run)
        session.rollback()


def test_a_training_is_found_after_its_run_was_renamed(database: Database, tmp_path: Path) -> None:
    with database.write() as session:
        made = make_run(session, name="one")
        _train(session, made, tmp_path)
        run = session.get_one(Run, made.id)
        (training,) = session.scalars(select(Training))
        before = identity.fingerprint("one", "s", training.dataset_hash, training.settings)
        assert before != identity.fingerprint("two", "s", training.dataset_hash, training.settings)
        student = session.get_one(Student, run.student_id).fingerprint

    rename(database, made.id, "two", tmp_path, actor="me")

    with database.read() as session:
        (training,) = session.scalars(select(Training))
        wanted = identity.fingerprint("two", student, training.dataset_hash, training.settings)
        assert training.fingerprint == wanted


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("other", "there is a run named 'other' already"),
        ("one", "there is a run named 'one' already"),
        ("a b", "'a b' cannot be the name of a run: "),
        ("", "'' cannot be the name of a run: "),
    ],
)
def test_a_name_that_is_taken_or_invalid_is_refused(database: Database, tmp_path: Path, name: str, why: str) -> None:
    with database.write() as session:
        run = make_run(session, name="one")
        make_run(session, name="other")
    with pytest.raises(UsageError, match=why):
        rename(database, run.id, name, tmp_path, actor="me")
    with database.read() as session:
        assert session.get_one(Run, run.id).name == "one"
