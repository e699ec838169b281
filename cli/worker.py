"""`persyn worker`: process jobs on some of this host's GPUs."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import click

from persyn.cli.context import broker, store
from persyn.errors import UsageError
from persyn.llm import gpus as gpu_list
from persyn.settings import Settings


@click.command()
@click.option("--gpus", default="none", show_default=True, help="Ids of its GPUs, such as 0,1; none means the CPU.")
@click.option(
    "--models", default="", help="Take only queues whose names contain one of these words, such as qwen,llama."
)
@click.option("--name", help="Its name on this host. Default: derived from its GPUs.")
@click.option("--slots", type=click.Choice(["auto"]), help="auto: all GPUs of this host.")
def worker(gpus: str, models: str, name: str | None, slots: str | None) -> None:
    """Process the jobs of all runs, notified by PERSYN_BROKER_URL; SIGTERM saves results, releases jobs and exits.

    A worker gives each model the GPUs that it needs, and runs as many models at a time as fit: on four GPUs, four
    models of 1 GPU, one model of 4, or one of 2 next to two of 1. It stays on a model until
    it has no waiting jobs, then takes the one with the most waiting work. A model for which too few GPUs are free gets
    its turn. Requires 'persyn dispatch' on some host.

    \b
    persyn worker --slots auto
    persyn worker --gpus 0,1 --models llama-70b
    """
    from persyn.workers.cluster.serve import serve
    from persyn.workers.runner import logs
    from persyn.workers.runner.affinity import Reach

    settings = Settings.from_environment()
    address = broker(settings)
    reach = Reach(_all_gpus() if slots else _ids(gpus), tuple(models.split(",")) if models else ())
    logs.to_json()
    with store(patient=True) as database:
        serve(database, settings, address, reach, name or _default_name(reach.gpus or ()))


def _ids(given: str) -> tuple[str, ...]:
    if given == "none":
        return ()
    if not re.fullmatch(r"[\w-]+(,[\w-]+)*", given):
        raise UsageError(f"--gpus takes ids such as 0,1 or none; got {given!r}")
    return tuple(given.split(","))


def _default_name(gpus: Sequence[str]) -> str:
    # Several CPU workers may run on one host, and the broker needs distinct names.
    return f"gpu-{'-'.join(gpus)}" if gpus else f"cpu-{os.getpid()}"


def _all_gpus() -> tuple[str, ...]:
    gpus = gpu_list.visible()
    if not gpus:
        raise UsageError("no GPU found (nvidia-smi lists none); 'persyn worker' without --slots works on the CPU")
    return gpus
