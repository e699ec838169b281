"""Helpers of the studies: the command line on a separate store, and tables in a page."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from persyn.method.intervals import Vector

_BEGIN, _END = "<!-- tables: begin -->", "<!-- tables: end -->"


def persyn(home: Path, *arguments: str) -> None:
    """Run a command on the store in a folder; raise `CalledProcessError` on failure."""
    environment = {key: value for key, value in os.environ.items() if key != "PERSYN_DATABASE_URL"}
    environment |= {"PERSYN_HOME": str(home.resolve()), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "persyn.cli", *arguments], env=environment, check=True)


def put(page: Path, made: str) -> None:
    """Replace the tables in a page."""
    text = page.read_text()
    before, after = text.partition(_BEGIN)[0], text.partition(_END)[2]
    page.write_text(f"{before}{_BEGIN}\n\n{made}{_END}{after}")


def tables(page: Path) -> str:
    """The tables in a page."""
    return page.read_text().partition(_BEGIN)[2].partition(_END)[0].lstrip("\n")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) + "\n\n"


def error(values: Vector) -> float:
    """Half the 95% interval of the mean over seeds (Student's t); 0 for one seed, which has no interval."""
    from scipy.stats import t

    n = len(values)
    return float(t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0
