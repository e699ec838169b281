"""Write, execute and time whole runs for benchmarks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

import psutil
from sqlalchemy import select

from persyn.db.connect import Database
from persyn.db.work import Event

NAME = "benchmark"
_POLL_SECONDS = 0.1
Times: TypeAlias = dict[str, datetime]
"""When a run reached each stage; "done" is its end."""


def write(
    folder: Path,
    prompts: int,
    teachers: Sequence[dict[str, Any]],
    *,
    calibration: int,
    job_prompts: int,
    strategy: str = "persyn",
) -> Path:
    """Write a run file and its prompts to a folder; everything except its teachers is fake."""
    with (folder / "prompts.jsonl").open("w") as file:
        for n in range(prompts):
            file.write(json.dumps({"id": str(n), "prompt": question(n), "answer": str(3 * n)}) + "\n")
    lines = [
        f'[run]\nname = "{NAME}"\nsetting = "instruct"',
        f"calibration = {calibration}\nholdout = 0.25\njob_prompts = {job_prompts}",
        '[prompts]\nfile = "prompts.jsonl"',
        '[student]\nname = "student"\nmodel = "student"\nengine = "fake"',
        '[quality]\nkind = "fake"',
        '[router]\nbackbone = "backbone"\nengine = "fake"',
        f'[strategy]\nkind = "{strategy}"\nwhen_unsure = "route"',
    ]
    for teacher in teachers:
        lines.append("[[teachers]]")
        lines += [f"{key} = {_toml(value)}" for key, value in {"gpus": 0, **teacher}.items()]
    path = folder / "run.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def question(n: int) -> str:
    """The text of prompt number n, a short paragraph; all texts differ."""
    return (
        f"Question {n}. A baker sells {n} loaves in the morning and twice as many in the afternoon. "
        "Write down how many loaves that is in all, and explain each step of the calculation in a sentence of its own."
    )


@contextmanager
def persyn(folder: Path, url: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the command in its own process group, killed at the end of the block; output goes to the file `output`."""
    with (folder / "output").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "persyn.cli", *arguments],
            env={**os.environ, "PERSYN_DATABASE_URL": url, "PERSYN_HOME": str(folder / "home")},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a process and its group, unless it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finish(process: subprocess.Popen[bytes], folder: Path, timeout: float) -> Peaks:
    """Wait for a run to succeed and return its peak memory; raise `RuntimeError` on failure or timeout."""
    peaks, deadline = Peaks(), time.monotonic() + timeout
    while process.poll() is None:
        peaks.look(process.pid)
        if time.monotonic() > deadline:
            raise RuntimeError(f"the run did not finish within {timeout:.0f} s")
        time.sleep(_POLL_SECONDS)
    if process.returncode:
        raise RuntimeError(f"the run exited with {process.returncode}: {(folder / 'output').read_text()[-2000:]}")
    return peaks


@dataclass(slots=True)
class Peaks:
    """Peak resident memory of a worker, and of any of its engine hosts, in MiB."""

    worker: float = 0.0
    host: float = 0.0

    def look(self, pid: int) -> None:
        """Update from the running processes, each of which reports its own peak."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            self.worker = max(self.worker, _peak(pid))
            self.host = max([self.host, *(_peak(child.pid) for child in process.children())])


def stages(database: Database) -> Times:
    """When the store's only run reached each stage and its end."""
    with database.read() as session:
        events = session.execute(
            select(Event.at, Event.to_state, Event.detail).where(Event.job_id.is_(None)).order_by(Event.id)
        ).all()
    reached = ((event, "done" if event.to_state == "done" else event.detail.get("stage")) for event in events)
    return {stage: event.at for event, stage in reached if stage}


def seconds(times: Times, first: str, last: str) -> float:
    """Seconds from the start of one stage to the start of another."""
    return (times[last] - times[first]).total_seconds()


def _peak(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    kib = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return int(kib[0]) / 1024 if kib else 0.0  # a process that is ending has no such value


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)
