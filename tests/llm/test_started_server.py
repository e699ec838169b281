"""Servers that PerSyn starts, in a real engine host; the program is `tests/stub_server.py`."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from persyn.config import TeacherTable
from persyn.errors import EngineError, HostLacks
from persyn.ingest import versions
from persyn.llm.host import Host, HostDied
from persyn.llm.identity import Identity, identify
from persyn.llm.options import ServerOptions
from persyn.llm.protocols import Generate, Generated, Judge, Judged, ModelSpec, Result, Sampling
from persyn.llm.teachers import started_server
from persyn.runs.checks import teachers
from tests import stub_server

STUB = [sys.executable, stub_server.__file__, "--port", "{port}", "--pids"]


def spec(command: list[str], **options: Any) -> ModelSpec:
    return ModelSpec("server", "m", options={"command": command, **options})


@pytest.fixture
def pids(tmp_path: Path) -> Path:
    """A file with the ids of the server and of its worker."""
    return tmp_path / "pids"


@pytest.fixture
def host(tmp_path: Path, pids: Path) -> Iterator[Host]:
    with closing(Host(spec([*STUB, str(pids)]), tmp_path, load_seconds=60)) as started:
        yield started


def ask(host: Host, *texts: str) -> list[str]:
    host.submit([Generate(n, [{"role": "user", "content": text}], Sampling(), 0) for n, text in enumerate(texts)])
    results: list[Result] = []
    while len(results) < len(texts):
        results += host.receive(timeout=1.0)
    return [result.text for result in sorted(results, key=lambda each: each.id) if isinstance(result, Generated)]


def processes(pids: Path) -> list[psutil.Process]:
    found = [psutil.Process(int(pid)) for pid in pids.read_text().split()]
    assert len(found) == 2
    return found


def are_gone(found: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(found, timeout=20)[1]


def test_it_is_started_asked_and_ended_with_its_workers(host: Host, pids: Path) -> None:
    assert ask(host, "a", "b", "c") == ["m: A", "m: B", "m: C"]
    assert host.loaded is not None
    assert host.loaded.version == f"server {Path(sys.executable).name}"
    running = processes(pids)

    host.close()

    assert are_gone(running)


def test_a_judge_may_be_such_a_server(tmp_path: Path, pids: Path) -> None:
    inner = {"engine": "server", "options": {"command": [*STUB, str(pids)]}}
    with closing(Host(ModelSpec("judge", "m", options=inner), tmp_path, load_seconds=60)) as judge:
        judge.submit([Judge(1, [{"role": "user", "content": "Hi!"}], "Hello.")])
        while not (found := judge.receive(timeout=1.0)):
            pass

    (result,) = found
    assert isinstance(result, Judged)
    assert result.value == 5.5  # 4 on the scale, and 11 - 4 on the scale in descending order


def test_a_killed_host_leaves_no_process(host: Host, pids: Path) -> None:
    ask(host, "a")
    running = processes(pids)

    os.kill(host.pid, signal.SIGKILL)

    assert are_gone(running)
    with pytest.raises(HostDied, match="SIGKILL"):
        ask(host, "b")


def test_a_server_that_dies_ends_the_engine_at_once_and_not_its_requests(host: Host, pids: Path) -> None:
    ask(host, "a")
    running = processes(pids)
    began = time.monotonic()

    with pytest.raises(EngineError, match=r"was ended by SIGKILL; its output ends: .*POST /v1/chat/completions"):
        ask(host, "die")

    assert time.monotonic() - began < 20  # not after the retries of a server that may come back
    assert are_gone(running)


def test_a_server_that_does_not_become_healthy_is_told_of_with_its_last_words(tmp_path: Path, pids: Path) -> None:
    fails = [sys.executable, "-c", "import sys; sys.exit('no such flag: --speed {port}')"]
    with (
        closing(Host(spec(fails), tmp_path, load_seconds=60)) as ended,
        pytest.raises(EngineError, match=r"ended with exit code 1; its output ends: no such flag: --speed \d+"),
    ):
        ask(ended, "a")
    with (
        closing(Host(spec([*STUB, str(pids)], health="/ready", start_seconds=3.0), tmp_path, load_seconds=60)) as slow,
        pytest.raises(EngineError, match=r"was not healthy at /ready after 3 s; raise options.start_seconds"),
    ):
        ask(slow, "a")
    assert are_gone(processes(pids))


def test_a_proxy_of_the_environment_is_not_used(tmp_path: Path, pids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with closing(Host(spec([*STUB, str(pids)]), tmp_path, load_seconds=60)) as started:
        assert ask(started, "a") == ["m: A"]


def test_a_program_that_is_not_here_may_be_elsewhere() -> None:
    with pytest.raises(HostLacks, match=r"the program 'no-such-server' of options.command is not installed here"):
        started_server.load(spec(["no-such-server", "{port}"]), lambda: None)


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"command": ["serve"]}, "command must contain {port}"),
        ({"command": []}, "length >= 1"),
        ({"command": ["serve", "{port}"], "health": "ready"}, "health must begin with /"),
        ({"command": ["serve", "{port}"], "env": {"HF_TOKEN": "hf_x"}}, "env contains 'HF_TOKEN'; it would be stored"),
        ({"command": ["serve", "{port}", "--api-key=x"]}, "command contains '--api-key'; it would be stored"),
    ],
)
def test_what_cannot_work_or_must_not_be_stored_is_refused(chosen: dict[str, Any], said: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=said.replace("{", r"\{").replace("}", r"\}")):
        msgspec.convert(chosen, ServerOptions)


def test_the_command_is_part_of_the_teacher_and_how_it_is_awaited_is_not() -> None:
    def key(*flags: str, **options: Any) -> dict[str, Any]:
        command = ["serve", "{model}", "{port}", *flags]
        table = TeacherTable(name="ada", model="m", engine="server", options={"command": command, **options})
        return versions.teacher_identity(table, {("m", None): Identity("commit", None)})

    assert key() == key(start_seconds=60, concurrency=3)
    assert key() != key("--quantization", "fp8")


def test_a_model_in_one_file_is_identified_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF 1")
    first = identify(str(file))
    file.write_bytes(b"GGUF 2")

    assert first.revision is not None
    assert first.revision.startswith("sha256:")
    assert identify(str(file)) != first


def test_checking_a_teacher_starts_its_server_once(tmp_path: Path, pids: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    options = {"command": [*STUB, str(pids)]}
    teacher = TeacherTable(name="ada", model=str(model), engine="server", gpus=0, options=options)

    ((whose, finding),) = teachers.check_one(teacher, [], tmp_path)

    assert (whose, finding.level) == ("ada", "ok")
    assert finding.message.startswith("the server answered after ")
    assert are_gone(processes(pids))
