"""Access to the console, and restrictions on what browsers may do with its pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from persyn.db.connect import Database
from tests.postgres import Postgres
from tests.web.conftest import client

TOKEN = "a-token-of-enough-characters"


@pytest.mark.parametrize("path", ["/", "/nope", "/runs/nope", "/static/console.css", "/sql?query=select+1"])
def test_every_answer_says_what_a_browser_may_do_with_it(empty: Database, path: str) -> None:
    headers = client(empty).get(path).headers

    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert (headers["x-frame-options"], headers["x-content-type-options"]) == ("DENY", "nosniff")
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    ("host", "is_known"),
    [
        ("localhost", True),
        ("localhost:8321", True),
        ("127.0.0.1:8321", True),
        ("10.0.0.7", True),
        ("[::1]:8321", True),
        ("gpu-01:8321", True),
        ("GPU-01", True),
        ("gpu-01.evil.example", False),
        ("localhost.evil.example", False),
        ("evil.example", False),
        ("", False),
        ("[::1", False),
        ("localhost/static/", False),
        ("evil.example@localhost", False),
    ],
)
def test_a_name_that_another_site_points_here_is_not_answered(empty: Database, host: str, is_known: bool) -> None:
    """Otherwise a page of another site could read the console through DNS rebinding."""
    answer = client(empty, hosts=frozenset({"gpu-01"})).get("/", headers={"host": host})
    assert answer.status_code == (200 if is_known else 421)


@pytest.mark.parametrize(
    ("site", "mode", "status"),
    [
        ("none", "navigate", 200),
        ("same-origin", "cors", 200),
        ("cross-site", "navigate", 200),
        ("cross-site", "no-cors", 403),
        ("same-site", "cors", 403),
    ],
)
def test_another_site_may_link_here_and_load_nothing(empty: Database, site: str, mode: str, status: int) -> None:
    answer = client(empty).get("/", headers={"sec-fetch-site": site, "sec-fetch-mode": mode})
    assert answer.status_code == status


def test_another_site_may_not_send_a_form(empty: Database) -> None:
    answer = client(empty).post("/runs/x/retry", headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"})
    assert answer.status_code == 403


@pytest.mark.parametrize("path", ["/", "/runs/x", "/runs/x/prompts", "/sql", "/nope"])
@pytest.mark.parametrize(
    "headers", [{}, {"authorization": f"Bearer {TOKEN}x"}, {"authorization": TOKEN}, {"cookie": f"persyn={TOKEN}"}]
)
def test_without_the_token_nothing_is_shown(empty: Database, path: str, headers: dict[str, str]) -> None:
    answer = client(empty, token=TOKEN).get(path, headers=headers)
    assert answer.status_code == 401
    assert "Token required" in answer.text
    assert TOKEN not in answer.text


def test_a_token_in_the_address_becomes_a_cookie_and_leaves_the_address(empty: Database) -> None:
    browser = client(empty, token=TOKEN)
    answer = browser.get(f"/?token={TOKEN}&text=a%26b", follow_redirects=False)

    assert (answer.status_code, answer.headers["location"]) == (303, "/?text=a%26b")
    assert "HttpOnly" in answer.headers["set-cookie"]
    assert browser.get("/").status_code == 200


def test_a_token_never_leads_to_another_site(empty: Database) -> None:
    answer = client(empty, token=TOKEN).get(f"http://localhost//evil.example/?token={TOKEN}", follow_redirects=False)
    assert "location" not in answer.headers


def test_a_token_may_be_typed_in_or_sent_in_a_header(empty: Database) -> None:
    typed = client(empty, token=TOKEN)
    assert typed.post("/enter", data={"token": "wrong"}).status_code == 401
    assert typed.post("/enter", data={"token": TOKEN}).status_code == 200
    assert typed.get("/").status_code == 200
    assert client(empty, token=TOKEN).get("/", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_a_form_is_not_read_without_end(empty: Database) -> None:
    assert client(empty, token=TOKEN).post("/enter", data={"token": "x" * 100_000}).status_code == 413


def test_files_beside_the_static_ones_are_not_served(empty: Database) -> None:
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py"):
        assert client(empty).get(path).status_code == 404


def test_a_fault_of_the_console_is_not_put_down_to_the_database(tmp_path: Path, postgres: Postgres) -> None:
    bare = Database(postgres.create("bare"))
    answer = client(bare).get("/")  # there are no tables
    bare.close()

    assert answer.status_code == 500
    assert "Something went wrong" in answer.text
    assert "Traceback" not in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize("url", ["sqlite:///{}/gone/persyn.db", "postgresql+psycopg://nobody@127.0.0.1:9/x"])
def test_a_database_that_does_not_answer_is_said_on_a_page(tmp_path: Path, url: str) -> None:
    gone = Database(url.format(tmp_path))
    answer = client(gone).get("/")
    gone.close()

    assert answer.status_code == 503
    assert "The database does not answer" in answer.text
    assert answer.headers["retry-after"]
    assert "Traceback" not in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]
