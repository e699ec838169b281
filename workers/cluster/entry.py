"""The Celery application of PERSYN_BROKER_URL, for tools that take a module.

As in `celery --app persyn.workers.cluster.entry flower`.
"""

from __future__ import annotations

from persyn.settings import Settings
from persyn.workers.cluster.app import make

# Without a broker the tool says that none answers.
app = make(Settings.from_environment().broker_url or "redis://127.0.0.1:6379/0")
