"""`persyn doctor`: check this host, the store, the broker and the workers."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from sqlalchemy import func, make_url, select
from sqlalchemy.exc import SQLAlchemyError

from persyn.cli import broker
from persyn.cli.broker import DoctorFinding
from persyn.cli.context import JSON, nobody_takes, show
from persyn.cli.context import broker as broker_url
from persyn.cli.extras import extras
from persyn.cli.waiting import waiting
from persyn.config import RunConfig, load_config
from persyn.dataset.formats import FORMATS
from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.time import now
from persyn.errors import UsageError, shorten
from persyn.ingest import rows
from persyn.jobs import workload
from persyn.jobs.workload import Backlog
from persyn.llm.engines import ENGINES
from persyn.llm.identity import hub_silence
from persyn.method.strategies import STRATEGIES
from persyn.registry import Registry
from persyn.runs import run_file
from persyn.runs.checks import host, servers
from persyn.settings import Settings

if TYPE_CHECKING:
    from persyn.workers.cluster.roll_call import PresentWorker

_FREE_GB = 10
#: The kinds that installed packages can add.
_REGISTRIES: Mapping[str, Registry[Any]] = {"engine": ENGINES, "strategy": STRATEGIES, "format": FORMATS}
#: Clock differences to the database above this are reported.
_SKEW_SECONDS = 5.0
#: File systems (without "fuse.") whose locks do not protect a SQLite file from writers on two hosts.
_NETWORKED = (
    "nfs nfs4 cifs smb smb3 smbfs afs ceph lustre gpfs beegfs glusterfs orangefs pvfs2 ocfs2 gfs2 panfs wekafs "
    "sshfs s3fs gcsfuse rclone goofys juicefs davfs davfs2"
)


@click.command()
@click.argument("config", required=False, type=click.Path(path_type=Path))
@JSON
def doctor(config: Path | None, as_json: bool) -> None:
    """Check packages, store, broker, disk, GPUs and hub; exit 1 when something would stop a run.

    With a run file CONFIG, also read its prompts, and check what that run would lack on this host: keys, servers, GPUs,
    memory.
    """
    settings = Settings.from_environment()
    wanted = run_file.read(config) if config else None
    of_broker = list(broker.look(settings.broker_url)) if settings.broker_url else []
    findings = [
        *_packages(),
        *_plugins(),
        *_transformers(),
        *_store(settings),
        *of_broker,
        *(_workers(settings) if of_broker and all(level != "error" for level, _, _ in of_broker) else ()),
        *_disk(settings),
        *_gpus(),
        *_sandboxes(),
        *_hub(),
        *([*_prompts(wanted), *_lacked(wanted)] if wanted else _on_cpu(settings)),
    ]
    show(("", "what", "found"), findings, as_json=as_json)
    if any(level == "error" for level, _, _ in findings):
        sys.exit(1)


def _packages() -> Iterator[DoctorFinding]:
    for name in ("persyn", "torch", "transformers", "sqlalchemy"):
        yield "ok", name, importlib.metadata.version(name)
    for extra in extras():
        has_it = importlib.util.find_spec(extra.package) is not None
        yield "ok", extra.package, "installed" if has_it else f"not installed; needed for {extra.purpose}"


def _plugins() -> Iterator[DoctorFinding]:
    """Yield each kind that an installed package adds, and what is wrong with one that was left out."""
    for what, registry in _REGISTRIES.items():
        for plugin in registry.plugins:
            about = f"{what} {plugin.name}"
            if plugin.flaw:
                yield "error", about, f"the plug-in of package {plugin.package} was left out: {plugin.flaw}"
            else:
                yield "ok", about, f"from package {plugin.package}"
    groups = {group for registry in _REGISTRIES.values() for group in registry.groups}
    for group in sorted(entry_points().groups):
        if group.startswith("persyn.") and group not in groups:
            yield "error", group, f"no such group of plug-ins; available: {', '.join(sorted(groups))}"


def _transformers() -> Iterator[DoctorFinding]:
    """Check torchvision: transformers imports it if installed, so a mismatch with torch breaks every model."""
    if importlib.util.find_spec("torchvision") is None:
        return
    tried = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False)
    if tried.returncode:
        reason = tried.stderr.strip().splitlines()[-1]
        yield "error", "torchvision", f"clashes with torch ({reason}); pip uninstall torchvision torchaudio torchcodec"


def _store(settings: Settings) -> Iterator[DoctorFinding]:
    try:
        database = Database(settings.database_url)
        if database.engine.dialect.name == "sqlite":
            file, mounts = Path(database.url.database or ""), Path("/proc/mounts")
            kind = file_system(file, mounts.read_text()) if mounts.exists() else ""
            yield from judge_file(file, kind, has_broker=settings.broker_url is not None)
        database.require_head()
        place = database.url.render_as_string(hide_password=True)
        yield "ok", "store", f"{place} at revision {database.revision()}"
        yield from _server(database)
        database.close()
    except UsageError as error:
        yield "error", "store", str(error)
    except (OSError, SQLAlchemyError) as error:  # a folder that cannot be created, or a file that cannot be opened
        place = make_url(settings.database_url).render_as_string(hide_password=True)
        yield "error", "store", f"{place} cannot be opened: {shorten(str(getattr(error, 'orig', error)))}"


def judge_file(file: Path, kind: str, *, has_broker: bool) -> Iterator[DoctorFinding]:
    """Report problems of a SQLite file on this kind of file system."""
    if kind.removeprefix("fuse.") in _NETWORKED.split():
        found = f"{file} is on {kind}, where SQLite may lose data; move it to a local disk, or use PostgreSQL"
        yield "error", "store", found
    if has_broker:
        found = "SQLite can only be shared by the workers of one host; for more hosts use PostgreSQL"
        yield "warning", "store", found


def file_system(file: Path, mounts: str) -> str:
    """The kind of file system that holds a file, from the content of /proc/mounts; "" if unknown."""
    path = file.absolute().resolve()
    kinds = {}
    for line in mounts.splitlines():
        _, point, kind, *_ = line.split(" ")
        # Spaces, tabs, line breaks and backslashes are written as octal escapes.
        kinds[Path(re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), point))] = kind
    return next((kinds[point] for point in (path, *path.parents) if point in kinds), "")


def _server(database: Database) -> Iterator[DoctorFinding]:
    """Report the database's version and clock."""
    is_sqlite = database.engine.dialect.name == "sqlite"
    version = func.sqlite_version() if is_sqlite else func.current_setting("server_version")
    with database.read() as session:
        found = session.scalars(select(version)).one()
        before = datetime.now(UTC)
        at = session.scalars(select(now())).one()
        after = datetime.now(UTC)
    yield "ok", "database", f"{'SQLite' if is_sqlite else 'PostgreSQL'} {found}"
    yield clock(at, before + (after - before) / 2)


def clock(database: datetime, host: datetime) -> DoctorFinding:
    """Compare this host's clock with the database's, which alone determines leases."""
    seconds = (host - database).total_seconds()
    if abs(seconds) <= _SKEW_SECONDS:
        return "ok", "clock", "in agreement with the database's clock"
    side = "ahead of" if seconds > 0 else "behind"
    return "warning", "clock", f"this host's is {abs(seconds):.0f} s {side} the database's; synchronise both with NTP"


def _workers(settings: Settings) -> Iterator[DoctorFinding]:
    """Query the workers of this broker."""
    from persyn.workers.cluster import app, roll_call

    waiting: list[Backlog] = []
    # Errors of the store have been reported already.
    with contextlib.suppress(UsageError, SQLAlchemyError):
        database = Database(settings.database_url)
        with database.read() as session:
            waiting = workload.backlogs(session)
        database.close()
    try:
        present = roll_call.call_roll(app.make(broker_url(settings)))
    except app.BROKER_ERRORS as error:
        yield "warning", "workers", f"cannot be queried ({type(error).__name__}); the broker's user may lack channels"
        return
    yield from judge_workers(present, waiting)


def judge_workers(present: Sequence[PresentWorker], waiting: Sequence[Backlog]) -> Iterator[DoctorFinding]:
    """Report which workers respond, whether their versions agree, and which queues no worker serves."""
    from persyn.workers.cluster import roll_call

    if not present:
        yield "warning", "workers", "no worker answers; start 'persyn worker' on the hosts that should work"
        return
    yield "ok", "workers", ", ".join(worker.host for worker in present)
    if {worker.version for worker in present} != {roll_call.version()}:
        found = ", ".join(f"{worker.host} {worker.version}" for worker in present)
        yield (
            "warning",
            "worker versions",
            f"not all have version {roll_call.version()} like this host: {found}; install the same version everywhere",
        )
    for backlog in roll_call.untaken([queued for queued in waiting if not queued.workers], present):
        yield "warning", "queue", nobody_takes(backlog)


def _disk(settings: Settings) -> Iterator[DoctorFinding]:
    try:
        settings.home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        yield (
            "error",
            "PERSYN_HOME",
            f"{settings.home} cannot be created: {error.strerror}; set PERSYN_HOME to another folder",
        )
        return
    if not os.access(settings.home, os.W_OK):
        yield "error", "PERSYN_HOME", f"{settings.home} is not writable"
    free = shutil.disk_usage(settings.home).free / 1e9
    level = "ok" if free > _FREE_GB else "warning"
    yield level, "PERSYN_HOME", f"{settings.home}, {free:.0f} GB free"


def _gpus() -> Iterator[DoctorFinding]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        yield "ok", "GPUs", "none found (no nvidia-smi); models run on the CPU: gpus = 0"
        return
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    yield "ok" if listed.returncode == 0 else "error", "GPUs", "; ".join(listed.stdout.strip().splitlines())
    if listed.returncode == 0:
        yield "ok", "GPUs", "student, quality and router still run on the CPU unless they have gpus = 1"


def _sandboxes() -> Iterator[DoctorFinding]:
    """Report the kinds of scorers that do not work on this host; a run that uses one is an error of its own."""
    for name, kind in ENGINES.items():
        if kind.lacks is not None:
            lack = kind.lacks({})
            yield "ok", f"quality {name}", f"not possible here: {lack}" if lack else "its sandbox holds"


def _prompts(wanted: RunConfig) -> Iterator[DoctorFinding]:
    """Read the prompt files of a run to the end."""
    for file in wanted.prompts.files:
        path, n_rows, n_bad, first = Path(file), 0, 0, ""
        try:
            with waiting(f"reading {path.name}"):
                for row in rows.read(path):
                    n_rows += 1
                    if isinstance(row, rows.BadRow):
                        n_bad, first = n_bad + 1, first or str(row)
        except UsageError as error:
            yield "error", "prompts", str(error)
            continue
        if n_bad:
            yield "error", "prompts", f"{n_bad:,} of {n_rows:,} rows cannot be imported, the first: {first}"
        else:
            yield "ok", "prompts", f"{n_rows:,} rows in {path.name}"


def _lacked(wanted: RunConfig) -> Iterator[DoctorFinding]:
    """Report what a run would lack on this host."""
    with waiting("checking GPUs, memory and servers"):
        found = [*servers.check(wanted), *host.check(wanted)]
    for whose, finding in found:
        yield finding.level, whose, finding.message


def _on_cpu(settings: Settings) -> Iterator[DoctorFinding]:
    """Report models of running runs that use the CPU of a host with GPUs."""
    with contextlib.suppress(UsageError, SQLAlchemyError, OSError):  # errors of the store have been reported already
        database = Database(settings.database_url)
        if database.is_there():
            with database.read() as session:
                running = session.execute(select(Run.name, Run.config).where(Run.state == RunState.RUNNING)).all()
            for name, config in running:
                for whose, finding in host.on_cpu(load_config(config)):
                    yield finding.level, f"run {name}", f"{whose}: {finding.message}"
        database.close()


def _hub() -> Iterator[DoctorFinding]:
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        yield "ok", "model hub", "disabled: only local folders and the cache are used"
        return
    with waiting("asking the model hub"):
        silence = hub_silence()
    if silence:
        yield "warning", "model hub", f"{silence}; models are taken from local folders and the cache only"
    else:
        yield "ok", "model hub", "reachable; used when a model is not local"
