"""`persyn worker`: work jobs on some of this host's GPUs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

import click

from cli.open import broker, store
from persyn.errors import UsageError
from persyn.llm import gpus as gpu_list
from persyn.settings import Settings


@click.command()
@click.option("--gpus", default="none", show_default=True, help="Ids of the GPUs it works with, as 0,1; none: the CPU.")
@click.option("--models", default="", help="Take only queues whose name has one of these words, as qwen,llama.")
@click.option("--name", help="What it is called on its host; the default names its GPUs.")
@click.option("--slots", type=click.Choice(["auto"]), help="auto: one worker for each GPU of this host.")
def worker(gpus: str, models: str, name: str | None, slots: str | None) -> None:
    """Work the jobs of all runs, woken by PERSYN_BROKER_URL; SIGTERM saves, gives back and ends.

    A worker stays on its model until nothing of it waits, then takes the model with the most
    waiting work that fits its GPUs. Needs 'persyn dispatch' on some host.

    \b
    persyn worker --slots auto
    persyn worker --gpus 0,1 --models llama-70b
    """
    if slots:
        sys.exit(_one_for_each(gpu_list.ids(), models))
    from workers import logs
    from workers.affinity import Reach
    from workers.serve import serve

    settings = Settings.from_environment()
    address = broker(settings)
    reach = Reach(_ids(gpus), tuple(models.split(",")) if models else ())
    logs.to_json()
    with store(patient=True) as database:
        serve(database, settings, address, reach, name or _default_name(reach.gpus or ()))


def _ids(given: str) -> tuple[str, ...]:
    if given == "none":
        return ()
    if not re.fullmatch(r"[\w-]+(,[\w-]+)*", given):
        raise UsageError(f"--gpus takes ids as 0,1 or none, got {given!r}")
    return tuple(given.split(","))


def _default_name(gpus: Sequence[str]) -> str:
    # Several CPU workers may run on one host, and a broker wants them told apart.
    return f"gpu-{'-'.join(gpus)}" if gpus else f"cpu-{os.getpid()}"


def _one_for_each(gpus: Sequence[str], models: str) -> int:
    """A worker process for each GPU; returns the worst exit code when all are over.

    What ends this one ends them; so does the death of one, so that whoever supervises starts all anew.
    """
    if not gpus:
        raise UsageError("no GPU is seen (nvidia-smi lists none); 'persyn worker' alone works on the CPU")
    command = [sys.executable, "-m", "cli", "worker", "--models", models]
    # Each in a session of its own: a Ctrl-C on the terminal reaches it once, from here.
    workers = [subprocess.Popen([*command, "--gpus", gpu], start_new_session=True) for gpu in gpus]

    def end_all(number: int = 0, frame: FrameType | None = None) -> None:
        for process in workers:
            process.send_signal(signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_all)
    while all(process.poll() is None for process in workers):
        time.sleep(1)
    end_all()
    return max(abs(process.wait()) for process in workers)
