"""`persyn web` as a process."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import HTTPCookieProcessor, build_opener, urlopen

import pytest

from tests.cli.conftest import Persyn


@contextlib.contextmanager
def web(home: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The running command and the address it printed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "persyn.cli", "web", "--port", "0", *arguments],
        env={**os.environ, "PERSYN_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found is not None
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()


def test_it_serves_until_ctrl_c(tmp_path: Path) -> None:
    with web(tmp_path) as (process, address):
        assert address.startswith("http://127.0.0.1:")
        with urlopen(address) as answer:
            assert "There are no runs yet" in answer.read().decode()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_who_listens_elsewhere_asks_for_a_token_that_nobody_knows(tmp_path: Path) -> None:
    with web(tmp_path, "--host", "0.0.0.0") as (_, address):
        port, token = re.findall(r":(\d+)/\?token=([\w-]{40,})$", address)[0]
        with pytest.raises(HTTPError, match="401"):
            urlopen(f"http://127.0.0.1:{port}/")
        # Python's HTTP client keeps no cookies, so it is asked for the token again.
        with pytest.raises(HTTPError, match="401"):
            urlopen(f"http://127.0.0.1:{port}/?token={token}")


def test_the_printed_address_opens_the_console_whatever_the_token(tmp_path: Path) -> None:
    browser = build_opener(HTTPCookieProcessor())
    with (
        web(tmp_path, "--token", "ab+cd/ef&gh#ij%41kl==") as (_, address),
        browser.open(address) as answer,
    ):
        assert "There are no runs yet" in answer.read().decode()
        assert "token" not in answer.url


def test_what_cannot_be_is_said_in_a_line(persyn: Persyn) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, said in (
            (["--port", str(port)], f"cannot listen on 127.0.0.1, port {port}"),
            (["--host", "no.such.host.invalid", "--port", "0"], "cannot listen on no.such.host.invalid"),
            (["--token", "short"], "the token has 5 characters"),
            (["--token", "\N{SNOWMAN}" * 16], "characters that are not allowed in a header"),
        ):
            done = persyn("web", *arguments)
            assert done.returncode == 2
            assert said in done.stderr
            assert "Traceback" not in done.stderr
