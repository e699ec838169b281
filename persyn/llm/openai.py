"""Teachers behind any server that speaks OpenAI's chat completions: a hosted API, vLLM, llama.cpp, ...

Many requests wait for the server at a time, in coroutines that take the next request as soon as one is
answered. The API key is read from the environment and goes nowhere but into the request's header.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import deque
from collections.abc import Mapping, Sequence

import aiohttp
from yarl import URL

from persyn.errors import EngineError, HostLacks, PermanentError, shorten
from persyn.llm import chat_completions, options
from persyn.llm.chat_completions import Again, Never
from persyn.llm.protocols import Engine, Failed, Generate, ModelSpec, Request, Result, Tick

_MOMENT_SECONDS = 0.2
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.5, 30.0
#: So many requests in a row without an answer, each after all its retries, and nothing more is tried:
#: an outage must not make a failed row of every prompt.
_GIVE_UP_AFTER = 16


def load(spec: ModelSpec, tick: Tick) -> Engine:
    """Make ready to ask a server; nothing is sent before the first request.

    A server bounds a response by its own context: a prompt that fits, but not with `max_tokens` more, may fail
    as `too_long`. `seconds` includes retries. Options: `options.OpenAI`.
    """
    chosen = options.decode(spec, options.OpenAI)
    return OpenAI(spec.model, chosen, endpoint(chosen.base_url), read_key(chosen))


def endpoint(base_url: str) -> URL:
    """Where chat completions are asked for; `PermanentError` when the base URL is none."""
    try:
        url = URL(base_url)
    except ValueError as error:
        raise PermanentError(f"base_url {base_url!r} is no URL: {error}") from error
    if url.scheme not in {"http", "https"} or not url.host:
        raise PermanentError(f"base_url {base_url!r} is no http(s) URL; give one like http://localhost:8000/v1")
    return url / "chat" / "completions"


def read_key(chosen: options.OpenAI) -> str | None:
    """The API key from the environment; `HostLacks` when it is not there."""
    if chosen.api_key_env is None:
        return None
    key = os.environ.get(chosen.api_key_env, "").strip()
    if not key:
        raise HostLacks(f"the environment variable {chosen.api_key_env} holds no API key; set it for the worker")
    return key


class OpenAI:
    """Requests in a backlog, and up to `concurrency` coroutines that each ask for one at a time."""

    def __init__(self, model: str, chosen: options.OpenAI, url: URL, key: str | None) -> None:
        self.version = f"openai-compatible {url.host}"
        self.window = 2 * chosen.concurrency
        self._model = model
        self._options = chosen
        self._url = url
        self._loop = asyncio.new_event_loop()
        self._session = self._loop.run_until_complete(_open(key, chosen.timeout_seconds))
        self._key = key
        self._backlog: deque[Generate] = deque()
        self._workers: set[asyncio.Task[None]] = set()
        self._finished: list[Result] = []
        self._error: BaseException | None = None
        self._is_closing = False
        self._resume_at = 0.0
        self._unanswered = 0
        #: Failed because the server did not answer: whether it is the requests' fault shows when it answers others.
        self._doubtful: list[Result] = []
        self.pending = 0

    def submit(self, requests: Sequence[Request]) -> None:
        """Put requests into the backlog."""
        for request in requests:
            assert isinstance(request, Generate)
            self._backlog.append(request)
        self.pending += len(requests)

    def step(self) -> list[Result]:
        """Serve until something is finished or a moment has passed, and return all that is."""
        for _ in range(min(len(self._backlog), self._options.concurrency - len(self._workers))):
            worker = self._loop.create_task(self._work())
            self._workers.add(worker)
            worker.add_done_callback(self._end)
        if self._workers and not self._finished:
            alarm = self._loop.call_later(_MOMENT_SECONDS, self._loop.stop)
            self._loop.run_forever()
            alarm.cancel()
        if self._error is not None and not self._finished:
            raise self._error
        if not self._backlog and not self._workers:
            self._settle()
        results, self._finished = self._finished, []
        self.pending -= len(results)
        return results

    def close(self) -> None:
        """Drop what is in flight and close the connections."""
        self._is_closing = True
        self._loop.run_until_complete(self._close())
        self._loop.close()

    async def _close(self) -> None:
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        await self._session.close()

    async def _work(self) -> None:
        while self._backlog and self._error is None:
            result = await self._serve(self._backlog.popleft())
            # Looked up after the wait: `step` puts a new list in place of the one it returns.
            if result is not None:
                self._finished.append(result)
            self._wake()

    def _wake(self) -> None:
        """Have `step` return; who closes waits for more than one worker's end."""
        if not self._is_closing:
            self._loop.stop()

    def _settle(self) -> None:
        self._finished += self._doubtful
        self._doubtful = []

    def _end(self, worker: asyncio.Task[None]) -> None:
        self._workers.discard(worker)
        if not worker.cancelled() and (error := worker.exception()) is not None:
            self._error = self._error or error
            self._wake()

    async def _serve(self, request: Generate) -> Result | None:
        """The request's result; None while it is doubtful."""
        began, chosen = time.perf_counter(), self._options
        try:
            answer = await self._ask_patiently(
                chat_completions.body(self._model, request, chosen.max_tokens_field, chosen.extra, chosen.omit)
            )
            result = chat_completions.read(request.id, answer, time.perf_counter() - began)
        except Never as never:
            result = Failed(request.id, str(never))
        except Again as again:
            self._give_up(request, again)
            return None
        self._unanswered = 0
        self._settle()
        return result

    def _give_up(self, request: Generate, again: Again) -> None:
        if again.is_absent:
            raise EngineError(f"no server at {self._url}: {again}; check that it runs and base_url")
        self._unanswered += 1
        if self._unanswered > _GIVE_UP_AFTER:
            raise EngineError(f"{self._unanswered} requests in a row got no answer from {self._url}: {again}")
        self._doubtful.append(Failed(request.id, f"server_error: {again}"))

    async def _ask_patiently(self, body: bytes) -> bytes:
        for attempt in range(self._options.max_retries):
            try:
                return await self._ask(body)
            except Again as again:
                # A server that is out of breath is so for every request.
                self._resume_at = max(self._resume_at, self._loop.time() + again.pause_seconds)
                longest = min(_LONGEST_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2**attempt)
                await asyncio.sleep(random.uniform(longest / 2, longest))  # noqa: S311 - spreads load, hides nothing
        return await self._ask(body)

    async def _ask(self, body: bytes) -> bytes:
        """One attempt. Raises `Again`, `Never`, or `EngineError` when no request can be served."""
        while (pause := self._resume_at - self._loop.time()) > 0:
            await asyncio.sleep(pause)
        try:
            async with self._session.post(self._url, data=body, allow_redirects=False) as response:
                content = await response.read()
        except TimeoutError as error:
            raise Again(f"no answer within {self._options.timeout_seconds:g} s") from error
        except aiohttp.ClientError as error:
            is_absent = isinstance(error, aiohttp.ClientConnectorError)
            raise Again(self._clean(f"{type(error).__name__}: {error}"), is_absent=is_absent) from error
        if response.status == 200:
            return content
        raise self._trouble(response.status, response.headers, self._clean(chat_completions.complaint(content)))

    def _trouble(self, status: int, headers: Mapping[str, str], said: str) -> Exception:
        if status in {401, 403, 404} or status < 400:
            key = self._options.api_key_env or "api_key_env, which is not set"
            return EngineError(
                f"{self._url} answered HTTP {status}: {said}; check base_url, the model {self._model!r} and {key}"
            )
        return chat_completions.trouble(status, headers, said)

    def _clean(self, text: str) -> str:
        """Another's words, bounded, and without the key should they repeat it."""
        return shorten(text.replace(self._key, "[key]") if self._key else text)


async def _open(key: str | None, timeout_seconds: float) -> aiohttp.ClientSession:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    return aiohttp.ClientSession(
        # How many there are is the workers' matter.
        connector=aiohttp.TCPConnector(limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=timeout_seconds),
    )
