"""Load each teacher's model once and inspect it."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from persyn.config import RunConfig, TeacherTable
from persyn.errors import EngineError, UsageError
from persyn.ingest import rows
from persyn.ingest.rows import PromptRow
from persyn.llm import host
from persyn.llm.engines import ENGINES
from persyn.llm.host import Host, HostDied
from persyn.llm.identity import identify, identify_adapter
from persyn.llm.protocols import Check, Checked, Failed, Finding, Generate, ModelSpec, Sampling
from persyn.runs.checks import models, servers
from persyn.stages.answers import opening_of, with_opening

#: The number of longest prompts that are checked against a model's context.
_LONGEST = 64
#: How long a server may be silent while it starts; its own limit is `start_seconds`.
_START_SECONDS = 3600.0


def check(config: RunConfig, home: Path) -> Iterator[tuple[str, Finding]]:
    """Inspect each teacher of a run file in a separate host process; yields (teacher, finding).

    home: the folder for the hosts' logs. Nothing is written to the store or sent to a server.
    """
    prompts = longest_prompts(config)
    for teacher in config.teachers:
        yield from check_one(teacher, prompts, home)


def check_one(teacher: TeacherTable, prompts: Sequence[PromptRow], home: Path) -> Iterator[tuple[str, Finding]]:
    """Inspect one teacher.

    prompts: the prompts that it should be able to answer; see `longest_prompts`.
    """
    for finding in _check(teacher, prompts, home):
        yield teacher.name, finding


def _check(teacher: TeacherTable, prompts: Sequence[PromptRow], home: Path) -> list[Finding]:
    if ENGINES[teacher.engine].model == "server":
        return [servers.seen(ModelSpec(teacher.engine, teacher.model, options=teacher.options))]
    if ENGINES[teacher.engine].model != "weights":
        return [Finding("ok", "load", f"the engine {teacher.engine!r} has no model to check")]
    try:
        if teacher.adapter:
            identify_adapter(teacher.adapter, teacher.adapter_revision)
        identify(teacher.model, teacher.revision)  # reports within seconds what loading would find only after minutes
    except UsageError as error:
        return [Finding("error", "load", str(error))]
    if ENGINES[teacher.engine].starts_server:
        return [_greet(models.of_teacher(teacher), home)]
    opening = opening_of(teacher.system, msgspec.to_builtins(teacher.few_shot))
    spec = models.of_teacher(teacher)
    checker = Host(ModelSpec("check", teacher.model), home)
    try:
        checker.submit(
            [
                Check(
                    0,
                    spec,
                    [with_opening(opening, prompt.messages) for prompt in prompts],
                    teacher.sampling.max_tokens,
                    [prompt.tools for prompt in prompts],
                )
            ]
        )
        while not (results := checker.receive(timeout=1.0)):
            pass
    except (HostDied, EngineError) as death:
        return [Finding("error", "load", str(death))]
    finally:
        checker.close()
    found = results[0]
    assert isinstance(found, Checked)
    return found.findings


def _greet(spec: ModelSpec, home: Path) -> Finding:
    """Start a server and send it one short request; which templates it uses is its own matter."""
    hello = Generate(0, [{"role": "user", "content": "Say hello."}], Sampling(max_tokens=16, temperature=0.0), seed=0)
    began = time.monotonic()
    try:
        (result,) = host.ask(spec, [hello], home, load_seconds=_START_SECONDS, stall_seconds=_START_SECONDS)
    except (HostDied, EngineError) as death:
        return Finding("error", "load", str(death))
    if isinstance(result, Failed) and not result.reason.startswith("empty"):
        return Finding("error", "load", result.reason)
    return Finding("ok", "load", f"the server answered after {time.monotonic() - began:.0f} s")


def longest_prompts(config: RunConfig) -> list[PromptRow]:
    """The longest prompts in a run file's files, the tools that they may call included."""
    good = (row for path in config.prompts.files for row in rows.read(Path(path)) if isinstance(row, PromptRow))
    return heapq.nlargest(_LONGEST, good, key=lambda row: len(row.text) + len(msgspec.json.encode(row.tools)))
