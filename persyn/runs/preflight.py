"""Checks before a run is started that cost nothing: what this host and the servers lack."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeAlias

from persyn.config import RunConfig
from persyn.errors import UsageError
from persyn.ingest.versions import Identities
from persyn.llm.identity import hub_silence
from persyn.llm.protocols import Finding
from persyn.runs import start
from persyn.runs.checks import chat_templates, functions, host, servers

Findings: TypeAlias = list[tuple[str, Finding]]
"""Findings, each with the part of the run file that it concerns."""


def identify(config: RunConfig, *, say: Callable[[str], None]) -> Identities:
    """Resolve the versions of a run's models; see `start.identities`.

    say: called with a warning when the hub did not answer.
    """
    found = start.identities(config)
    if hub_silence.cache_info().currsize and (silence := hub_silence()):  # it was asked
        say(f"{silence}; models are taken from local folders and the cache only")
    return found


def check(
    config: RunConfig, *, announce: Callable[[str], AbstractContextManager[None]] = lambda what: nullcontext()
) -> Findings:
    """Check servers, GPUs, memory, chat templates and functions.

    announce: context manager around each group of checks; receives its description.
    """
    with announce("checking GPUs, memory and servers"):
        found = [*servers.check(config), *host.check(config)]
    with announce("rendering chat templates"):
        found += chat_templates.check(config)
    with announce("importing functions"):
        found += functions.check(config)
    return found


def require(findings: Iterable[tuple[str, Finding]]) -> None:
    """Raise `UsageError` if any finding is an error, i.e. would stop the run on this host."""
    errors = [f"{whose}: {finding.message}" for whose, finding in findings if finding.level == "error"]
    if errors:
        raise UsageError(
            errors[0] if len(errors) == 1 else f"{len(errors)} problems would stop the run here: {' | '.join(errors)}"
        )


def warnings(findings: Iterable[tuple[str, Finding]], *, with_errors: bool) -> list[str]:
    """Warnings as text; includes errors if other hosts work the run, since these may not have the problem."""
    said = []
    for whose, finding in findings:
        if finding.level == "warning":
            said.append(f"{whose}: {finding.message}")
        elif with_errors and finding.level == "error":
            said.append(f"{whose}: {finding.message} (checked on this host; workers may differ)")
    return said
