"""Many workers on many hosts: Celery, the dispatcher, metrics."""
