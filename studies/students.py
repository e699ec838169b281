"""Train a student on chosen responses and ask it, once per dataset."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from persyn.atomic import replaced
from persyn.config import Sampling
from persyn.llm import host
from persyn.llm.protocols import Failed, Generate, Generated, ModelSpec
from persyn.llm.template import Conversation
from persyn.method.intervals import Vector
from persyn.student import train
from persyn.student.train import TrainingSettings
from studies import tasks
from studies.tasks import Task

_SAMPLING = Sampling(temperature=0.0, max_tokens=28, stop=["\n"])


@dataclass(frozen=True, slots=True)
class Students:
    """Students of one model, asked the same tasks. Answers are kept in `home`; weights are not."""

    home: Path
    model: Path
    asked: Sequence[Task]
    #: Rows of the transformers engine's batches.
    batch_size: int = 64

    def right(self, rows: Sequence[Conversation], settings: TrainingSettings) -> Vector:
        """(A,) 1 for each task that a student trained on these rows does right; without rows, the untrained one."""
        known = json.dumps([str(self.model), rows, msgspec.to_builtins(settings), self.asked])
        folder = self.home / hashlib.sha256(known.encode()).hexdigest()[:16]
        if not (folder / "right.json").exists():
            answered = self._ask(self._trained(rows, settings, folder.with_suffix(".training")))
            with replaced(folder) as new:
                (new / "right.json").write_text(json.dumps(answered))
            shutil.rmtree(folder.with_suffix(".training"), ignore_errors=True)
        return np.array(json.loads((folder / "right.json").read_text()), dtype=np.float64)

    def _trained(self, rows: Sequence[Conversation], settings: TrainingSettings, folder: Path) -> Path:
        if not rows:
            return self.model
        spec = ModelSpec("", str(self.model))
        if not (folder / train.MODEL).exists():
            train.prepare(spec, rows, settings, folder)
        train.train(spec, settings, folder, lambda done, total, loss: None)
        return folder / train.MODEL

    def _ask(self, model: Path) -> list[float]:
        spec = ModelSpec("transformers", str(model), options={"batch_size": self.batch_size})
        requests = [
            Generate(place, [{"role": "user", "content": task["prompt"]}], _SAMPLING, seed=0)
            for place, task in enumerate(self.asked)
        ]
        results = host.ask(spec, requests, self.home, load_seconds=600.0, stall_seconds=600.0)
        return [_is_right(task, result) for task, result in zip(self.asked, results, strict=True)]


def _is_right(task: Task, result: object) -> float:
    if isinstance(result, Failed):
        return 0.0
    assert isinstance(result, Generated)
    return tasks.is_right([], result.text, task.get("answer"), task)
