"""Check before the start of a run what this host and the servers lack, at no cost."""

from __future__ import annotations

from persyn.cli.context import warn
from persyn.cli.waiting import waiting
from persyn.config import RunConfig
from persyn.ingest.versions import Identities
from persyn.runs import preflight
from persyn.settings import Settings


def look_up(config: RunConfig) -> Identities:
    """The identities of a run's models; see `preflight.identify`."""
    with waiting("looking up models"):
        return preflight.identify(config, say=warn)


def require_fit(config: RunConfig) -> None:
    """Warn about what would slow a run down here, and raise `UsageError` for what would stop it.

    With a broker, other hosts work the run and may have what this one lacks, so errors become warnings.
    """
    found = preflight.check(config, announce=waiting)
    is_here = Settings.from_environment().broker_url is None
    for text in preflight.warnings(found, with_errors=not is_here):
        warn(text)
    if is_here:
        preflight.require(found)
