"""The choice of the queue that a worker takes next."""

from __future__ import annotations

from persyn.jobs.workload import Backlog
from persyn.workers.runner.affinity import Reach, order

CPU = Reach(gpus=())


def waiting(name: str, prompts: int, *, jobs: int = 4, workers: int = 0, gpus: int = 0) -> Backlog:
    return Backlog(name, gpus=gpus, jobs=jobs, prompts=prompts, workers=workers)


def test_a_worker_stays_on_its_model_however_long_the_other_queues_are() -> None:
    assert order([waiting("a", 10), waiting("b", 9000)], "a", CPU) == ["a", "b"]


def test_then_it_takes_the_longest_queue_that_nobody_works() -> None:
    backlogs = [waiting("a", 900, workers=1, jobs=9), waiting("b", 100), waiting("c", 300)]

    assert order(backlogs, None, CPU) == ["c", "b", "a"]


def test_a_queue_is_shared_only_while_it_is_long_for_those_on_it() -> None:
    # Two jobs wait for each worker: they will be started before another worker has loaded the model.
    assert order([waiting("a", 900, jobs=4, workers=2)], None, CPU) == []
    assert order([waiting("a", 900, jobs=5, workers=2)], None, CPU) == ["a"]
    # 900 / 3 prompts per worker are fewer than 800 / 2.
    shared = [waiting("a", 900, jobs=9, workers=2), waiting("b", 800, jobs=9, workers=1)]
    assert order(shared, None, CPU) == ["b", "a"]


def test_a_model_goes_where_its_gpus_are_and_gpus_take_such_models_first() -> None:
    backlogs = [waiting("small", 50, gpus=1), waiting("large", 5, gpus=2), waiting("none", 500)]

    assert order(backlogs, None, CPU) == ["none"]
    assert order(backlogs, None, Reach(gpus=("0",))) == ["small", "none"]
    assert order(backlogs, None, Reach(gpus=("0", "1"))) == ["large", "small", "none"]
    assert order(backlogs, None, Reach()) == ["large", "small", "none"]


def test_a_worker_started_for_some_models_takes_no_others() -> None:
    backlogs = [waiting("vllm.qwen-7b.1", 5), waiting("vllm.llama.2", 50)]

    assert order(backlogs, None, Reach(gpus=(), queues=("qwen",))) == ["vllm.qwen-7b.1"]
