"""One process works several models concurrently on its GPUs."""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from pathlib import Path

import psutil
import pytest
from sqlalchemy import select

from persyn.db.catalog import Run, RunState, Teacher
from persyn.db.connect import Database
from persyn.db.work import Job, Load
from persyn.runs import pipeline, run_file
from persyn.settings import Settings
from persyn.workers.runner.affinity import Reach
from persyn.workers.runner.crew import Crew
from persyn.workers.runner.listener import Listener
from tests.run_files import write_run

GPUS = ("0", "1", "2", "3")


class Killing(Listener):
    """Kills one engine, once, while all are working."""

    killed = 0

    def saved(self, stage: str, done: int, failed: int) -> None:
        hosts = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
        if not self.killed and len(hosts) > 1:
            self.killed = hosts[0].pid
            os.kill(self.killed, signal.SIGKILL)


@pytest.fixture
def four_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `nvidia-smi` report any GPUs it is asked about."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\n"
        'case "$1" in *memory.used*) exit 1;; esac\n'
        'for word in "$@"; do case "$word" in --id=*) ids="${word#--id=}";; esac; done\n'
        'for id in $(echo "${ids:-0,1,2,3}" | tr , " "); do echo "$id, H100"; done\n'
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)  # the database plays no part
def test_small_models_share_the_gpus_that_a_large_one_gets_all_of(database: Database, tmp_path: Path) -> None:
    options = {"latency_seconds": 0.2, "concurrency": 2}
    file = write_run(tmp_path, prompts=30, calibration=24, job_prompts=4, options=options)
    text = file.read_text()
    for teacher, gpus in (("ada", 1), ("bob", 4), ("cyd", 1)):
        text = text.replace(
            f'model = "{teacher}"\nengine = "fake"\ngpus = 0', f'model = "{teacher}"\nengine = "fake"\ngpus = {gpus}'
        )
    file.write_text(text)
    with database.write() as session:
        run_id = pipeline.start_run(session, run_file.read(file), actor="me").id
    killing = Killing()
    Crew(database, Settings(str(database.url), tmp_path), Reach(GPUS), run_id=run_id, listener=killing).run()

    with database.read() as session:
        assert session.get_one(Run, run_id).state is RunState.DONE
        assert session.scalars(select(Job.error).where(Job.error.is_not(None))).all() == []
        rows = session.execute(
            select(Teacher.name, Load.gpus, Load.owner)
            .join(Job, Job.id == Load.job_id)
            .outerjoin(Teacher, Teacher.id == Job.teacher_id)
        )
        used: defaultdict[str, set[str]] = defaultdict(set)
        owners = set()
        for teacher, gpus, owner in rows:
            used[teacher].add(gpus)
            owners.add(owner)
    assert used["bob"] == {"; ".join(f"{gpu} H100" for gpu in GPUS)}
    # More concurrent models than small teachers: each uses as many GPUs as its work justifies.
    assert len(used["ada"] | used["cyd"]) > 2
    assert all(gpus in {f"{gpu} H100" for gpu in GPUS} for gpus in used["ada"] | used["cyd"])
    assert len(owners) > 2
    assert killing.killed
