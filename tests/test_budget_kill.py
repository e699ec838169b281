"""A budget holds while workers are killed, by the bill of the server that charges for every request."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import budget_kill
from tests.budget_kill import Killing
from tests.chat_server import Server
from tests.postgres import Postgres


@pytest.mark.parametrize("kills", [2])
def test_workers_that_are_killed_never_spend_more_than_the_budget(
    postgres: Postgres, tmp_path: Path, kills: int
) -> None:
    url = postgres.create("budget_kill", template="migrated")
    with Server.running() as server:
        found = Killing(tmp_path, url, server, seed=1).measure(limit=12.0, kills=kills)
    assert (found.state, found.end_state) == ("paused", "done")
    assert found.billed - 1e-9 <= found.spent <= found.limit
    assert found.end_billed <= found.end_spent + 1e-9  # sums of the same dollars in another order
    assert (found.responses, found.duplicates, found.miscounted) == (budget_kill.needed(), 0, 0)
