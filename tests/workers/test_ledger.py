"""How the workers of one process share its GPUs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from persyn.workers.runner.ledger import Ledger


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(clock: Clock) -> Ledger:
    return Ledger(("0", "1", "2", "3"), clock=clock)


@pytest.fixture
def enlist(ledger: Ledger) -> Callable[[], str]:
    return lambda: ledger.enlist(lambda: False)


def load(ledger: Ledger, worker: str, queue: str, gpus: int) -> str | None:
    """The devices given to a worker's model, after its previous engine has ended."""
    assert ledger.has_room(worker, queue, gpus)
    ledger.take(worker, queue, gpus)
    return ledger.settle(worker)


def test_each_model_has_gpus_of_its_own(ledger: Ledger, enlist: Callable[[], str]) -> None:
    one, two, three = enlist(), enlist(), enlist()

    assert load(ledger, one, "large", 2) == "0,1"
    assert load(ledger, two, "small", 1) == "2"
    assert not ledger.has_room(three, "large", 2)
    assert load(ledger, three, "small", 1) == "3"
    ledger.give_back(one)
    assert ledger.has_room(two, "large", 3)  # its own and two free ones


def test_a_model_without_gpus_sees_none_and_has_the_cpu_alone(ledger: Ledger, enlist: Callable[[], str]) -> None:
    one, two = enlist(), enlist()

    assert load(ledger, one, "math", 0) == ""
    assert not ledger.has_room(two, "other", 0)
    assert load(ledger, one, "large", 4) == "0,1,2,3"
    assert ledger.has_room(two, "other", 0)


def test_without_ids_a_model_takes_what_the_environment_shows() -> None:
    ledger = Ledger(None)
    worker = ledger.enlist(lambda: False)

    assert load(ledger, worker, "large", 8) is None


def test_an_engine_keeps_its_gpus_until_it_has_ended(ledger: Ledger, enlist: Callable[[], str]) -> None:
    one, two = enlist(), enlist()
    load(ledger, one, "large", 4)
    ledger.take(one, "small", 1)

    assert not ledger.has_room(two, "small", 1)
    assert ledger.settle(one) == "0"
    assert ledger.has_room(two, "medium", 3)


def test_a_worker_that_loads_a_model_of_the_same_size_stays_on_its_gpus(
    ledger: Ledger, enlist: Callable[[], str]
) -> None:
    one, two = enlist(), enlist()
    load(ledger, one, "a", 1)
    load(ledger, two, "b", 1)
    ledger.give_back(one)

    assert load(ledger, two, "c", 1) == "1"


def test_small_models_do_not_take_the_gpus_of_a_large_one_that_has_waited_its_turn(
    ledger: Ledger, clock: Clock, enlist: Callable[[], str]
) -> None:
    workers = [enlist() for _ in range(4)]
    for seconds, worker in enumerate(workers):
        clock.now = 1000.0 + seconds
        load(ledger, worker, "small", 1)
    ledger.note_waiting({"large": 3})

    assert not any(ledger.is_asked(worker) for worker in workers)
    clock.now += 1000
    # Three of four suffice, and those that have held theirs longest are asked first.
    assert [ledger.is_asked(worker) for worker in workers] == [True, True, True, False]
    ledger.give_back(workers[0])
    assert not ledger.has_room(workers[0], "small", 1)
    assert [ledger.is_asked(worker) for worker in workers] == [False, True, True, False]
    ledger.give_back(workers[1])
    assert load(ledger, workers[2], "large", 3) == "0,1,2"
    assert not any(ledger.is_asked(worker) for worker in workers)


def test_a_small_model_does_not_wait_for_ever_behind_a_large_one(
    ledger: Ledger, clock: Clock, enlist: Callable[[], str]
) -> None:
    one, two = enlist(), enlist()
    load(ledger, one, "large", 4)
    ledger.note_waiting({"small": 1})
    clock.now += 1000

    assert ledger.is_asked(one)
    assert not ledger.has_room(one, "large", 4)
    ledger.give_back(one)
    assert load(ledger, two, "small", 1) == "0"
    assert not ledger.has_room(one, "large", 4)


def test_a_turn_is_many_times_what_loading_takes(ledger: Ledger, clock: Clock, enlist: Callable[[], str]) -> None:
    worker = enlist()
    load(ledger, worker, "large", 4)
    ledger.note_load(60)
    ledger.note_waiting({"small": 1})

    clock.now += 1000
    ledger.note_waiting({"small": 1})  # seen again, it has been waiting since the first time
    assert not ledger.is_asked(worker)
    clock.now += 1000
    assert ledger.is_asked(worker)
    ledger.note_waiting({})  # taken by another host
    assert not ledger.is_asked(worker)


def test_an_idle_engine_ends_when_its_gpus_are_needed(ledger: Ledger) -> None:
    dropped: list[str] = []
    names: dict[str, str] = {}

    def dropper(which: str) -> Callable[[], bool]:
        def drop() -> bool:
            dropped.append(which)
            ledger.give_back(names[which])
            return True

        return drop

    for which in ("idle", "looking"):
        names[which] = ledger.enlist(dropper(which))
    load(ledger, names["idle"], "a", 1)
    assert not ledger.make_room(names["looking"], lambda: None)
    assert dropped == []

    ledger.note_waiting({"large": 4})
    assert ledger.make_room(names["looking"], lambda: None)
    assert dropped == ["idle"]
    assert ledger.has_room(names["looking"], "large", 4)


def test_a_queue_whose_model_did_not_load_is_left_to_others_for_a_while(ledger: Ledger, clock: Clock) -> None:
    ledger.avoid("large", 60)

    assert ledger.is_avoided("large")
    clock.now += 61
    assert not ledger.is_avoided("large")


@pytest.mark.parametrize("gpus", [None, (), ("0", "1")])
def test_a_light_model_takes_no_place_and_is_loaded_by_one_worker(gpus: tuple[str, ...] | None) -> None:
    ledger = Ledger(gpus)
    one, two, three = (ledger.enlist(lambda: False) for _ in range(3))
    ledger.take(one, "server", 0, is_light=True)

    assert not ledger.has_room(two, "server", 0, is_light=True)
    assert ledger.has_room(two, "other", 0, is_light=True)
    assert ledger.has_room(two, "student", 0)
    ledger.take(two, "student", 0)
    assert not ledger.has_room(three, "backbone", 0)
    assert not ledger.has_room(two, "server 2", 0, is_light=True)  # the third worker has no engine to end for it
    assert not ledger.has_room(one, "student 2", 1)
    ledger.take(three, "server 2", 0, is_light=True)
    assert ledger.has_room(two, "server 3", 0, is_light=True)
    ledger.take(two, "server 3", 0, is_light=True)  # which frees the CPU
    assert ledger.has_room(three, "backbone", 0)


def test_an_idle_model_on_the_cpu_makes_room_for_another_but_not_for_itself() -> None:
    ledger = Ledger(())
    names: list[str] = []

    def drop() -> bool:
        ledger.give_back(names[0])
        return True

    names += [ledger.enlist(drop), ledger.enlist(lambda: False)]
    load(ledger, names[0], "student", 0)

    ledger.note_waiting({"student": 0, "backbone": 0})
    assert not ledger.make_room(names[1], lambda: None)
    ledger.note_waiting({"backbone": 0})
    assert ledger.make_room(names[1], lambda: None)
    assert ledger.has_room(names[1], "backbone", 0)
