"""Leases are renewed only for workers that make progress."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
from sqlalchemy import select

from persyn.db.connect import Database
from persyn.db.work import Job, JobState
from persyn.jobs import queue
from persyn.jobs.queue import Claim
from persyn.workers.runner.heartbeat import Leases
from tests.factories import make_job, make_run

LEASE = timedelta(seconds=0.6)


@pytest.fixture
def claim(database: Database) -> Claim:
    """A job held for `LEASE`."""
    with database.write() as session:
        make_job(session, make_run(session).id)
    with database.write() as session:
        claim = queue.claim(session, owner="me", lease=LEASE)
    assert claim is not None
    return claim


def state_after_sweep(database: Database, claim: Claim) -> JobState:
    with database.write() as session:
        queue.sweep(session, actor="dispatcher")
    with database.read() as session:
        return session.scalars(select(Job.state).where(Job.id == claim.id)).one()


def test_a_job_is_kept_as_long_as_its_worker_goes_on(database: Database, claim: Claim) -> None:
    with Leases(database, LEASE, patience_seconds=0.5) as leases:
        leases.add(claim)
        for _ in range(15):
            leases.alive()
            time.sleep(0.1)
        assert state_after_sweep(database, claim) is JobState.RUNNING
        assert not leases.lost()


def test_a_worker_that_stands_still_loses_its_jobs_to_others(database: Database, claim: Claim) -> None:
    with Leases(database, LEASE, patience_seconds=0.5) as leases:
        leases.add(claim)
        leases.alive()
        time.sleep(1.5)
        assert state_after_sweep(database, claim) is JobState.QUEUED

        leases.alive()
        leases.beat()
        assert leases.lost() == {claim.id}
