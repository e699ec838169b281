"""Prepare the demo under build/ and start or resume its run: `python -m demo [transformers | vllm]`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from demo import models, prompts

FOLDER = Path("build/demo")


def main() -> None:
    """Write the run's files on first use, then call `persyn run start`."""
    engine = sys.argv[1] if len(sys.argv) > 1 else "transformers"
    if engine not in ("transformers", "vllm"):
        sys.exit(f"error: ENGINE is transformers or vllm, got {engine!r}")
    models.smollm2()
    models.gemma()
    FOLDER.mkdir(parents=True, exist_ok=True)
    prompts.write(FOLDER / "prompts.jsonl")
    run_file = FOLDER / f"run-{engine}.toml"
    run_file.write_text(_run_file(engine))
    # Each engine has its own store, so that the two can be compared.
    home = (FOLDER / engine).absolute()
    environment = {**os.environ, "PERSYN_HOME": str(home), "PERSYN_DATABASE_URL": f"sqlite:///{home}/persyn.db"}
    environment |= {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "persyn.cli"]
    if (home / "persyn.db").exists():  # perhaps of an earlier version
        subprocess.run([*command, "db", "upgrade"], env=environment, check=True)
    sys.exit(subprocess.run([*command, "run", "start", str(run_file)], env=environment, check=False).returncode)


def _run_file(engine: str) -> str:
    """The run file with its teachers on this engine."""
    text = prompts.RUN_FILE.read_text()
    return text.replace('engine = "transformers"', f'engine = "{engine}"')


if __name__ == "__main__":
    main()
