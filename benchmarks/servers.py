"""Measure how well servers are used: several at once, replicas, and servers that limit their rate.

python -m benchmarks.servers [--only teachers | replicas | restart | storm | batching] [--requests 600]

teachers: a whole run with five teachers behind servers, compared with one of them alone.
replicas: two servers with eight slots each, compared with one.
restart:  one of two servers is killed at a third of the requests, and started again at two thirds.
storm:    a server that allows 50 requests a second and answers the others with HTTP 429.
batching: a server whose latency grows with its load, compared with a client with a fixed number in flight.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import aiohttp

from benchmarks import runs, stub
from persyn.db.connect import Database
from persyn.llm.options import OpenAIOptions
from persyn.llm.protocols import Failed, Generate, ModelSpec, Result, Sampling
from persyn.llm.teachers import chat_completions, chat_server

TEACHERS = ("ada", "bob", "cyd", "dan", "eve")
SECONDS = 0.2
IN_FLIGHT = 4
SLOTS = 8
ALLOWED_PER_SECOND = 50.0
_TIMEOUT_SECONDS = 600.0


def main() -> None:
    measures = {
        "teachers": _teachers,
        "replicas": _replicas,
        "restart": _restart,
        "storm": _storm,
        "batching": _batching,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--only", choices=measures)
    options = parser.parse_args()
    for name, measure in measures.items():
        if options.only in (None, name):
            print(f"{name}: {measure(options.requests)}", flush=True)


def _teachers(requests: int) -> str:
    with stub.serving(SECONDS, is_constant=True) as port:
        alone = _calibration(port, requests, TEACHERS[:1])
        together = _calibration(port, requests, TEACHERS)
    return (
        f"{requests} prompts, {1e3 * SECONDS:.0f} ms, {IN_FLIGHT} in flight: one teacher took {alone:.1f} s, "
        f"{len(TEACHERS)} took {together:.1f} s: {together / alone:.2f} times as long"
    )


def _calibration(port: int, prompts: int, behind_server: Sequence[str]) -> float:
    """Seconds of the stage in which every teacher answers every prompt; two more teachers are fake."""
    options = {"base_url": f"http://127.0.0.1:{port}/v1", "concurrency": IN_FLIGHT}
    teachers = [{"name": name, "model": name, "engine": "openai", "options": options} for name in behind_server]
    teachers += [{"name": name, "model": name, "engine": "fake"} for name in ("fay", "fox")]
    with tempfile.TemporaryDirectory(prefix="persyn-benchmark-") as name:
        folder = Path(name)
        file = runs.write(folder, prompts, teachers, calibration=prompts, job_prompts=256)
        database = Database(f"sqlite:///{folder / 'persyn.db'}")
        with runs.persyn(folder, str(database.url), "run", "start", str(file)) as process:
            runs.finish(process, folder, _TIMEOUT_SECONDS)
        times = runs.stages(database)
        database.close()
    return runs.seconds(times, "calibrate", "score")


def _replicas(requests: int) -> str:
    took = []
    for count in (1, 2):
        with ExitStack() as stack:
            ports = [
                stack.enter_context(stub.serving(SECONDS / 2, is_constant=True, slots=SLOTS)) for _ in range(count)
            ]
            took.append(_ask(ports, requests, concurrency=2 * SLOTS)[1])
    return f"{requests} requests took {took[0]:.2f} s with one, {took[1]:.2f} s with two: {took[0] / took[1]:.2f} times"


def _restart(requests: int) -> str:
    first, again, both = ExitStack(), ExitStack(), ExitStack()
    with first, again, both:
        stays = both.enter_context(stub.serving(SECONDS / 2, slots=SLOTS))
        killed = first.enter_context(stub.serving(SECONDS / 2, slots=SLOTS))
        seen: list[stub.Asked] = []

        def act(done: int) -> None:
            if done >= requests // 3 and not seen:
                seen.append(stub.asked(killed))
                first.close()
            elif done >= 2 * requests // 3 and len(seen) == 1:
                seen.append(seen[0])
                again.enter_context(stub.serving(SECONDS / 2, slots=SLOTS, port=killed))

        results, took = _ask([stays, killed], requests, concurrency=2 * SLOTS, act=act)
        asked = [stub.asked(stays), seen[0], stub.asked(killed)]
    failed = sum(isinstance(result, Failed) for result in results)
    sent = sum(len(each.at) for each in asked)
    return (
        f"{requests} requests took {took:.2f} s: {failed} failed; the servers saw {sent}, of which {2 * SLOTS} may "
        f"have been in flight at the kill; the one that came back answered {len(asked[2].at)}"
    )


def _storm(requests: int) -> str:
    with stub.serving(SECONDS, per_second=ALLOWED_PER_SECOND) as port:
        results, took = _ask([port], requests, concurrency=64)
        rejected = stub.asked(port).rejected
    allowed = (requests - ALLOWED_PER_SECOND) / ALLOWED_PER_SECOND + SECONDS
    failed = sum(isinstance(result, Failed) for result in results)
    return (
        f"{requests} requests took {took:.2f} s, at best {allowed:.2f} s: {100 * allowed / took:.1f} % of what the "
        f"limit allows; {rejected} answers with HTTP 429, {failed} failed rows"
    )


def _batching(requests: int) -> str:
    with stub.serving(SECONDS, doubles_at=16) as port:
        fixed = asyncio.run(_bare(port, requests, 64))
    with stub.serving(SECONDS, doubles_at=16) as port:
        adaptive = _ask([port], requests, concurrency=64)[1]
    return (
        f"{requests} requests took {adaptive:.2f} s, and {fixed:.2f} s with 64 always in flight: "
        f"{100 * fixed / adaptive:.1f} % of that throughput"
    )


def _ask(
    ports: Sequence[int], requests: int, *, concurrency: int, act: Callable[[int], None] = lambda done: None
) -> tuple[list[Result], float]:
    """Have an engine answer some requests; returns the results and the seconds.

    act: called with the number of results so far, whenever it grows.
    """
    options = {"base_url": [f"http://127.0.0.1:{port}/v1" for port in ports], "concurrency": concurrency}
    engine = chat_server.load(ModelSpec("openai", "stub", options=options), lambda: None)
    assert isinstance(engine, chat_server.ChatServerEngine)
    results: list[Result] = []
    began, sent = time.perf_counter(), 0
    while len(results) < requests:
        more = min(engine.window - engine.pending, requests - sent)
        engine.submit([Generate(n, _messages(n), Sampling(), n) for n in range(sent, sent + more)])
        sent += more
        results += engine.step()
        act(len(results))
    took = time.perf_counter() - began
    engine.close()
    return results, took


async def _bare(port: int, requests: int, in_flight: int) -> float:
    """Seconds of coroutines that only send requests."""
    chosen = OpenAIOptions(base_url=f"http://127.0.0.1:{port}/v1")
    bodies = [
        chat_completions.body("stub", Generate(n, _messages(n), Sampling(), n), chosen)
        for n in reversed(range(requests))
    ]
    began = time.perf_counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask() -> None:
            while bodies:
                async with session.post(f"http://127.0.0.1:{port}/v1/chat/completions", data=bodies.pop()) as response:
                    await response.read()

        await asyncio.gather(*(ask() for _ in range(in_flight)))
    return time.perf_counter() - began


def _messages(n: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": runs.question(n)}]


if __name__ == "__main__":
    main()
