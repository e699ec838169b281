"""Import a run's custom functions once, in a separate process, before anything is paid for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

from persyn.config import RunConfig
from persyn.errors import shorten
from persyn.llm.engines import ENGINES
from persyn.llm.protocols import Finding
from persyn.method.strategies import STRATEGIES

_SECONDS = 120.0
_IMPORT = """
import sys
from persyn.errors import PersynError
from persyn.llm.scorers import custom_function
from persyn.llm.protocols import ModelSpec
try:
    custom_function.import_function(ModelSpec("python", sys.argv[1]))
except PersynError as error:
    sys.exit(str(error))
"""


def check(config: RunConfig) -> Iterator[tuple[str, Finding]]:
    """Yield (whose, finding) for each function that cannot be imported."""
    called = [("the quality", scorer.model) for scorer in config.scorers if ENGINES[scorer.kind].model == "function"]
    if STRATEGIES[config.strategy.kind].decided_by == "function":
        called.append(("the strategy", config.strategy.model))
    for whose, model in called:
        if why := _flaw(model):
            yield whose, Finding("error", "load", why)


def _flaw(model: str) -> str:
    """Why "module:function" cannot be imported; empty if it can."""
    # With -P the child searches the same paths as this process and no others.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(part or os.getcwd() for part in sys.path)}
    command = [sys.executable, "-P", "-c", _IMPORT, model]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", check=False, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"importing {model!r} took longer than {_SECONDS:g} s"
    if not done.returncode:
        return ""
    return shorten(done.stderr.strip().rpartition("\n")[2], most=500) or f"importing {model!r} ended the process"
