"""Load each teacher's model once and inspect it."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from persyn.config import RunConfig, TeacherTable
from persyn.errors import EngineError, UsageError
from persyn.ingest import rows
from persyn.ingest.rows import PromptRow
from persyn.llm.engines import ENGINES
from persyn.llm.host import Host, HostDied
from persyn.llm.identity import identify
from persyn.llm.protocols import Check, Checked, Finding, ModelSpec
from persyn.runs.checks import servers
from persyn.stages.answers import opening_of, with_opening

#: The number of longest prompts that are checked against a model's context.
_LONGEST = 64


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
        identify(teacher.model, teacher.revision)  # reports within seconds what loading would find only after minutes
    except UsageError as error:
        return [Finding("error", "load", str(error))]
    opening = opening_of(teacher.system, msgspec.to_builtins(teacher.few_shot))
    spec = ModelSpec(teacher.engine, teacher.model, teacher.revision, teacher.gpus, teacher.options)
    host = Host(ModelSpec("check", teacher.model), home)
    try:
        host.submit(
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
        while not (results := host.receive(timeout=1.0)):
            pass
    except (HostDied, EngineError) as death:
        return [Finding("error", "load", str(death))]
    finally:
        host.close()
    found = results[0]
    assert isinstance(found, Checked)
    return found.findings


def longest_prompts(config: RunConfig) -> list[PromptRow]:
    """The longest prompts in a run file's files, the tools that they may call included."""
    good = (row for path in config.prompts.files for row in rows.read(Path(path)) if isinstance(row, PromptRow))
    return heapq.nlargest(_LONGEST, good, key=lambda row: len(row.text) + len(msgspec.json.encode(row.tools)))
