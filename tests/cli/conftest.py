"""Fixtures that run the command line as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import TypeAlias

import pytest

from tests.cli import typed

Persyn: TypeAlias = Callable[..., subprocess.CompletedProcess[str]]

#: Each command runs in a process forked from one that has imported all commands, which saves a second per command.
_forks = get_context("forkserver")
_forks.set_forkserver_preload([typed.__name__])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of the command `persyn`, also for this process."""
    monkeypatch.setenv("PERSYN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PERSYN_DATABASE_URL", raising=False)
    return tmp_path / "home"


@pytest.fixture
def persyn(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Persyn:
    """The command, in its own folder."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("PERSYN_")},
        "PERSYN_HOME": str(tmp_path / "home"),
    }

    def run(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        if any(name.startswith(("HF_", "PYTHON")) for name in extra):  # read when a process starts or imports
            command = [sys.executable, "-m", "persyn.cli", *arguments]
            told = {"env": environment | extra, "cwd": tmp_path, "capture_output": True, "text": True}
            return subprocess.run(command, **told, check=False, timeout=120)
        said = tmp_path_factory.mktemp("said")
        streams = said / "stdout", said / "stderr"
        process = _forks.Process(target=typed.run, args=(arguments, {**environment, **extra}, tmp_path, *streams))
        process.start()
        process.join(timeout=120)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(arguments, 120)
        return subprocess.CompletedProcess(arguments, process.exitcode, *(file.read_text() for file in streams))

    return run
