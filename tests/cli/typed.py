"""Run a command in this process, forked from one that has imported every command."""

from __future__ import annotations

import atexit
import importlib
import os
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import persyn.cli
from persyn.cli.main import main

for module in pkgutil.iter_modules(persyn.cli.__path__):
    if module.name != "__main__":
        importlib.import_module(f"persyn.cli.{module.name}")
# Modules that commands import lazily.
importlib.import_module("alembic.command")
importlib.import_module("pyarrow.pandas_compat")
importlib.import_module("transformers.models.auto.tokenization_auto")


def run(arguments: Sequence[str], environment: Mapping[str, str], folder: Path, stdout: Path, stderr: Path) -> None:
    """Run `persyn arguments`, with its output in two files."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for stream, file in ((1, stdout), (2, stderr)):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), stream)
    sys.argv = ["persyn", *arguments]
    try:
        main()
    finally:
        atexit._run_exitfuncs()
