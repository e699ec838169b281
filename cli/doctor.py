"""`persyn doctor`: can this machine do the work?"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import TypeAlias

import click

from cli.open import JSON, show
from persyn.db.connect import Database
from persyn.errors import UsageError
from persyn.settings import Settings

Finding: TypeAlias = tuple[str, str, str]
"""(ok | warning | error, what was looked at, what was found and what to do)."""

_FREE_GB = 10
#: Packages a run may rest on, with what each is for.
_OPTIONAL = {"vllm": "vllm teachers", "psycopg": "PostgreSQL", "peft": 'tune = "lora"'}


@click.command()
@JSON
def doctor(as_json: bool) -> None:
    """Check packages, store, disk and GPUs; exit 1 when something would stop a run."""
    settings = Settings.from_environment()
    findings = [*_packages(), *_transformers(), *_store(settings), *_disk(settings), *_gpus(), *_hub()]
    show(("", "what", "found"), findings, as_json=as_json)
    if any(level == "error" for level, _, _ in findings):
        sys.exit(1)


def _packages() -> Iterator[Finding]:
    for name in ("persyn", "torch", "transformers", "sqlalchemy"):
        yield "ok", name, importlib.metadata.version(name)
    for name, purpose in _OPTIONAL.items():
        has_it = importlib.util.find_spec(name) is not None
        yield "ok", name, "installed" if has_it else f"not installed; needed for {purpose}"


def _transformers() -> Iterator[Finding]:
    """A torchvision that does not fit torch spoils every model: transformers imports it when it is there."""
    if importlib.util.find_spec("torchvision") is None:
        return
    tried = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False)
    if tried.returncode:
        reason = tried.stderr.strip().splitlines()[-1]
        yield "error", "torchvision", f"does not fit torch ({reason}); pip uninstall torchvision torchaudio torchcodec"


def _store(settings: Settings) -> Iterator[Finding]:
    try:
        database = Database(settings.database_url)
        database.require_head()
        place = database.url.render_as_string(hide_password=True)
        yield "ok", "store", f"{place} at revision {database.revision()}"
        database.close()
    except UsageError as error:
        yield "error", "store", str(error)


def _disk(settings: Settings) -> Iterator[Finding]:
    settings.home.mkdir(parents=True, exist_ok=True)
    if not os.access(settings.home, os.W_OK):
        yield "error", "PERSYN_HOME", f"{settings.home} cannot be written"
    free = shutil.disk_usage(settings.home).free / 1e9
    level = "ok" if free > _FREE_GB else "warning"
    yield level, "PERSYN_HOME", f"{settings.home}, {free:.0f} GB free"


def _gpus() -> Iterator[Finding]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        yield "ok", "GPUs", "none seen (no nvidia-smi); models run on the CPU: gpus = 0"
        return
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    yield "ok" if listed.returncode == 0 else "error", "GPUs", "; ".join(listed.stdout.strip().splitlines())


def _hub() -> Iterator[Finding]:
    is_off = os.environ.get("HF_HUB_OFFLINE") == "1"
    yield (
        "ok",
        "model hub",
        "switched off: only local folders and the cache" if is_off else "asked when a model is not local",
    )
