"""Every benchmark runs at its smallest size and prints its measurements."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

QUICK = {
    "assign": (
        ["--sizes", "300", "--teachers", "4", "--databases", "sqlite", "--cases", "2"],
        "gap to the exact optimum",
    ),
    "balance": (["--small", "--teachers", "2"], "generate"),
    "naive_celery": (["--prompts", "40"], "prompts"),
    "overhead": (["--prompts", "40", "--only", "rate"], "requests/s"),
    "queue": (["--prompts", "300", "--parts", "enqueue"], "s"),
    "router": (["--teachers", "2"], "times"),
    "servers": (["--requests", "60", "--only", "replicas"], "times"),
    "size": (["--sizes", "300", "--teachers", "2", "--databases", "sqlite", "--steps", "run"], "whole run"),
    "store": (
        ["--sizes", "60", "--teachers", "2", "--calibration", "20", "--databases", "sqlite"],
        "sqlite, 2 teachers, 256 prompts per job",
    ),
    "web": (["--prompts", "300", "--databases", "sqlite", "--repeats", "1"], "within"),
}
HEAVY = {
    "score": (["--rows", "2", "--rounds", "1"], "PerSyn"),
    # The other side, vLLM in two processes, differs in an environment variable alone, and takes half a minute.
    "engine": (
        ["--sides", "in-process", "--prompts", "2", "--rounds", "1", "--max-tokens", "2"],
        "PerSyn : in-process: ",
    ),
}


def start(name: str, arguments: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", QUICK)
def test_a_benchmark_starts(name: str) -> None:
    arguments, says = QUICK[name]

    assert says in start(name, arguments)


@pytest.mark.timeout(600)
@pytest.mark.model
@pytest.mark.vllm
@pytest.mark.parametrize("name", HEAVY)
def test_a_benchmark_of_models_starts(name: str, smollm2: Path) -> None:
    arguments, says = HEAVY[name]

    assert says in start(name, arguments)


def test_every_benchmark_is_started_here() -> None:
    programs = {path.stem for path in Path("benchmarks").glob("*.py") if "argparse" in path.read_text()}

    assert programs == {*QUICK, *HEAVY}
