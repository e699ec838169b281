"""What would spoil a run, found before it begins: each teacher's model is loaded once and looked over."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from persyn.config import RunConfig, TeacherTable
from persyn.errors import EngineError
from persyn.llm.host import Host, HostDied
from persyn.llm.protocols import Check, Checked, Finding, Message, ModelSpec
from persyn.stages import rows
from persyn.stages.answers import opening_of, with_opening
from persyn.stages.rows import Row

#: So many of the longest prompts are held against a model's context.
_LONGEST = 64


def check(config: RunConfig, home: Path) -> Iterator[tuple[str, Finding]]:
    """Look over each teacher of a run file, in a host of its own; yields (teacher, finding).

    home: the folder for the hosts' logs. Nothing is written to the store, nothing sent to a server.
    """
    prompts = _longest_prompts(config.prompts.file)
    for teacher in config.teachers:
        for finding in _check(teacher, prompts, home):
            yield teacher.name, finding


def _check(teacher: TeacherTable, prompts: Sequence[list[Message]], home: Path) -> list[Finding]:
    opening = opening_of(teacher.system, msgspec.to_builtins(teacher.few_shot))
    spec = ModelSpec(teacher.engine, teacher.model, teacher.revision, teacher.gpus, teacher.options)
    host = Host(ModelSpec("check", teacher.model), home)
    try:
        host.submit(
            [Check(0, spec, [with_opening(opening, prompt) for prompt in prompts], teacher.sampling.max_tokens)]
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


def _longest_prompts(files: str | Sequence[str]) -> list[list[Message]]:
    paths = [files] if isinstance(files, str) else files
    good = (row for path in paths for row in rows.read(Path(path)) if isinstance(row, Row))
    longest = heapq.nlargest(_LONGEST, good, key=lambda row: len(row.text))
    return [[*(row.history or []), {"role": "user", "content": row.text}] for row in longest]
