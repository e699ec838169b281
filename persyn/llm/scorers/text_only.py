"""What a scorer that reads texts does with a response that has none, because it calls tools."""

from __future__ import annotations

from persyn.llm.protocols import Failed, Judge


def refusal(request: Judge) -> Failed | None:
    """The failure of a response that consists of calls; None if it has a text."""
    if not request.tool_calls or request.response.strip():
        return None
    return Failed(request.id, "tool_calls: the response calls a tool and has no text to score")
