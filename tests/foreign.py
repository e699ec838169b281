"""Create user modules for tests of custom functions."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest


def write_module(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> str:
    """Write a module with a unique name to the path of this process and its children; return the name."""
    name = f"foreign_{uuid.uuid4().hex[:12]}"
    (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    return name
