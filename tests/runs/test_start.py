"""The versions to which a run is pinned at its start."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from persyn.db.catalog import Run
from persyn.db.connect import Database
from persyn.errors import UsageError
from persyn.llm.identity import identify
from persyn.runs import pipeline, run_file
from persyn.stages import fit_router
from tests.run_files import write_run


def start(database: Database, folder: Path, backbone: Path, name: str, more: str = "") -> Run:
    file = write_run(folder, name=name)
    router = f"[router]\nbackbone = '{backbone}'\n{more}"
    file.write_text(file.read_text().replace('[router]\nbackbone = "backbone"\nengine = "fake"', router))
    with database.write() as session:
        run = pipeline.start_run(session, run_file.read(file), actor="me")
        session.expunge(run)
        return run


def test_a_router_s_backbone_is_the_version_that_the_run_was_started_with(
    database: Database, tmp_path: Path, tiny: Path
) -> None:
    backbone = shutil.copytree(tiny, tmp_path / "backbone")
    was = identify(str(backbone)).revision
    first = start(database, tmp_path, backbone, "first")
    assert first.config["router"]["version"] == was

    weights = load_file(backbone / "model.safetensors")
    weights["model.norm.weight"][0] = 3.0
    save_file(weights, backbone / "model.safetensors", metadata={"format": "pt"})
    second = start(database, tmp_path, backbone, "second")

    is_now = identify(str(backbone)).revision
    assert start(database, tmp_path, backbone, "first").id == first.id  # unchanged since its start
    assert second.config["router"]["version"] == is_now != was
    with database.read() as session:
        specs = [fit_router.fit_of(session, session.get_one(Run, run.id))[0] for run in (first, second)]
    assert [spec.revision for spec in specs] == [was, is_now]
    with pytest.raises(
        UsageError, match=f"the backbone .* is {is_now}, not {was}: restore it, or remove the version from the run file"
    ):
        start(database, tmp_path, backbone, "third", f'version = "{was}"')


def test_a_backbone_that_is_not_there_is_told_of_before_anything_is_generated(
    database: Database, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"nowhere/backbone"):
        start(database, tmp_path, tmp_path / "nowhere" / "backbone", "first")
