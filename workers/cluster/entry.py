"""The Celery application for PERSYN_BROKER_URL, as a module for Celery's own tools.

For example: `celery --app persyn.workers.cluster.entry flower`.
"""

from __future__ import annotations

from persyn.settings import Settings
from persyn.workers.cluster.app import make

# Without a running broker, the tool reports that it does not answer.
app = make(Settings.from_environment().broker_url or "redis://127.0.0.1:6379/0")
