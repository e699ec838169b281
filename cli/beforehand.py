"""What is said before a run is started: what this host and the servers lack, of what can be seen without a cost."""

from __future__ import annotations

from persyn.cli.open import warn
from persyn.cli.waiting import waiting
from persyn.config import RunConfig
from persyn.ingest.versions import Identities
from persyn.runs import preflight
from persyn.settings import Settings


def look_up(config: RunConfig) -> Identities:
    """What a run's models are; see `preflight.identify`."""
    with waiting("looking up models"):
        return preflight.identify(config, say=warn)


def require_fit(config: RunConfig) -> None:
    """Say what would make a run slow here, and raise `UsageError` for what would stop it.

    With a broker it is worked elsewhere, by hosts that may have what this one lacks: then all of it is only said.
    """
    found = preflight.look(config, announce=waiting)
    is_here = Settings.from_environment().broker_url is None
    for text in preflight.warnings(found, with_errors=not is_here):
        warn(text)
    if is_here:
        preflight.require(found)
