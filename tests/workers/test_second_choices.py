"""Second choices: a response that is not used sends its prompt to the next best teacher, once, and says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import select

from persyn.cli import summary
from persyn.dataset import export
from persyn.dataset.options import ExportOptions
from persyn.db.catalog import Role, Run, RunPrompt, Teacher
from persyn.db.connect import Database
from persyn.db.results import Assignment, Fallback, RouterScore
from persyn.report import document, gather
from tests.one_database import SQLITE
from tests.run_files import write_run
from tests.web.conftest import client
from tests.whole_runs import work

FEW = 40


def write(folder: Path, table: str, *, refuses: str) -> Path:
    """A run file with [fallback] and checks, one of whose teachers refuses a third of the prompts."""
    file = write_run(folder, prompts=FEW)
    head, *teachers = file.read_text().split("[[teachers]]\n")
    for number, teacher in enumerate(teachers):
        if f'name = "{refuses}"' in teacher:
            teachers[number] = teacher.replace("options = {  }", "options = { fail_every = 3 }")
    file.write_text("[[teachers]]\n".join([head, *teachers]) + f"[generation]\ncheck = true\n[fallback]\n{table}\n")
    return file


def choices(database: Database, run_id: int) -> dict[int, list[tuple[str, str]]]:
    """{prompt: (teacher, why it was left) of each earlier choice, then (teacher, reason) of the assignment}."""
    found: dict[int, list[tuple[str, str]]] = {}
    with database.read() as session:
        of_run = select(Fallback.prompt_id, Teacher.name, Fallback.cause).join(Teacher).where(Fallback.run_id == run_id)
        now = select(Assignment.prompt_id, Teacher.name, Assignment.reason, Assignment.choice).join(Teacher)
        for prompt_id, teacher, cause in session.execute(of_run.order_by(Fallback.prompt_id, Fallback.choice)):
            found.setdefault(prompt_id, []).append((teacher, cause))
        for prompt_id, teacher, reason, choice in session.execute(now.where(Assignment.run_id == run_id)):
            if choice == len(found.setdefault(prompt_id, [])) + 1:
                found[prompt_id].append((teacher, reason))
            else:
                assert (teacher, reason) == (found[prompt_id][choice - 1][0], "fallback: no further choice")
    return found


@SQLITE
def test_what_a_teacher_refuses_goes_to_the_routers_next_one(
    database: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = work(database, tmp_path, write(tmp_path, 'on = ["refused"]', refuses="bob"))

    moved = {prompt_id: row for prompt_id, row in choices(database, run_id).items() if len(row) > 1}
    assert moved
    assert {row[0] for row in moved.values()} == {("bob", "refused")}
    assert {row[1][1] for row in moved.values()} == {"fallback: refused"}
    with database.read() as session:
        run = session.get_one(Run, run_id)
        targets = set(
            session.scalars(
                select(RunPrompt.prompt_id).where(RunPrompt.run_id == run_id, RunPrompt.role == Role.TARGET)
            )
        )
        scored = select(Teacher.name, RouterScore.score).join(Teacher).where(RouterScore.router_id == run.router_id)
        for prompt_id in moved.keys() & targets:
            ranked = session.execute(
                scored.where(RouterScore.prompt_id == prompt_id).order_by(RouterScore.score.desc())
            ).all()
            assert [name for name, _ in ranked[:2]] == [teacher for teacher, _ in moved[prompt_id]]
        assert moved.keys() & targets
        left = session.scalars(select(Fallback.failure).where(Fallback.run_id == run_id)).all()
        assert set(left) == {"refused: one of 3 requests"}
    is_scored = ExportOptions(min_quality=0.0, unscored="drop")
    manifest = export.write(database, run_id, tmp_path / "dataset", is_scored)
    assert (manifest.exported, sum(manifest.failed.values())) == (FEW, 0)
    with database.read() as session:
        run = session.get_one(Run, run_id)
        report = gather.gather(session, run)
        summary.show(session, run)
    said = "responses met a condition of [fallback] (refused"
    status = capsys.readouterr().out
    assert said in status
    assert "realised quality" in status
    assert said.replace("[fallback]", r"\[fallback\]") in document.markdown(report, [])
    assert said in document.html(report, [])
    assert "Predicted and realised quality" in document.markdown(report, [])
    assert "Predicted and realised quality" in document.html(report, [])
    console = client(database)
    assert said in console.get("/runs/test").text
    assert "Responses that met a condition of [fallback]" in console.get(f"/runs/test/prompts/{min(moved)}").text
