"""Fixtures that run engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from persyn.llm.protocols import Engine, Request, Result


@pytest.fixture
def work() -> Callable[[Engine, Sequence[Request]], list[Result]]:
    """Run an engine on requests; results in the order of the requests."""

    def answer(engine: Engine, requests: Sequence[Request]) -> list[Result]:
        engine.submit(requests)
        results: dict[int, Result] = {}
        while engine.pending:
            results |= {result.id: result for result in engine.step()}
        return [results[request.id] for request in requests]

    return answer


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder as working directory of engines, where router features are cached."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
