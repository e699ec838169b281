"""A chat-completions server on loopback with scripted replies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from tests.loopback import LoopbackServer


def completion(text: Any, finish_reason: Any = "stop", **more: Any) -> web.Response:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return web.json_response({"id": "x", "choices": [choice], **more})


def error(status: int, message: str, **headers: str) -> web.Response:
    return web.json_response({"error": {"message": message, "code": None}}, status=status, headers=headers)


def token_bucket(
    per_second: float, burst: float, *, seconds: float, **headers: str
) -> Callable[[int], web.Response | Awaitable[web.StreamResponse]]:
    """Replies of a server that answers after `seconds`, and beyond a limit of its rate with HTTP 429.

    burst: number of requests that it saves up while it is idle.
    """
    tokens, filled_at = burst, time.monotonic()

    async def answer() -> web.StreamResponse:
        await asyncio.sleep(seconds)
        return completion("Four.")

    def reply(n: int) -> web.Response | Awaitable[web.StreamResponse]:
        nonlocal tokens, filled_at
        now = time.monotonic()
        tokens, filled_at = min(burst, tokens + (now - filled_at) * per_second), now
        if tokens < 1:
            return error(429, "too many requests", **headers)
        tokens -= 1
        return answer()

    return reply


class Server(LoopbackServer):
    """Answers each request with the test's `reply`, and records bodies and headers."""

    def __init__(self) -> None:
        self.reply: Callable[[int], web.Response | Awaitable[web.StreamResponse]] = lambda n: completion("Four.")
        self.requests: list[web.Request] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at: list[float] = []
        self.in_flight = self.most_in_flight = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        self.headers.append(dict(request.headers))
        self.bodies.append(await request.json())
        self.at.append(time.monotonic())
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            reply = self.reply(len(self.bodies))
            return reply if isinstance(reply, web.Response) else await reply
        finally:
            self.in_flight -= 1

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.handle)
        return app
