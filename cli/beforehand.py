"""Check before the start of a run what this host and the servers lack, at no cost."""

from __future__ import annotations

from collections.abc import Iterable

from persyn.cli.open import warn
from persyn.cli.waiting import waiting
from persyn.config import RunConfig
from persyn.errors import UsageError
from persyn.ingest.versions import Identities
from persyn.llm.identity import hub_silence
from persyn.llm.protocols import Finding
from persyn.runs import start
from persyn.runs.checks import chat_templates, functions, host, servers
from persyn.settings import Settings


def look_up(config: RunConfig) -> Identities:
    """The identities of a run's models; see `start.identities`."""
    with waiting("looking up models"):
        found = start.identities(config)
    if hub_silence.cache_info().currsize and (silence := hub_silence()):  # the hub was contacted
        warn(f"{silence}; models come from local folders and the cache alone")
    return found


def require_fit(config: RunConfig) -> None:
    """Warn about what would slow a run down here, and raise `UsageError` for what would stop it.

    With a broker, other hosts work the run and may have what this one lacks, so errors become warnings.
    """
    with waiting("looking at GPUs, memory and servers"):
        found = [*servers.look(config), *host.look(config)]
    with waiting("rendering chat templates"):
        found += chat_templates.look(config)
    with waiting("importing functions"):
        found += functions.look(config)
    is_here = Settings.from_environment().broker_url is None
    errors = [f"{whose}: {finding.message}" for whose, finding in found if finding.level == "error"]
    _warn(found, with_errors=not is_here)
    if errors and is_here:
        raise UsageError(
            errors[0] if len(errors) == 1 else f"{len(errors)} things would stop the run here: {' | '.join(errors)}"
        )


def _warn(found: Iterable[tuple[str, Finding]], *, with_errors: bool) -> None:
    for whose, finding in found:
        if finding.level == "warning":
            warn(f"{whose}: {finding.message}")
        elif with_errors:
            warn(f"{whose}: {finding.message} (seen from this host; workers may fare better)")
