"""The command, as a person types it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

Persyn: TypeAlias = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def persyn(tmp_path: Path) -> Persyn:
    """The command, in a folder of its own."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("PERSYN_")},
        "PERSYN_HOME": str(tmp_path / "home"),
    }

    def run(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cli", *arguments],
            env={**environment, **extra},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return run
