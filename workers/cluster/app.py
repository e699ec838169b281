"""Celery, set up for jobs that last hours: what it carries is a job's id, and losing all of it loses nothing.

A message only tells an idle worker that there is something to do; what, the database says.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence

import kombu.exceptions
import redis
from celery import Celery
from kombu import Exchange, Queue

from persyn.errors import UsageError

#: What a broker that is away raises: kombu wraps some of the client's errors, not all.
AWAY = (kombu.exceptions.OperationalError, redis.RedisError, OSError)
#: The one task there is.
TASK = "persyn.work"
#: A broker gives a message out again that was not acknowledged for so long. Ours are, before work begins.
_VISIBILITY_SECONDS = 3600


def make(broker_url: str) -> Celery:
    """The application for one broker; `UsageError` unless it speaks Redis' protocol."""
    if not broker_url.startswith(("redis://", "rediss://")):
        scheme = broker_url.partition(":")[0]
        raise UsageError(f"PERSYN_BROKER_URL must be redis://host:port/db or rediss://..., got {scheme!r}")
    app = Celery("persyn", broker=broker_url, set_as_current=False)
    if broker_url.startswith("rediss://") and "ssl_cert_reqs" not in broker_url:
        # Left unsaid, any certificate would do.
        app.conf.broker_use_ssl = {"ssl_cert_reqs": ssl.CERT_REQUIRED}
    app.conf.update(
        # Nothing but JSON is read or sent, and no result is kept: the store has it.
        task_serializer="json",
        accept_content=["json"],
        result_backend=None,
        task_ignore_result=True,
        # Acknowledged at once, one at a time: recovery is the lease's work, never the broker's.
        task_acks_late=False,
        task_reject_on_worker_lost=False,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        visibility_timeout=_VISIBILITY_SECONDS,
        # A broker that is away is waited for.
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,  # as one that is out of memory raises
        broker_transport_options={
            "visibility_timeout": _VISIBILITY_SECONDS,
            "socket_timeout": 15,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 10,
            "global_keyprefix": "persyn:",
        },
        task_default_queue="persyn",
        worker_send_task_events=True,
        task_send_sent_event=True,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
    )
    return app


def ring(app: Celery, queue: str, job_ids: Sequence[int], *, most: int) -> Sequence[int]:
    """Send a message for jobs of a queue, while fewer than `most` lie there; return those that were sent.

    Raises one of `AWAY` when the broker does not answer.
    """
    with app.producer_pool.acquire(block=True) as producer:
        declared = Queue(queue, Exchange(queue), routing_key=queue)(producer.channel)
        declared.declare()
        room = max(0, most - declared.queue_declare().message_count)
        sent = job_ids[:room]
        for job_id in sent:
            app.send_task(TASK, kwargs={"job_id": job_id}, queue=queue, producer=producer, retry=False)
    return sent
