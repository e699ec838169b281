"""Train one small student on some conversations, and ask it: what a student becomes.

Knows no database. Run as `python -m persyn.student.become FOLDER` it does one job in a process of its own, so that all
of its memory is free for the next one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from persyn.atomic import replaced
from persyn.config import fingerprint_of
from persyn.errors import EngineError, PersynError, UsageError
from persyn.llm import engines, lean
from persyn.llm.protocols import Failed, Generate, Generated, Judge, Judged, ModelSpec, Request, Result
from persyn.llm.template import Conversation
from persyn.student.training_settings import Notes, TrainingCallback, TrainingSettings

#: The files of a job and of its result.
_JOB, _BECAME = "job.json", "student.json"
_LOG_LINES = 3


class Job(Struct, frozen=True):
    """A student to train and to ask; all of it determines what the student becomes, except `batch_size`."""

    #: The student before training; of its options only `options.FORM_OPTIONS` are read.
    spec: ModelSpec
    #: The version of its weights.
    revision: str | None
    #: None is trained on nothing.
    settings: TrainingSettings | None
    conversations: list[Conversation]
    #: Prompts to answer, and responses to find likely; ids are their places in these lists.
    asked: list[Generate]
    judged: list[Judge]
    #: Rows of a batch when it is asked.
    batch_size: int = 32

    def key(self) -> str:
        """SHA-256 of all that determines the result."""
        settings = None if self.settings is None else msgspec.structs.replace(self.settings, micro_batch=None)
        parts = self.spec.model, self.spec.options, self.revision, settings, self.conversations
        return fingerprint_of([*parts, self.asked, self.judged])


class Became(Struct, frozen=True):
    """What a student became."""

    #: The key of its job.
    key: str
    #: To each prompt that it was asked; empty for a prompt without an answer, None where the request failed or the
    #: student called a tool.
    responses: list[str | None]
    #: Mean log-likelihood of each answer that it was shown, in nats per token; None where it could not be read.
    log_likelihoods: list[float | None]
    #: Of its training; None without one.
    notes: Notes | None


def find(folder: Path, key: str) -> Became | None:
    """The stored result of a job; raise `UsageError` for one of another job, or an unreadable one."""
    if not folder.exists():
        return None
    try:
        found = msgspec.json.decode((folder / _BECAME).read_bytes(), type=Became)
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(
            f"{folder} is not the result of a trained student: {error}; remove it to train again"
        ) from None
    if found.key != key:
        raise UsageError(f"{folder} is the result of another training; remove it to train again")
    return found


def become(job: Job, folder: Path, progress: TrainingCallback) -> Became:
    """Do a job in this process, and store the result in `folder`; its weights are in `training_folder`."""
    work, model, notes = training_folder(folder), job.spec.model, None
    if job.settings is not None:
        from persyn.student import train

        if not (work / train.MODEL).exists():
            train.prepare(job.spec, job.conversations, job.settings, work)
        notes = train.train(job.spec, job.settings, work, progress)
        model = str(work / train.MODEL)
    spec = msgspec.structs.replace(job.spec, model=model, revision=None if job.settings else job.spec.revision)
    found = Became(job.key(), _asked(spec, job), _judged(spec, job), notes)
    with replaced(folder, only_new=True) as new:
        (new / _BECAME).write_bytes(msgspec.json.encode(found))
    return found


def training_folder(folder: Path) -> Path:
    """Where the weights are while a job is done."""
    return folder.with_name(f"{folder.name}.training")


def in_child(job: Job, folder: Path, progress: TrainingCallback) -> Became:
    """Do a job in a child process, which ends with this one; raise `EngineError` when it fails."""
    work = training_folder(folder)
    work.mkdir(parents=True, exist_ok=True)
    (work / _JOB).write_bytes(msgspec.json.encode(job))
    log = work / "log.txt"
    with _child(folder, log) as child:
        assert child.stdout is not None
        for line in child.stdout:
            said = msgspec.json.decode(line)
            if isinstance(said, str):
                raise EngineError(said)
            progress(*said)
        code = child.wait()
    if code:
        words = log.read_text(errors="replace").strip().splitlines()[-_LOG_LINES:]
        raise EngineError(f"the training of a student ended with {code}; log {log} ends: {' | '.join(words)}")
    found = find(folder, job.key())
    assert found is not None
    return found


@contextmanager
def _child(folder: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    path = os.pathsep.join(os.path.abspath(part) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part)
    with log.open("wb") as errors:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "persyn.student.become", str(folder)],
            stdin=subprocess.PIPE,  # closes when this process ends, however it ends
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", **({"PYTHONPATH": path} if path else {})},
        )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()


def _asked(spec: ModelSpec, job: Job) -> list[str | None]:
    if not job.asked:
        return []
    options = {**spec.options, "batch_size": job.batch_size}
    results = _answers(msgspec.structs.replace(spec, engine="transformers", options=options), job.asked)
    return [_text(result) for result in results]


def _text(result: Result) -> str | None:
    """A response; an answer that is missing is wrong, so it is an empty text. A call of a tool is no text to score."""
    if isinstance(result, Failed):
        return "" if result.reason.startswith(("empty", "unfinished_reasoning")) else None
    assert isinstance(result, Generated)
    return None if result.tool_calls else result.text


def _judged(spec: ModelSpec, job: Job) -> list[float | None]:
    if not job.judged:
        return []
    results = _answers(msgspec.structs.replace(spec, engine="log_likelihood"), job.judged)
    return [_mean(result) for result in results]


def _mean(result: Result) -> float | None:
    """Nats per token of a response with its reasoning."""
    if isinstance(result, Failed):
        return None
    assert isinstance(result, Judged)
    n_tokens = (result.n_tokens or 0) + (result.reasoning_n_tokens or 0)
    return (result.value + (result.reasoning_value or 0.0)) / n_tokens if n_tokens else None


def _answers(spec: ModelSpec, requests: Sequence[Request]) -> list[Result]:
    """The results of requests in their order, from an engine in this process."""
    engine = engines.load(spec, lambda: None)
    found: dict[int, Result] = {}
    left = iter(requests)
    while len(found) < len(requests):
        if more := list(islice(left, engine.window - engine.pending)):
            engine.submit(more)
        found.update((result.id, result) for result in engine.step())
    return [found[request.id] for request in requests]


def _main() -> None:
    lean.import_transformers()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    said = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print goes to the log

    def say(what: Any) -> None:
        said.write(msgspec.json.encode(what) + b"\n")

    folder = Path(sys.argv[1])
    job = msgspec.json.decode((training_folder(folder) / _JOB).read_bytes(), type=Job)
    try:
        become(job, folder, lambda done, total, loss: say((done, total, loss)))
    except PersynError as error:
        say(str(error))


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # not `sys.stdin`: its lock, held here, would abort the process at its exit
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    _main()
