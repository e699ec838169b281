"""Compare PerSyn on vLLM with bare `LLM.generate`: same prompts, same sampling, tokens per second.

python -m benchmarks.engine [--sides vllm in-process]
    [--prompts 512] [--rounds 2] [--max-tokens 64] [--temperature 0.7] [--gpus 0]

Every request has its own seed. `vllm` is vLLM with its defaults, with the engine core in another process; `in-process`
has the core in the caller's process, like PerSyn on one device. Each measurement runs in its own process and excludes
loading; they alternate, since two engines on one machine would slow each other down. PerSyn's side is complete: an
engine host, the worker's window, and every response committed to SQLite. On a CPU prompts are not split, because vLLM's
default crashes with seeds there.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from benchmarks import runs
from demo import models
from persyn.db.connect import Database
from persyn.db.results import Response
from persyn.llm.protocols import ModelSpec
from persyn.runs import pipeline, run_file
from persyn.settings import Settings
from persyn.workers.runner.listener import Listener
from persyn.workers.runner.worker import Worker

_OPTIONS = {"dtype": "bfloat16", "max_model_len": 1024}


def _options(gpus: int) -> dict[str, Any]:
    return {**_OPTIONS, **({"gpu_memory_utilization": 0.9} if gpus else {"enforce_eager": True})}


def _vllm_options(gpus: int) -> dict[str, Any]:
    on_cpu = {"kv_cache_memory_bytes": 2 * 2**30, "enable_chunked_prefill": False}
    return {**_options(gpus), **({} if gpus else on_cpu)}


class _Clock(Listener):
    """Measures the time from the load of vLLM to its last response, then stops the worker."""

    def __init__(self, prompts: int) -> None:
        self.began = self.ended = 0.0
        self.worker: Worker | None = None
        self._left = prompts
        self._engine = ""

    def loading(self, spec: ModelSpec) -> None:
        """Count only responses of vLLM."""
        self._engine = spec.engine

    def loaded(self, spec: ModelSpec, seconds: float) -> None:
        """Start the clock."""
        self.began = time.monotonic()

    def saved(self, stage: str, done: int, failed: int) -> None:
        """Stop the clock when the last response is committed."""
        self._left -= (done + failed) * (self._engine == "vllm")
        if self._left <= 0 and self.worker is not None:
            self.ended = self.ended or time.monotonic()
            self.worker.stop.set()


def persyn(prompts: int, max_tokens: int, gpus: int, temperature: float) -> None:
    """Have one teacher answer all prompts through the worker; print tokens and seconds."""
    with tempfile.TemporaryDirectory(prefix="persyn-benchmark-") as name:
        folder = Path(name)
        sampling = {"temperature": temperature, "max_tokens": max_tokens}
        model = str(models.smollm2().absolute())
        teacher = {"model": model, "engine": "vllm", "gpus": gpus, "options": _options(gpus)}
        fake = {"name": "other", "model": "other", "engine": "fake"}
        teachers: list[dict[str, Any]] = [{"name": "one", **teacher, "sampling": sampling}, fake]
        # All prompts but one are calibration prompts, so the first stage is the whole measurement.
        file = runs.write(folder, prompts + 1, teachers, calibration=prompts, job_prompts=128)
        store = Database(f"sqlite:///{folder / 'persyn.db'}")
        store.upgrade()
        with store.write() as session:
            run_id = pipeline.start_run(session, run_file.read(file), actor="benchmark").id
        clock = _Clock(prompts)
        clock.worker = Worker(store, Settings(str(store.url), folder), run_id=run_id, listener=clock)
        clock.worker.run()
        with store.read() as session:
            engine = Response.engine.startswith("vllm")
            tokens = session.scalar(select(func.sum(Response.response_tokens)).where(engine))
        store.close()
    print(tokens, clock.ended - clock.began)


def in_process(prompts: int, max_tokens: int, gpus: int, temperature: float) -> None:
    """Like `bare`, with the engine core in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    bare(prompts, max_tokens, gpus, temperature)


def bare(prompts: int, max_tokens: int, gpus: int, temperature: float) -> None:
    """Generate for the same prompts with `LLM.generate`; print tokens and seconds."""
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams, TokensPrompt

    from persyn.llm.chat import Chat, load_tokenizer

    model = str(models.smollm2().absolute())
    chat = Chat(load_tokenizer(ModelSpec("vllm", model)))
    asked = [chat.prompt_ids([{"role": "user", "content": runs.question(n)}]) for n in range(prompts)]
    llm = LLM(model, **_vllm_options(gpus))
    how = {"temperature": temperature, "max_tokens": max_tokens, "stop_token_ids": [chat.end_id]}
    sampling = [SamplingParams(seed=n, **how) for n in range(prompts)]
    began = time.monotonic()
    answers = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in asked], sampling, use_tqdm=False)
    seconds = time.monotonic() - began
    print(sum(len(answer.outputs[0].token_ids) for answer in answers), seconds, flush=True)
    # vLLM may wait for its processes forever at exit; the parent process ends them.
    os._exit(0)


def _measured(command: list[str]) -> list[str]:
    """Run a command, kill its process group, and return the words of its output."""
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen(command, stdout=output, start_new_session=True) as process:
            try:
                failed = process.wait()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        output.seek(0)
        said = output.read().split()
    if failed:
        raise RuntimeError(f"{' '.join(command)} exited with {failed}")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--gpus", type=int, choices=(0, 1), default=0)
    parser.add_argument("--temperature", type=float, default=0.7)
    sides = {"vllm": bare, "in-process": in_process, "persyn": persyn}
    others = [side for side in sides if side != "persyn"]
    parser.add_argument("--sides", nargs="+", choices=others, default=others, help="what PerSyn is compared with")
    parser.add_argument("--side", choices=list(sides), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        sides[options.side](options.prompts, options.max_tokens, options.gpus, options.temperature)
        return
    rates: dict[str, list[float]] = {side: [] for side in (*options.sides, "persyn")}
    for side in list(rates) * options.rounds:
        command = [sys.executable, "-m", "benchmarks.engine", *sys.argv[1:], "--side", side]
        said = _measured(command)
        rates[side].append(int(said[-2]) / float(said[-1]))
        print(
            f"{side:<10} {said[-2]:>7} tokens in {float(said[-1]):6.1f} s: {rates[side][-1]:6.0f} tokens/s", flush=True
        )
    for side in options.sides:
        print(f"PerSyn : {side}: {sum(rates['persyn']) / sum(rates[side]):.3f}")


if __name__ == "__main__":
    main()
