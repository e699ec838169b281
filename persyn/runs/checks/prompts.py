"""Look at a run file's prompts before they are imported."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from persyn.config import RunConfig
from persyn.errors import PersynError
from persyn.ingest import rows
from persyn.ingest.rows import PromptRow

#: Rows of each file that are looked at; reading all of a large file takes long.
_FIRST = 1_000


def have_tools(config: RunConfig) -> bool:
    """Whether any of the first rows of the prompts' files has tools; False if a file cannot be read."""
    try:
        first = (row for path in config.prompts.files for row in islice(rows.read(Path(path)), _FIRST))
        return any(isinstance(row, PromptRow) and row.tools is not None for row in first)
    except (PersynError, OSError):
        return False  # reported when the prompts are imported
