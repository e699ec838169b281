"""What a worker reports about its jobs in its log and to OpenTelemetry."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import func, select

from persyn.db.connect import Database
from persyn.db.work import Event, Job, JobState
from persyn.runs import pipeline, run_file
from persyn.settings import Settings
from persyn.workers.runner.worker import Worker
from tests.run_files import write_run

SECRET = "plus"  # a word of every prompt


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    # A process can have only one provider.
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


def work(folder: Path, **options: object) -> Database:
    store = Database(f"sqlite:///{folder / 'persyn.db'}")
    store.upgrade()
    with store.write() as session:
        pipeline.start_run(session, run_file.read(write_run(folder, options=options)), actor="me")
    Worker(store, Settings(str(store.url), folder), run_id=1).run()
    return store


def attribute(span: ReadableSpan, name: str) -> object:
    assert span.attributes is not None
    return span.attributes[f"persyn.{name}"]


def test_each_claim_is_a_span_and_two_lines_of_the_log(
    tmp_path: Path, exporter: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    exporter.clear()
    with caplog.at_level(logging.INFO, logger="persyn.workers"):
        store = work(tmp_path)
    with store.read() as session:
        claimed = Event.job_id.is_not(None), Event.to_state == JobState.RUNNING
        claims = session.scalars(select(func.count()).where(*claimed)).one()
        jobs = {(job.id, job.stage, job.fence) for job in session.scalars(select(Job))}
    store.close()

    spans = exporter.get_finished_spans()
    assert len(spans) == claims == len(jobs)
    assert {(attribute(s, "job"), attribute(s, "stage"), attribute(s, "fence")) for s in spans} == jobs
    assert {attribute(span, "end") for span in spans} == {"done"}
    for message in ("claimed", "done"):
        lines = [record for record in caplog.records if record.message == message]
        assert {(line.job, line.stage, line.fence) for line in lines} == jobs
        assert {(line.run, line.worker) for line in lines} == {(1, attribute(spans[0], "worker"))}
    assert SECRET not in caplog.text + str([span.to_json() for span in spans])


def test_an_attempt_that_fails_says_why(
    tmp_path: Path, exporter: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    exporter.clear()
    work(tmp_path, journal=str(tmp_path / "nowhere" / "journal")).close()

    failed = [span for span in exporter.get_finished_spans() if attribute(span, "end") == "an attempt failed"]
    assert failed
    assert all(not span.status.is_ok and "cannot be written" in (span.status.description or "") for span in failed)
    assert "an attempt failed" in caplog.text
