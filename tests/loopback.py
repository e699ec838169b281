"""The base of the tests' servers: an application on loopback, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from aiohttp import web


class LoopbackServer(ABC):
    """Serves what `app` returns; `url` has no path."""

    url = ""

    @abstractmethod
    def app(self) -> web.Application: ...

    @property
    def base_url(self) -> str:
        """What clients of OpenAI's API are given."""
        return f"{self.url}/v1"

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[Self]:
        server, ready, loop = cls(), threading.Event(), asyncio.new_event_loop()
        thread = threading.Thread(target=server._serve, args=(ready, loop), daemon=True)
        thread.start()
        assert ready.wait(30)
        try:
            yield server
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()

    def _serve(self, ready: threading.Event, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        runner = web.AppRunner(self.app(), shutdown_timeout=0.1)
        loop.run_until_complete(runner.setup())
        loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", 0).start())
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()
