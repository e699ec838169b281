"""Write untrusted text and code into Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from persyn.errors import shorten


def text(value: str) -> str:
    """Escape untrusted text to one line of inert Markdown."""
    line = re.sub(r"([\\`*_{}\[\]()!|~#:@$])", r"\\\1", shorten(value))
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"(?i)\bwww\.", r"www\.", line)


def code(value: str, language: str) -> str:
    """A code block with a fence longer than any in the code."""
    longest = max((len(run) for run in re.findall("`+", value)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{value}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; its cells must be Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
