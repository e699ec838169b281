"""The findings of `persyn doctor` about the database, its file and the broker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from persyn.cli import broker, doctor
from persyn.errors import UsageError
from persyn.jobs.workload import Backlog
from persyn.workers.cluster import roll_call
from persyn.workers.runner.affinity import Reach
from tests.cluster import Broker

Doctor: TypeAlias = Callable[..., dict[str, tuple[str, str]]]
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
MOUNTS = """\
overlay / overlay rw 0 0
server:/net /net nfs4 rw 0 0
/dev/sdb /net/disk ext4 rw 0 0
me@host:/ /mnt/with\\040blank fuse.sshfs rw 0 0
/dev/sdc /twice ext4 rw 0 0
//server/share /twice cifs rw 0 0
"""


@pytest.fixture
def server() -> Iterator[Broker]:
    server = Broker()
    server.start()
    yield server
    server.kill()


@pytest.fixture
def examine(tmp_path: Path) -> Doctor:
    """Run the command, check its exit code, and return its findings as {what: (level, found)}."""

    def run(*, code: int = 0, **environment: str) -> dict[str, tuple[str, str]]:
        own = {key: value for key, value in os.environ.items() if not key.startswith("PERSYN_")}
        done = subprocess.run(
            [sys.executable, "-m", "persyn.cli", "doctor", "--json"],
            env={**own, "PERSYN_HOME": str(tmp_path), **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert "secret" not in done.stdout + done.stderr
        found: dict[str, tuple[str, str]] = {}
        for row in json.loads(done.stdout):
            if found.get(row["what"], ("ok",))[0] == "ok":
                found[row["what"]] = row[""], row["found"]
        return found

    return run


def test_database_and_clock_are_found_fit(examine: Doctor, database_url: str) -> None:
    found = examine(PERSYN_DATABASE_URL=database_url)
    kind = "SQLite" if database_url.startswith("sqlite") else "PostgreSQL"
    assert found["database"][1].startswith(f"{kind} ")
    assert found["clock"][0] == found["store"][0] == "ok"
    assert "broker" not in found
    assert found["quality code"][0] == "ok"


def test_a_broker_that_is_fit_beside_a_store_that_one_host_can_use(examine: Doctor, server: Broker) -> None:
    found = examine(PERSYN_BROKER_URL=server.url.replace("//", "//:secret@"))
    assert found["broker"] == ("ok", f"{server.url} answers")
    assert found["broker version"][1].startswith("Valkey ")
    assert found["broker memory"][0] == found["broker persistence"][0] == "ok"
    assert found["store"][0] == "warning"
    assert "one host" in found["store"][1]


def test_a_broker_that_may_throw_messages_away(server: Broker) -> None:
    with server.client() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
    levels = {what: level for level, what, _ in broker.look(server.url)}
    assert levels == {"broker": "ok", "broker version": "ok", "broker memory": "warning", "broker persistence": "ok"}


def test_a_broker_that_refuses_the_password_stops_a_run(examine: Doctor, server: Broker) -> None:
    with server.client() as client:
        client.config_set("requirepass", "another")
    found = examine(PERSYN_BROKER_URL=server.url.replace("//", "//:secret@"), code=1)
    assert found["broker"][0] == "error"
    assert server.url in found["broker"][1]


def test_a_broker_that_does_not_let_its_user_ask(server: Broker) -> None:
    with server.client() as client:
        client.acl_setuser("me", enabled=True, passwords=["+secret"], commands=["+ping"])
    ((level, _, found),) = broker.look(server.url.replace("//", "//me:secret@"))
    assert level == "warning"
    assert "secret" not in found


@pytest.mark.parametrize("host", ["127.0.0.1:1/0", "127.0.0.1:1/0?password=secret", "127.0.0.1:1/0?no=secret"])
def test_a_broker_that_does_not_answer_keeps_its_password_to_itself(host: str) -> None:
    ((level, _, found),) = broker.look(f"redis://me:secret@{host}")
    assert level == "error"
    assert "redis://127.0.0.1:1/0" in found
    assert "secret" not in found


@pytest.mark.parametrize(
    "url", ["amqp://me:secret@host", "redis://:secret/x@host", "redis://secret/x@host", "redis://:secret#x@host", "x"]
)
def test_an_address_that_is_none_is_not_repeated(url: str) -> None:
    with pytest.raises(UsageError) as refused:
        broker.place_of(url)
    assert "secret" not in str(refused.value)
    ((level, _, _),) = broker.look(url)
    assert level == "error"


@pytest.mark.parametrize(
    ("facts", "level"),
    [
        ({"redis_version": "6.2.20"}, "warning"),
        ({"redis_version": "7.0.15"}, "warning"),
        ({"redis_version": "7.2.10"}, "warning"),
        ({"redis_version": "7.2.11"}, "ok"),
        ({"redis_version": "7.4.5"}, "warning"),
        ({"redis_version": "7.4.6"}, "ok"),
        ({"redis_version": "8.0.3"}, "warning"),
        ({"redis_version": "8.2.1"}, "warning"),
        ({"redis_version": "8.2.2"}, "ok"),
        ({"redis_version": "8.4.0"}, "ok"),
        ({"redis_version": "10.0.0"}, "ok"),
        ({}, "warning"),
        ({"redis_version": "7.2.4", "server_name": "valkey", "valkey_version": "8.0.0"}, "ok"),
    ],
)
def test_which_versions_of_a_broker_will_do(facts: dict[str, Any], level: str) -> None:
    levels = {what: level for level, what, _ in broker.judge(facts)}
    assert levels["broker version"] == level


def test_a_clock_that_differs_by_more_than_seconds() -> None:
    assert doctor.clock(NOON, NOON + timedelta(seconds=4))[0] == "ok"
    level, _, found = doctor.clock(NOON, NOON + timedelta(seconds=60))
    assert (level, "60 s ahead" in found) == ("warning", True)
    level, _, found = doctor.clock(NOON, NOON - timedelta(seconds=60))
    assert (level, "60 s behind" in found) == ("warning", True)


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("/var/persyn.db", "overlay"),
        ("/net/persyn.db", "nfs4"),
        ("/net/disk/deep/persyn.db", "ext4"),
        ("/network/persyn.db", "overlay"),
        ("/mnt/with blank/persyn.db", "fuse.sshfs"),
        ("/twice/persyn.db", "cifs"),
    ],
)
def test_a_file_is_on_the_file_system_that_was_mounted_last_and_closest(file: str, kind: str) -> None:
    assert doctor.file_system(Path(file), MOUNTS) == kind


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs", "lustre"])
def test_a_sqlite_file_on_a_network_is_an_error(kind: str) -> None:
    ((level, _, found),) = doctor.judge_file(Path("persyn.db"), kind, has_broker=False)
    assert level == "error"
    assert kind in found


def test_a_sqlite_file_on_a_disk_is_fine() -> None:
    assert list(doctor.judge_file(Path("persyn.db"), "ext4", has_broker=False)) == []


def test_workers_that_do_not_answer_are_missed(examine: Doctor, server: Broker) -> None:
    level, found = examine(PERSYN_BROKER_URL=server.url)["workers"]
    assert (level, found.partition(";")[0]) == ("warning", "no worker answers")


def test_workers_of_another_version_and_queues_that_nobody_takes_are_named() -> None:
    one = roll_call.PresentWorker("one@host", roll_call.version(), Reach(("0",)))
    old = roll_call.PresentWorker("old@host", "0.0.1", Reach((), ("llama",)))
    large, small = Backlog("vllm.qwen", 2, 3, 700, 0), Backlog("vllm.phi", 1, 5, 900, 0)

    found = {what: (level, text) for level, what, text in doctor.judge_workers([one, old], [large, small])}

    assert found["workers"] == ("ok", "one@host, old@host")
    assert found["worker versions"][0] == "warning"
    assert "old@host 0.0.1" in found["worker versions"][1]
    assert found["queue"][0] == "warning"
    assert "3 jobs of vllm.qwen are waiting" in found["queue"][1]
    assert "2 GPUs" in found["queue"][1]
    assert "phi" not in found["queue"][1]


def test_workers_of_this_version_that_take_everything_are_fine() -> None:
    one = roll_call.PresentWorker("one@host", roll_call.version(), Reach(("0",)))
    waiting = [Backlog("vllm.phi", 1, 5, 900, 0)]
    assert list(doctor.judge_workers([one], waiting)) == [("ok", "workers", "one@host")]
