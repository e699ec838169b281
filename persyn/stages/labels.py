"""A prompt's labels in the fields that a router reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from persyn.db.catalog import Prompt

#: Stands for the file or the source that a prompt came from.
SOURCE = "source"
#: The columns that `labels` reads; select them together.
LABELLED = (Prompt.meta, Prompt.source)


def labels(prompt: Any, fields: Sequence[str]) -> dict[str, str | None]:
    """The label of each field; None where the prompt's row has none.

    prompt: a row with the columns `LABELLED`. A value that is not text is its JSON.
    """
    return {name: prompt.source if name == SOURCE else _label(prompt.meta.get(name)) for name in fields}


def _label(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value or None
    return msgspec.json.encode(value, order="sorted").decode()
