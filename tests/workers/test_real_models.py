"""From prompts to a dataset with real models: vLLM under Celery workers, with a real broker and a real PostgreSQL."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import func, select

from persyn.db.catalog import Teacher
from persyn.db.connect import Database
from persyn.db.results import Assignment, Response
from persyn.db.work import Job, Load
from tests.cluster import Cluster, wait_for

pytestmark = [pytest.mark.model, pytest.mark.vllm]

PROMPTS, CALIBRATION = 16, 8
SIZE = "max_model_len = 256, max_num_seqs = 8, kv_cache_gib = 0.25"
VLLM = f'engine = "vllm"\ngpus = 0\noptions = {{ {SIZE}, enforce_eager = true, dtype = "float32" }}'
RUN = """
[run]
name = "real"
setting = "math"
calibration = {calibration}
holdout = 0.25
job_prompts = 16

[prompts]
file = "prompts.jsonl"

[student]
name = "gemma"
model = "{gemma}"

[quality]
kind = "math"

[router]
backbone = "{smollm2}"
tune = "head"

[[teachers]]
name = "brief"
model = "{smollm2}"
system = "Answer with a number."
sampling = {{ temperature = 0.0, max_tokens = 8 }}
{vllm}

[[teachers]]
name = "wordy"
model = "{smollm2}"
system = "Answer in a sentence."
sampling = {{ temperature = 0.7, max_tokens = 16 }}
{vllm}

[[teachers]]
name = "base"
model = "{gemma}"
few_shot = [{{ user = "What is 1 plus 1?", assistant = "2" }}]
sampling = {{ temperature = 0.0, max_tokens = 8 }}
{vllm}
"""


@pytest.fixture
def run_file(tmp_path: Path, smollm2: Path, gemma: Path) -> Path:
    rows = [{"id": str(n), "prompt": f"What is {n} plus 2?", "answer": str(n + 2)} for n in range(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "run.toml"
    models = {"smollm2": smollm2.absolute(), "gemma": gemma.absolute()}
    file.write_text(RUN.format(calibration=CALIBRATION, vllm=VLLM, **models))
    return file


@pytest.mark.timeout(600)
def test_two_celery_workers_take_three_vllm_teachers_from_prompts_to_a_dataset(
    cluster: Cluster, store: Database, run_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("vllm")
    for name in ("one", "two"):
        cluster.worker(name)
    cluster.start("dispatch", "dispatch")
    for name in ("one", "two"):
        wait_for(lambda name=name: '"ready"' in cluster.said(name), 60, f"worker {name} is up")

    watch = cluster.start("run", "run", "start", str(run_file))

    assert watch.wait(timeout=400) == 0, cluster.said("run")
    written = tmp_path / "home" / "datasets" / "real" / "messages.jsonl"
    assert len(written.read_text().splitlines()) == PROMPTS
    assert "loading s" in cluster.said("run")
    with store.read() as session:
        answered = session.scalars(select(func.count()).select_from(Assignment)).one()
        assert answered == PROMPTS
        engines = session.scalars(select(Response.engine).distinct()).all()
        assert all(engine is not None and engine.startswith("vllm ") for engine in engines), engines
        asked = dict(session.execute(select(Teacher.name, func.count()).join(Response).group_by(Teacher.name)).all())
        assert min(asked.values()) >= CALIBRATION, asked
        assert session.scalars(select(func.count(Response.id)).where(Response.text.is_not(None))).one() == (
            3 * CALIBRATION + PROMPTS - CALIBRATION
        )
        # Two teachers share a model and its engine; the third's is loaded next to it by the other worker.
        workers = select(func.count(Load.owner.distinct())).join(Job, Job.id == Load.job_id)
        assert session.scalars(workers.where(Job.stage == "calibrate")).one() == 2
