"""Measure the overhead that PerSyn adds to a server's time: a run against a stub of a chat-completions server.

python -m benchmarks.overhead [--prompts 5000]

Two teachers share one server, with 64 requests in flight. Reports requests per second with a server that answers at
once, compared with a bare client; the share of the ideal time with a server that takes 200 ms on average; and the cost
of `kill -9` halfway.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import psutil

from benchmarks import runs, stub
from persyn.db.connect import Database
from persyn.llm.options import OpenAIOptions
from persyn.llm.protocols import Generate, Sampling
from persyn.llm.teachers import chat_completions

IN_FLIGHT = 64
MEAN_SECONDS = 0.2
CALIBRATION = 8
_TIMEOUT_SECONDS = 600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=5_000)
    parser.add_argument("--only", choices=("rate", "latency", "kill"))
    options = parser.parse_args()
    for name, measure in (("rate", _rate), ("latency", _latency), ("kill", _kill)):
        if options.only in (None, name):
            with tempfile.TemporaryDirectory(prefix="persyn-benchmark-") as folder:
                measure(Path(folder), options.prompts)


def _rate(folder: Path, prompts: int) -> None:
    with stub.serving(0.0) as port:
        bare = [asyncio.run(_bare(port, prompts))]
        times, arrivals = _work(folder, port, prompts)
        bare.append(asyncio.run(_bare(port, prompts)))
    n_requests = prompts - CALIBRATION
    stage = n_requests / runs.seconds(times, "generate", "done")
    flowing = n_requests / (times["done"].timestamp() - arrivals[0])
    print(
        f"no latency, {prompts:,} prompts: {stage:,.0f} requests/s over the generation stage, "
        f"{flowing:,.0f} from its first request to the last commit\n"
        f"  a bare aiohttp client: {bare[0]:,.0f} before, {bare[1]:,.0f} after; "
        f"ratio {stage / (sum(bare) / 2):.2f}, from the first request {flowing / (sum(bare) / 2):.2f}",
        flush=True,
    )


def _latency(folder: Path, prompts: int) -> None:
    with stub.serving(MEAN_SECONDS) as port:
        times, arrivals = _work(folder, port, prompts)
        latencies = stub.asked(port).latency[-len(arrivals) :]
    took, flowing = runs.seconds(times, "generate", "done"), times["done"].timestamp() - arrivals[0]
    ideal, reachable = sum(latencies) / IN_FLIGHT, _schedule(latencies)
    print(
        f"exponential latency of {1e3 * MEAN_SECONDS:.0f} ms, {IN_FLIGHT} in flight: the generation stage took "
        f"{took:.2f} s, {flowing:.2f} s from its first request\n"
        f"  ideal {ideal:.2f} s: {100 * ideal / took:.1f} %, from the first request {100 * ideal / flowing:.1f} %\n"
        f"  a schedule without overhead, including the wait for the last responses, {reachable:.2f} s: "
        f"{100 * reachable / took:.1f} %, from the first request {100 * reachable / flowing:.1f} %",
        flush=True,
    )


def _kill(folder: Path, prompts: int) -> None:
    with stub.serving(MEAN_SECONDS) as port:
        file, url = _prepare(folder, port, prompts)
        with runs.persyn(folder, url, "run", "start", str(file)) as process:
            while len(stub.asked(port).at) < prompts // 2:
                if process.poll() is not None:
                    raise RuntimeError((folder / "output").read_text()[-2000:])
                time.sleep(0.05)
            children = psutil.Process(process.pid).children(recursive=True)
            os.killpg(process.pid, signal.SIGKILL)
            killed = time.time()
            process.wait()
        _await_death(children)
        died = time.time() - killed
        began = time.time()
        with runs.persyn(folder, url, "run", "resume", runs.NAME) as process:
            runs.finish(process, folder, _TIMEOUT_SECONDS)
        seen = stub.asked(port)
    twice = len(seen.which) - len(set(seen.which))
    waited = sum(at <= killed < at + latency for at, latency in zip(seen.at, seen.latency, strict=True))
    late = sum(killed < at < began for at in seen.at)
    first = min(at for at in seen.at if at >= began) - began
    print(
        f"kill -9 at half: {twice} requests sent twice; the server had {waited} in progress, and received {late} more "
        f"in the {1e3 * died:.0f} ms until the engine had exited too\n"
        f"  {first:.2f} s from 'resume' to the next request",
        flush=True,
    )


def _await_death(processes: Sequence[psutil.Process]) -> None:
    deadline = time.monotonic() + 5
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
        if time.monotonic() > deadline:
            raise RuntimeError("an engine outlived its worker")
        time.sleep(0.002)


def _work(folder: Path, port: int, prompts: int) -> tuple[runs.Times, list[float]]:
    """Execute a whole run; return the start of each stage, and the arrival of each request of the generation stage."""
    file, url = _prepare(folder, port, prompts)
    before = len(stub.asked(port).at)
    with runs.persyn(folder, url, "run", "start", str(file)) as process:
        runs.finish(process, folder, _TIMEOUT_SECONDS)
    arrivals = stub.asked(port).at[before + 2 * CALIBRATION :]
    assert len(arrivals) == prompts - CALIBRATION
    database = Database(url)
    times = runs.stages(database)
    database.close()
    return times, arrivals


def _prepare(folder: Path, port: int, prompts: int) -> tuple[Path, str]:
    options = {"base_url": f"http://127.0.0.1:{port}/v1", "concurrency": IN_FLIGHT}
    teachers = [
        {"name": name, "model": "stub", "engine": "openai", "system": f"You are {name}.", "options": options}
        for name in ("ada", "bob")
    ]
    file = runs.write(folder, prompts, teachers, calibration=CALIBRATION, job_prompts=256)
    return file, f"sqlite:///{folder / 'persyn.db'}"


async def _bare(port: int, prompts: int) -> float:
    """Requests per second of coroutines that only send requests."""
    chosen = OpenAIOptions(base_url=f"http://127.0.0.1:{port}/v1")
    bodies = [chat_completions.body("stub", Generate(n, _messages(n), Sampling(), n), chosen) for n in range(prompts)]
    began = time.perf_counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask() -> None:
            while bodies:
                async with session.post(
                    f"http://127.0.0.1:{port}/v1/chat/completions",
                    data=bodies.pop(),
                    headers={"Content-Type": "application/json"},
                ) as response:
                    await response.read()

        await asyncio.gather(*(ask() for _ in range(IN_FLIGHT)))
    return prompts / (time.perf_counter() - began)


def _messages(n: int) -> list[dict[str, str]]:
    return [{"role": "system", "content": "You are ada."}, {"role": "user", "content": runs.question(n)}]


def _schedule(latencies: Sequence[float]) -> float:
    """Ideal duration with every slot refilled at once, in the given order, in seconds."""
    free = [0.0] * IN_FLIGHT
    for latency in latencies:
        heapq.heapreplace(free, free[0] + latency)
    return max(free)


if __name__ == "__main__":
    main()
