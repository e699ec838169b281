"""Configure Celery for jobs that last hours: messages carry only job ids and may be lost.

A message only wakes an idle worker; the database decides what the worker does.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence

import kombu.exceptions
import redis
from celery import Celery
from kombu import Exchange, Queue

from persyn.errors import UsageError

#: Errors of an unavailable broker: kombu wraps only some of the client's errors.
BROKER_ERRORS = (kombu.exceptions.OperationalError, redis.RedisError, OSError)
#: The only task.
TASK = "persyn.work"
#: A broker redelivers a message that is not acknowledged within this time; ours are acknowledged before work begins.
_VISIBILITY_SECONDS = 3600


def make(broker_url: str) -> Celery:
    """Create the application for one broker; `UsageError` unless it speaks Redis' protocol."""
    if not broker_url.startswith(("redis://", "rediss://")):
        scheme = broker_url.partition(":")[0]
        raise UsageError(f"PERSYN_BROKER_URL must be redis://host:port/db or rediss://..., got {scheme!r}")
    app = Celery("persyn", broker=broker_url, set_as_current=False)
    if broker_url.startswith("rediss://") and "ssl_cert_reqs" not in broker_url:
        # By default any certificate would be accepted.
        app.conf.broker_use_ssl = {"ssl_cert_reqs": ssl.CERT_REQUIRED}
    app.conf.update(
        # Only JSON is accepted and no results are kept: they are in the store.
        task_serializer="json",
        accept_content=["json"],
        result_backend=None,
        task_ignore_result=True,
        # Acknowledge each message at once: recovery relies on leases, not on the broker.
        task_acks_late=False,
        task_reject_on_worker_lost=False,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        visibility_timeout=_VISIBILITY_SECONDS,
        # Wait for an unavailable broker.
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,  # raised, for example, by a broker that is out of memory
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


def notify(app: Celery, queue: str, job_ids: Sequence[int], *, most: int) -> Sequence[int]:
    """Send messages for jobs of a queue until it holds `most`; return the ids of the jobs they were sent for.

    Raises one of `STORE_ERRORS` when the broker does not answer.
    """
    with app.producer_pool.acquire(block=True) as producer:
        declared = Queue(queue, Exchange(queue), routing_key=queue)(producer.channel)
        declared.declare()
        room = max(0, most - declared.queue_declare().message_count)
        sent = job_ids[:room]
        for job_id in sent:
            app.send_task(TASK, kwargs={"job_id": job_id}, queue=queue, producer=producer, retry=False)
    return sent
