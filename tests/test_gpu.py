"""Tests that need a GPU: numerics, running out of memory, releasing memory. Skipped without one."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from sqlalchemy import func, select
from transformers import AutoTokenizer

from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.results import Response
from persyn.db.work import Load
from persyn.errors import EngineError
from persyn.llm import gpus
from persyn.llm.host import Host, HostDied
from persyn.llm.protocols import (
    Engine,
    Fitted,
    Generate,
    Generated,
    Judge,
    Judged,
    Message,
    ModelSpec,
    Request,
    Result,
    Route,
    Routed,
    Sampling,
)
from persyn.llm.scorers import log_likelihood, reward_model
from persyn.llm.teachers import transformers_engine
from persyn.router import fit, route
from persyn.student import train
from persyn.student.train import TrainingSettings
from tests import tiny_models
from tests.router import topics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.model,
    # Warnings of drivers and compilers.
    pytest.mark.filterwarnings("ignore"),
]

QUESTIONS = ["What is 3 plus 4?", "Name a colour.", "Write one sentence about the sea, please.", "Hi!"]
RESPONSES = ["7", "Blue.", "The sea is wide and calm at night, and it is loud and grey in the morning.", "Hello! " * 40]
#: A random or small model tolerates these in a test; the defaults are for real ones.
TUNING: dict[str, dict[str, Any]] = {
    "head": {},
    "lora": {"epochs": 4, "learning_rate": 1e-3},
    "full": {"epochs": 4, "learning_rate": 1e-4},
    "auto": {"epochs": 4, "learning_rate": 1e-4},
}


def rest() -> None:
    """A tick that nobody observes."""


def first() -> str:
    """The GPU that this process uses."""
    return gpus.ids()[0]


def ask(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def work(engine: Engine, requests: Sequence[Request]) -> list[Result]:
    """Results in the order of the requests."""
    engine.submit(requests)
    found: dict[int, Result] = {}
    while engine.pending:
        found |= {result.id: result for result in engine.step()}
    return [found[request.id] for request in requests]


def values(results: Sequence[Result]) -> list[float]:
    assert all(isinstance(result, Judged) for result in results), results
    return [result.value for result in results if isinstance(result, Judged)]


def texts(results: Sequence[Result]) -> list[str]:
    assert all(isinstance(result, Generated) for result in results), results
    return [result.text for result in results if isinstance(result, Generated)]


@pytest.fixture
def little_memory() -> Iterator[Any]:
    """Limit this process to the given MiB of GPU memory."""

    def leave(mib: int) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(mib * 2**20 / torch.cuda.get_device_properties(0).total_memory)

    yield leave
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder as working directory of engines."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def judges() -> list[Judge]:
    return [Judge(i, ask(q), r) for i, (q, r) in enumerate(zip(QUESTIONS, RESPONSES, strict=True))]


def student(folder: Path, n_gpus: int, **options: Any) -> Engine:
    return log_likelihood.load(ModelSpec("log_likelihood", str(folder), gpus=n_gpus, options=options), rest)


def test_learnability_is_what_it_is_on_the_cpu(smollm2: Path) -> None:
    exact = values(work(student(smollm2, 0), judges()))

    assert values(work(student(smollm2, 1, dtype="float32"), judges())) == pytest.approx(exact, rel=1e-3, abs=0.01)
    (stored, *_) = work(student(smollm2, 1), judges())
    assert isinstance(stored, Judged)
    assert stored.detail == {"dtype": "bfloat16", "attention": "sdpa"}
    assert values(work(student(smollm2, 1), judges())) == pytest.approx(exact, rel=0.05, abs=0.5)


def test_a_row_is_judged_alike_in_any_company(smollm2: Path) -> None:
    alone = values(work(student(smollm2, 1, batch_tokens=1), judges()))

    assert values(work(student(smollm2, 1), judges())) == pytest.approx(alone, rel=0.02, abs=0.2)


def test_a_reward_is_what_it_is_on_the_cpu(tmp_path: Path, smollm2: Path) -> None:
    folder = tiny_models.reward_model(tmp_path / "model", AutoTokenizer.from_pretrained(smollm2))

    def judged(n_gpus: int) -> list[float]:
        spec = ModelSpec("reward_model", str(folder), gpus=n_gpus, options={"dtype": "float32"})
        return values(work(reward_model.load(spec, rest), judges()))

    assert judged(1) == pytest.approx(judged(0), rel=1e-3, abs=1e-3)


def test_batches_that_do_not_fit_are_halved_until_they_do(smollm2: Path, little_memory: Any) -> None:
    many = [Judge(i, ask("Tell me of the sea."), "wide and calm " * (50 + i)) for i in range(256)]
    fair = values(work(student(smollm2, 1), many))
    engine = student(smollm2, 1, batch_tokens=10**9)
    # 260 MiB of weights; about 150,000 tokens at once would take thousands.
    little_memory(800)
    before = torch.cuda.memory_stats()["num_ooms"]

    found = values(work(engine, many))

    assert torch.cuda.memory_stats()["num_ooms"] > before
    assert found == pytest.approx(fair, rel=0.02, abs=0.2)


def teacher(folder: Path, n_gpus: int, **options: Any) -> Engine:
    return transformers_engine.load(ModelSpec("transformers", str(folder), gpus=n_gpus, options=options), rest)


def generates(seeds: Sequence[int], **how: Any) -> list[Generate]:
    pairs = enumerate(zip(QUESTIONS, seeds, strict=True))
    return [Generate(i, ask(question), Sampling(max_tokens=16, **how), seed) for i, (question, seed) in pairs]


def test_a_teacher_writes_what_it_writes_on_the_cpu(smollm2: Path) -> None:
    asked = generates([0] * 4, temperature=0.0)

    assert texts(work(teacher(smollm2, 1, dtype="float32"), asked)) == texts(work(teacher(smollm2, 0), asked))


def test_a_sampled_response_follows_from_its_seed(smollm2: Path) -> None:
    asked = generates([11, 12, 13, 14], temperature=1.0, top_p=0.95, top_k=50)
    engine = teacher(smollm2, 1, dtype="float32")

    among = texts(work(engine, asked))

    assert [texts(work(engine, [request]))[0] for request in asked] == among
    assert texts(work(engine, generates([21, 22, 23, 24], temperature=1.0, top_p=0.95, top_k=50))) != among


def test_a_teacher_short_of_memory_answers_in_smaller_batches(smollm2: Path, little_memory: Any) -> None:
    engine = teacher(smollm2, 1, batch_size=512)
    long = "The sea is wide and calm at night. " * 40 + "What is the sea like at night?"
    asked = [Generate(i, ask(f"{i}: {long}"), Sampling(temperature=0.0, max_tokens=4), 0) for i in range(512)]
    little_memory(2000)
    before = torch.cuda.memory_stats()["num_ooms"]

    found = work(engine, asked)

    assert torch.cuda.memory_stats()["num_ooms"] > before
    assert len(texts(found)) == 512


@pytest.mark.parametrize("tune", ["head", "lora", "full", "auto"])
def test_a_router_learns_whom_each_topic_suits(smollm2: Path, tmp_path: Path, tune: str) -> None:
    engine = fit.load(ModelSpec("router_fit", str(smollm2), gpus=1, options=TUNING[tune]), rest)

    (fitted,) = work(engine, [topics.grid(120, holdout=30, tune=tune, folder=tmp_path / "router")])

    assert isinstance(fitted, Fitted)
    assert fitted.metrics["router"]["hit1"] > 0.9
    assert fitted.metrics["static"]["hit1"] < 0.5
    asked = [Route(i, messages) for i, messages in enumerate(topics.conversations(120))]
    for n_gpus in (1, 0):
        engine = route.load(ModelSpec("router", fitted.folder, gpus=n_gpus, options={"sha256": fitted.sha256}), rest)
        routed = [result.scores for result in work(engine, asked) if isinstance(result, Routed)]
        # bfloat16 on the GPU, float32 on the CPU.
        best = [max(range(4), key=row.__getitem__) for row in routed]
        measured = [max(range(4), key=row.__getitem__) for row in fitted.scores]
        assert sum(a != b for a, b in zip(best, measured, strict=True)) <= 3


def test_auto_takes_the_head_where_the_memory_does_not_do_for_more(
    smollm2: Path, tmp_path: Path, little_memory: Any
) -> None:
    engine = fit.load(ModelSpec("router_fit", str(smollm2), gpus=1), rest)
    # The float32 weights take 540 MiB, gradients the same, and the optimizer's state twice that.
    little_memory(900)

    (fitted,) = work(engine, [topics.grid(120, holdout=30, tune="auto", folder=tmp_path / "router")])

    assert isinstance(fitted, Fitted)
    assert fitted.metrics["tune"] == "head"
    assert "does not fit in the GPU's memory (CUDA out of memory" in fitted.metrics["not_full"]


CONVERSATIONS = [(ask(f"What is {n}?"), f"It is number {n}, and after it comes {n + 1}.") for n in range(64)]


def trained(smollm2: Path, folder: Path, settings: TrainingSettings) -> train.Notes:
    spec = ModelSpec("", str(smollm2), gpus=1)
    train.prepare(spec, CONVERSATIONS, settings, folder)
    return train.train(spec, settings, folder, lambda *_: None)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_student_learns_and_can_be_asked(smollm2: Path, tmp_path: Path, tune: Any) -> None:
    rate = {"full": 1e-4, "lora": 2e-3}[tune]
    notes = trained(
        smollm2, tmp_path, TrainingSettings(tune=tune, epochs=6, learning_rate=rate, batch_size=16, micro_batch=8)
    )

    assert notes.losses[-1][1] < notes.losses[0][1] / 4
    asked = [Generate(0, ask("What is 7?"), Sampling(temperature=0.0, max_tokens=24), 0)]
    assert texts(work(teacher(tmp_path / train.MODEL, 1), asked))[0].startswith("It is number 7, and after it comes")


def test_a_training_that_does_not_fit_names_what_to_lower(smollm2: Path, tmp_path: Path, little_memory: Any) -> None:
    little_memory(900)

    with pytest.raises(EngineError, match="64 conversations at a time do not fit in memory; lower micro_batch"):
        trained(smollm2, tmp_path, TrainingSettings(batch_size=64))


ENGINES = {
    "transformers": {"batch_size": 8},
    "vllm": {"max_model_len": 512, "max_num_seqs": 8, "gpu_memory_utilization": 0.4, "enforce_eager": True},
}


#: Minimum GPU memory of an engine: its weights and the overhead of any process on a GPU; for vLLM also its cache.
LOADED_MIB = {"transformers": 450, "vllm": 2_000}


def installed(engine: str) -> None:
    if engine == "vllm":
        pytest.importorskip("vllm")


def last_words(host: Host) -> str:
    """The error of a dead host, after the results that it still returned."""
    while True:
        try:
            host.receive(1.0)
        except HostDied as died:
            return str(died)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_an_engine_that_is_killed_gives_its_memory_back(smollm2: Path, tmp_path: Path, engine: str) -> None:
    installed(engine)
    before = gpus.used_mib([first()])
    assert before is not None
    spec = ModelSpec(engine, str(smollm2), gpus=1, options=ENGINES[engine])
    host = Host(spec, tmp_path, devices=first(), load_seconds=240)
    try:
        story = [Generate(i, ask("Tell me a long story."), Sampling(max_tokens=400), i) for i in range(64)]
        host.submit(story)
        while host.loaded is None:
            host.receive(1.0)
        assert (gpus.used_mib([first()]) or 0) > before + LOADED_MIB[engine]
        os.kill(host.pid, signal.SIGKILL)
        assert "ended by SIGKILL" in last_words(host)
    finally:
        host.close()

    assert (gpus.used_mib([first()]) or 0) <= before + LOADED_MIB[engine] // 2


def vllm(folder: Path, **options: Any) -> ModelSpec:
    return ModelSpec("vllm", str(folder), gpus=1, options={**ENGINES["vllm"], **options})


def hosted(spec: ModelSpec, home: Path, *batches: Sequence[Request]) -> list[list[Result]]:
    """Each batch's results in sequence, from an engine in its own process."""
    host = Host(spec, home, devices=first(), load_seconds=240)
    found: list[list[Result]] = []
    try:
        for batch in batches:
            host.submit(batch)
            results: dict[int, Result] = {}
            while len(results) < len(batch):
                results |= {result.id: result for result in host.receive(1.0)}
            found.append([results[request.id] for request in batch])
    finally:
        host.close()
    return found


def test_vllm_writes_what_transformers_writes(smollm2: Path, tmp_path: Path) -> None:
    installed("vllm")
    asked = generates([0] * 4, temperature=0.0)

    (found,) = hosted(vllm(smollm2, dtype="float32"), tmp_path, asked)

    assert texts(found) == texts(work(teacher(smollm2, 0), asked))


def test_vllm_draws_by_the_seed_of_a_request(smollm2: Path, tmp_path: Path) -> None:
    installed("vllm")
    seeded = generates([11, 12, 13, 14], temperature=1.0, top_p=0.95)
    same = [structs.replace(seeded[2], id=i, seed=11 + i) for i in range(4)]

    once, again, together = hosted(vllm(smollm2, dtype="float32"), tmp_path, seeded, seeded, same)

    assert texts(once) == texts(again)
    assert len(set(texts(together))) == 4
    assert texts(together)[2] == texts(once)[2]


def test_vllm_without_room_says_so(smollm2: Path, tmp_path: Path) -> None:
    installed("vllm")

    with pytest.raises(EngineError, match=r"vLLM cannot load .*memory"):
        hosted(vllm(smollm2, gpu_memory_utilization=0.001), tmp_path, generates([0] * 4))


def test_what_a_gpu_has_is_told() -> None:
    assert str(gpus.names([first()])).startswith(f"{first()} ")
    assert gpus.used_mib([first()]) is not None
    assert gpus.await_free([first()], below_mib=10**9, seconds=0)


RUN = """
[run]
name = "real"
setting = "math"
calibration = 24
holdout = 0.25

[prompts]
file = "prompts.jsonl"

[student]
name = "student"
model = "{model}"
gpus = 1

[quality]
kind = "math"

[router]
backbone = "{model}"
gpus = 1

[[teachers]]
name = "brief"
model = "{model}"
engine = "{engine}"
system = "Answer with a number."
sampling = {{ temperature = 0.0, max_tokens = 8 }}
options = {options}

[[teachers]]
name = "wordy"
model = "{model}"
engine = "{engine}"
system = "Answer in a sentence."
sampling = {{ temperature = 0.7, max_tokens = 32 }}
options = {options}
"""
OPTIONS = {
    "transformers": "{ batch_size = 16 }",
    "vllm": "{ max_model_len = 512, max_num_seqs = 32, gpu_memory_utilization = 0.4 }",
}


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_run_goes_from_prompts_to_a_dataset(smollm2: Path, tmp_path: Path, engine: str) -> None:
    installed(engine)
    rows = [{"id": str(n), "prompt": f"What is {n} plus 2?", "answer": str(n + 2)} for n in range(64)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.toml").write_text(RUN.format(model=smollm2, engine=engine, options=OPTIONS[engine]))
    url = f"sqlite:///{tmp_path / 'persyn.db'}"
    project = str(Path(__file__).parent.parent)
    environment = {
        **os.environ,
        "PERSYN_DATABASE_URL": url,
        "PERSYN_HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join([project, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }

    ran = subprocess.run(
        [sys.executable, "-m", "persyn.cli", "run", "start", "run.toml"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )

    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert len((tmp_path / "home" / "datasets" / "real" / "messages.jsonl").read_text().splitlines()) == 64
    store = Database(url)
    with store.read() as session:
        assert session.scalars(select(Run.state)).one() == RunState.DONE
        assert session.scalars(select(func.count(Response.id)).where(Response.text.is_not(None))).one() == 24 + 64
        on = set(session.scalars(select(Load.gpus).where(Load.gpus.is_not(None))))
    store.close()
    assert on
    assert all(names in str(gpus.names([])) for names in on)


def test_a_model_that_a_gpu_has_no_room_for_is_named(smollm2: Path, little_memory: Any) -> None:
    little_memory(100)

    with pytest.raises(EngineError, match=r"cannot load .*smollm2.*CUDA out of memory"):
        student(smollm2, 1)
