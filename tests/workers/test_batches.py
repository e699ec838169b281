"""Teachers behind a batch protocol: every request is sent in one batch, and its result stored, whatever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from persyn.db.catalog import Prompt, Run, RunState
from persyn.db.connect import Database
from persyn.db.results import Response
from persyn.db.work import Batch
from tests.batch_server import BatchServer, answered, refused
from tests.run_files import write_run

PROMPTS = 12
MOMENTS = [
    "upload: before",
    "upload: after",
    "create: before",
    "create: after",
    "list: before",
    "look: before",
    "look: before",
    "over: before",
    "content: before",
    "content: within",
    "content: within",
]


@pytest.fixture
def server() -> Iterator[BatchServer]:
    with BatchServer.running() as found:
        yield found


def run_file(folder: Path, server: BatchServer, **options: Any) -> Path:
    """A run of two teachers that answer at random, in batches of at most 4 requests."""
    file = write_run(folder, prompts=PROMPTS, teachers=("ada", "bob"), strategy="random")
    batch = {"base_url": server.base_url, "mode": "batch", "batch_requests": 4, "poll_seconds": 0.05, **options}
    inline = ", ".join(f"{key} = {json.dumps(value)}" for key, value in batch.items())
    text = file.read_text().replace('engine = "fake"\ngpus = 0', 'engine = "openai"\ngpus = 0')
    file.write_text(text.replace("options = {  }", f"options = {{ {inline} }}"))
    return file


class Command:
    """`persyn` in a process of its own, which a moment of the server may kill."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder = folder
        self._environment = {**os.environ, "PERSYN_DATABASE_URL": url, "PERSYN_HOME": str(folder / "home")}
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, *arguments: str) -> int:
        """The exit status; negative if it was killed."""
        with (self._folder / "output").open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from persyn.cli.main import main; main()", "--debug", *arguments],
                env=self._environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            return self.process.wait(timeout=60)

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path, f"sqlite:///{tmp_path / 'persyn.db'}")


def responses(folder: Path) -> list[Any]:
    store = Database(f"sqlite:///{folder / 'persyn.db'}")
    with store.read() as session:
        assert session.scalars(select(Run.state)).one() is RunState.DONE
        found = list(session.execute(select(Prompt.text.label("prompt"), Response.text, Response.failure).join(Prompt)))
        batches = session.scalars(select(Batch)).all()
    store.close()
    assert all(batch.collected_at is not None and batch.provider_id is not None for batch in batches)
    return found


def question(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


def test_killed_at_every_moment_no_batch_is_sent_twice_and_no_row_is_lost(
    tmp_path: Path, server: BatchServer, command: Command
) -> None:
    left = list(MOMENTS)

    def moment(name: str) -> None:
        if left and name == left[0] and command.is_alive:
            left.pop(0)
            command.kill()

    server.moment = moment
    server.reply = lambda body: answered(f"Re: {question(body)}")
    file = run_file(tmp_path, server)

    starts = 0
    while (status := command.run("run", "start", str(file))) == -signal.SIGKILL:
        starts += 1

    assert status == 0, (tmp_path / "output").read_text()
    assert not left, f"never reached: {left}"
    assert starts == len(MOMENTS)
    found = responses(tmp_path)
    assert len(found) == PROMPTS
    assert all(row.text == f"Re: {row.prompt}" for row in found)
    assert len(server.sent) == PROMPTS  # each request in one batch
    assert max(Counter(server.keys()).values()) == 1


def test_expired_and_failed_requests_are_sent_again_and_refused_ones_are_not(
    tmp_path: Path, server: BatchServer, command: Command
) -> None:
    seen: Counter[str] = Counter()

    def reply(body: dict[str, Any]) -> dict[str, Any] | None:
        asked = question(body)
        seen[asked] += 1
        if "What is 3 " in asked:
            return refused(400, "the prompt is too long: maximum context length is 8 tokens")
        if seen[asked] == 1 and "What is 5 " in asked:
            return None
        if "What is 7 " in asked:
            return refused(500, "internal error")
        return answered("Four.")

    server.reply = reply

    # Many rows failed.
    assert command.run("run", "start", str(run_file(tmp_path, server))) == 3, (tmp_path / "output").read_text()

    found = {row.prompt: row for row in responses(tmp_path)}
    assert found["What is 3 plus 3?"].failure.startswith("too_long")
    assert found["What is 5 plus 5?"].text == "Four."
    assert found["What is 7 plus 7?"].failure.startswith("server_error")
    assert sum(row.text == "Four." for row in found.values()) == PROMPTS - 2
    assert (seen["What is 3 plus 3?"], seen["What is 5 plus 5?"], seen["What is 7 plus 7?"]) == (1, 2, 4)


def test_killed_with_second_choices_in_a_batch_each_prompt_is_sent_once_to_each_teacher(
    tmp_path: Path, server: BatchServer, command: Command
) -> None:
    left = ["create: after", "content: within"]

    def moment(name: str) -> None:
        if left and name == left[0] and len(server.sent) > PROMPTS and command.is_alive:
            left.pop(0)
            command.kill()

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        asked[body["model"], question(body)] += 1
        if body["model"] == "ada":
            return refused(400, "the prompt is too long: maximum context length is 8 tokens")
        return answered(f"Re: {question(body)}")

    asked: Counter[tuple[str, str]] = Counter()
    server.moment, server.reply = moment, reply
    file = run_file(tmp_path, server)
    file.write_text(file.read_text() + '[fallback]\non = ["too_long"]\n')

    while (status := command.run("run", "start", str(file))) == -signal.SIGKILL:
        pass

    assert (status, left) == (0, []), (tmp_path / "output").read_text()
    found = responses(tmp_path)
    refusals = sum(row.failure is not None for row in found)
    assert 0 < refusals == len(server.sent) - PROMPTS
    assert len(found) == len(asked) == len(server.sent)  # each request in one batch
    assert sum(row.text == f"Re: {row.prompt}" for row in found) == PROMPTS


def test_a_rejected_batch_fails_the_run_with_the_providers_reason(
    tmp_path: Path, server: BatchServer, command: Command
) -> None:
    def reject(name: str) -> None:
        if name == "look: before":
            for batch in server.batches.values():
                batch |= {"status": "failed", "errors": {"data": [{"code": "invalid", "message": "no such model"}]}}

    server.moment, server.looks = reject, 99

    assert command.run("run", "start", str(run_file(tmp_path, server))) == 1
    assert "no such model" in (tmp_path / "output").read_text()


def test_batches_of_a_cancelled_run_are_collected_when_it_is_resumed(
    tmp_path: Path, server: BatchServer, command: Command
) -> None:
    file = run_file(tmp_path, server)
    server.moment = lambda name: command.kill() if name == "look: before" and command.is_alive else None
    assert command.run("run", "start", str(file)) == -signal.SIGKILL
    server.moment = lambda name: None
    assert command.run("run", "cancel", "test") == 0

    assert command.run("run", "resume", "test") == 0, (tmp_path / "output").read_text()

    assert len(responses(tmp_path)) == PROMPTS
    assert len(server.sent) == PROMPTS


def test_a_batch_that_the_provider_has_deleted_is_sent_again(
    tmp_path: Path, server: BatchServer, command: Command
) -> None:
    gone: list[str] = []

    def moment(name: str) -> None:
        if name == "look: before" and not gone:
            gone.extend(server.batches)
            server.batches.clear()

    server.moment = moment

    assert command.run("run", "start", str(run_file(tmp_path, server))) == 0, (tmp_path / "output").read_text()

    assert gone
    assert len(responses(tmp_path)) == PROMPTS


def test_a_broken_download_is_waited_out(tmp_path: Path, server: BatchServer, command: Command) -> None:
    breaks = ["content: within"] * 2

    def moment(name: str) -> None:
        if breaks and name == breaks[0]:
            breaks.pop()
            raise ConnectionResetError

    server.moment = moment

    assert command.run("run", "start", str(run_file(tmp_path, server))) == 0, (tmp_path / "output").read_text()

    assert not breaks
    assert len(responses(tmp_path)) == PROMPTS
    assert len(server.sent) == PROMPTS
