"""Run many workers on many hosts: Celery, the dispatcher, metrics."""
