"""View the console in the system's Chromium."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

from persyn.db.connect import Database
from persyn.web import serve
from persyn.web.safety import Access

MISSING = "there is no Chromium: 'make chromium' installs Debian's, or set CHROMIUM to the path of one"
_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def find() -> str | None:
    """The path of Chromium; None if it is not installed."""
    return shutil.which(os.environ.get("CHROMIUM") or "chromium") or shutil.which("chromium-browser")


@contextmanager
def running() -> Iterator[Browser]:
    """A headless browser; while it runs, its thread has an event loop."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find(), args=_ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def console(database: Database, access: Access) -> Iterator[str]:
    """Serve a console in a thread of this process; yields its address."""
    with serve.listen("127.0.0.1", 0) as listener, serve.serving(database, access) as server:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
