"""Counts are computed once for all pages."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from persyn.db.connect import Database
from persyn.web.count_cache import CountCache, Counted


def get(cache: CountCache, name: str, count: Callable[[Session], int]) -> Counted[int] | None:
    return cache.get({name: count})[name]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Count:
    """Counts its calls, and blocks on demand."""

    def __init__(self) -> None:
        self.times = 0
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, session: Session) -> int:
        assert self.go_on.wait(30)
        self.times += 1
        return self.times


def test_many_who_look_at_once_have_it_counted_once(empty: Database) -> None:
    cache, count = CountCache(empty, patience=30, clock=Clock()), Count()
    count.go_on.clear()
    with ThreadPoolExecutor(8) as people:
        asked = [people.submit(get, cache, "rows", count) for _ in range(8)]
        count.go_on.set()
        found = [one.result() for one in asked]
    assert [one.value for one in found if one] == [1] * 8


def test_nobody_waits_longer_than_a_page_may_take(empty: Database) -> None:
    cache, count = CountCache(empty, patience=0.01, clock=Clock()), Count()
    count.go_on.clear()
    assert get(cache, "rows", count) is None
    assert get(cache, "rows", count) is None
    count.go_on.set()
    patient = CountCache(empty, patience=30, clock=Clock())
    assert get(patient, "rows", count) is not None


def test_a_count_is_kept_a_while_and_then_made_anew(empty: Database) -> None:
    clock = Clock()
    cache, count = CountCache(empty, patience=30, clock=clock), Count()
    for at, value, age in ((0, 1, 0), (1, 1, 1), (10, 2, 0), (11, 2, 1)):
        clock.now = at
        found = get(cache, "rows", count)
        assert found is not None
        assert (found.value, found.age) == (value, age)
    other = get(cache, "others", count)
    assert other is not None
    assert other.value == 3


def test_what_was_counted_long_ago_is_shown_until_the_new_count_is_there(empty: Database) -> None:
    clock = Clock()
    cache, count = CountCache(empty, patience=0.05, clock=clock), Count()
    while get(cache, "rows", count) is None:
        pass
    clock.now, _ = 3600, count.go_on.clear()
    found = get(cache, "rows", count)
    count.go_on.set()
    assert found is not None
    assert (found.value, found.age, found.is_old) == (1, 3600, True)


def test_more_counts_than_are_made_at_a_time_are_all_made(empty: Database) -> None:
    """With repeated requests, counts that are due again do not displace ones never computed."""
    clock = Clock()
    cache = CountCache(empty, patience=30, clock=clock)
    counts = {name: Count() for name in "abcdef"}
    assert None not in cache.get(counts).values()
    clock.now = 3600
    assert [found and found.value for found in cache.get(counts).values()] == [2] * 6


def test_an_error_is_told_to_who_asked_and_the_next_tries_again(empty: Database) -> None:
    def fail(session: Session) -> int:
        raise RuntimeError("no")

    cache, count = CountCache(empty, patience=30, clock=Clock()), Count()
    with pytest.raises(RuntimeError):
        get(cache, "rows", fail)
    found = get(cache, "rows", count)
    assert found is not None
    assert found.value == 1


def test_the_end_does_not_wait_for_a_long_count(database: Database) -> None:
    """On either database, an endless query is interrupted."""

    def endless(session: Session) -> int:
        begun.set()
        counting = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
        return session.scalars(text(counting)).one()

    begun, cache = threading.Event(), CountCache(database, patience=0)
    assert get(cache, "rows", endless) is None
    assert begun.wait(30)
    cache.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("count")]
    assert get(cache, "others", Count()) is None
