"""A run with a reward model as quality, and another run with a different one."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import func, select
from transformers import AutoTokenizer

from persyn.db.catalog import Run, RunState, Scorer
from persyn.db.connect import Database
from persyn.db.results import Response, Score
from persyn.llm.protocols import ModelSpec
from persyn.runs import pipeline, run_file
from persyn.settings import Settings
from persyn.workers.runner.listener import Listener
from persyn.workers.runner.worker import Worker
from tests import tiny_models
from tests.one_database import SQLITE
from tests.run_files import TEACHERS, write_run

PROMPTS = 12
CELLS = PROMPTS * len(TEACHERS)


class Loads(Listener):
    """Records the scorers that were loaded."""

    def __init__(self) -> None:
        self.scorers: list[str] = []
        self.teachers: list[str] = []

    def loading(self, spec: ModelSpec) -> None:
        if spec.engine == "reward_model":
            self.scorers.append(spec.model)
        elif spec.model in TEACHERS:
            self.teachers.append(spec.model)

    def loaded(self, spec: ModelSpec, seconds: float) -> None:
        pass

    def saved(self, stage: str, done: int, failed: int) -> None:
        pass


def worked(database: Database, folder: Path, name: str, reward_model: Path) -> Loads:
    """Work a run to its responses; all prompts are calibration prompts, so that the router does not matter."""
    file = write_run(folder, prompts=PROMPTS, name=name, calibration=PROMPTS)
    quality = f'kind = "reward_model"\nmodel = "{reward_model}"\noptions = {{ dtype = "float32" }}'
    file.write_text(file.read_text().replace('[quality]\nkind = "fake"', f"[quality]\n{quality}"))
    with database.write() as session:
        run_id = pipeline.start_run(session, run_file.read(file), actor="me").id
    loads = Loads()
    Worker(database, Settings(str(database.url), folder), run_id=run_id, listener=loads).run()
    with database.read() as session:
        run = session.get_one(Run, run_id)
        assert run.state is RunState.DONE, run.error
    return loads


def scores(database: Database) -> dict[str, list[float]]:
    """Each reward model's scores of all responses."""
    with database.read() as session:
        rows = session.execute(
            select(Scorer.model, Score.value)
            .join(Score, Score.scorer_id == Scorer.id)
            .where(Scorer.kind == "reward_model")
            .order_by(Score.response_id)
        ).all()
    return {model: [value for of, value in rows if of == model] for model, _ in rows}


@pytest.mark.model
@SQLITE
def test_another_reward_model_generates_nothing_and_its_scores_stand_beside_those_that_are_there(
    database: Database, tmp_path: Path, smollm2: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    one, two = (
        tiny_models.reward_model(tmp_path / name, tokenizer, seed=seed) for seed, name in enumerate(("one", "two"))
    )

    first = worked(database, tmp_path, "first", one)
    before = scores(database)
    second = worked(database, tmp_path, "second", two)
    after = scores(database)

    assert (first.scorers, sorted(set(first.teachers))) == ([str(one)], sorted(TEACHERS))
    assert (second.scorers, second.teachers) == ([str(two)], [])
    assert before.keys() == {str(one)}
    assert after[str(one)] == before[str(one)]
    assert len(after[str(two)]) == len(after[str(one)]) == CELLS
    assert all(mine != theirs for mine, theirs in zip(after[str(two)], after[str(one)], strict=True))
    with database.read() as session:
        assert session.scalars(select(func.count()).select_from(Response)).one() == CELLS
        revisions = session.scalars(select(Scorer.revision).where(Scorer.kind == "reward_model")).all()
        assert len(set(revisions)) == 2
        learnability = select(func.count()).select_from(Score).join(Scorer, Scorer.id == Score.scorer_id)
        assert session.scalars(learnability.where(Scorer.kind != "reward_model")).one() == CELLS
