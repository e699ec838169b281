"""Ask an engine in this process, and tell responses from failures."""

from __future__ import annotations

from typing import Any

from persyn.llm.protocols import Engine, Failed, Generate, Generated, Result, Sampling


def answer(engine: Engine, *requests: Generate) -> dict[int, Result]:
    engine.submit(requests)
    results: list[Result] = []
    while engine.pending:
        results += engine.step()
    assert len(results) == len(requests)
    return {result.id: result for result in results}


def ask(text: str, request_id: int = 0, seed: int = 0, **how: Any) -> Generate:
    return Generate(request_id, [{"role": "user", "content": text}], Sampling(**how), seed)


def generated(result: Result) -> Generated:
    assert isinstance(result, Generated), result
    return result


def reason(result: Result) -> str:
    assert isinstance(result, Failed), result
    return result.reason
