"""Modules of somebody else's, for tests of what PerSyn calls and did not write."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest


def write_module(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> str:
    """A module of its own name on the path of this process and of those it starts; returns the name."""
    name = f"foreign_{uuid.uuid4().hex[:12]}"
    (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    return name
