"""Teachers behind an OpenAI-compatible chat completions server: a hosted API, vLLM, llama.cpp, ...

Many requests wait for the server concurrently, in coroutines that take the next request as soon as one is
answered. The API key is read from the environment and only sent in the request's header.

A request without a response is in doubt until the cause is known: the request itself, if the server answers
another one that was sent later; the server, if it no longer answers anything, not even a probe.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import random
import re
import time
import urllib.request
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import aiohttp
import msgspec
from yarl import URL

from persyn.errors import AccountError, HostLacks, OutageError, PermanentError
from persyn.llm import options
from persyn.llm.protocols import Engine, Failed, Generate, ModelSpec, Request, Result, Tick
from persyn.llm.teachers import chat_completions, complaints
from persyn.llm.teachers.complaints import Blame, RefusedError, RetryableError

_MOMENT_SECONDS = 0.2
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.5, 30.0
#: After this many consecutive requests without a response, each after all its retries, probe the server.
_DOUBT_AFTER = 16
#: The probe: a minimal request to see whether the server answers at all.
_GREETING, _GREETING_TOKENS = "Hello!", 16
_KEY = re.compile(r"[\x21-\x7e]+")


def load(spec: ModelSpec, tick: Tick) -> Engine:
    """Prepare to use a server; nothing is sent before the first request.

    A server limits a response by its own context: a prompt that fits, but not together with `max_tokens`, may fail
    as `too_long`. `seconds` includes retries. Options: `options.OpenAIOptions`. The engine raises `OutageError` when
    the server is temporarily unavailable, `AccountError` when a person must act first.
    """
    chosen = options.decode(spec, options.OpenAIOptions)
    if chosen.mode == "batch":
        raise PermanentError('mode = "batch" is for teachers only; remove it')
    url, key = endpoint(chosen.base_url), read_key(chosen)
    return ChatServerEngine(spec.model, chosen, url, key, proxy(url))


def endpoint(base_url: str) -> URL:
    """The chat completions URL, with the base URL's query; `PermanentError` if the base URL is invalid."""
    try:
        url = URL(base_url)
    except ValueError as error:
        raise PermanentError(f"base_url {base_url!r} is not a valid URL: {error}") from error
    if url.scheme not in {"http", "https"} or not url.host:
        raise PermanentError(f"base_url {base_url!r} is not an http(s) URL; give one like http://localhost:8000/v1")
    if re.search(r"\s", base_url) or url.fragment:
        raise PermanentError(f"base_url {base_url!r} contains white space or a #; remove it")
    path = url.raw_path.rstrip("/")
    if path.endswith("/chat/completions"):
        raise PermanentError(f"base_url {base_url!r} must end before /chat/completions, which is added to it")
    return url.with_path(f"{path}/chat/completions", encoded=True).with_query(url.query)


def read_key(chosen: options.OpenAIOptions) -> str | None:
    """The API key from the environment; `HostLacks` if it is missing or invalid."""
    if chosen.api_key_env is None:
        return None
    key = os.environ.get(chosen.api_key_env, "").strip()
    if not key:
        raise HostLacks(
            f"the environment variable {chosen.api_key_env} is not set or is empty; "
            "set it to the API key for the worker"
        )
    if key[0] in "'\"":
        raise HostLacks(f"the environment variable {chosen.api_key_env} contains a key in quotation marks; remove them")
    if not _KEY.fullmatch(key):
        raise HostLacks(
            f"the environment variable {chosen.api_key_env} is not a single API key: it has a line break, a space or "
            "another character that a key cannot have; set it to the key alone"
        )
    return key


def proxy(url: URL) -> URL | None:
    """The proxy for a URL by HTTP_PROXY, HTTPS_PROXY and NO_PROXY; `HostLacks` if it is invalid."""
    # Not aiohttp's `trust_env`, which also reads .netrc and then fails if a key is sent too.
    given = urllib.request.getproxies()
    found = given.get(url.scheme) or given.get("all")
    if not found or _is_direct(url, given.get("no", "")):
        return None
    try:
        place = URL(found if "://" in found else f"http://{found}")
    except ValueError as error:  # the error's message may contain a password
        raise HostLacks(
            f"the environment names a proxy for {url.host} that is not a URL; correct HTTP(S)_PROXY"
        ) from error
    if place.scheme not in {"http", "https"} or not place.host:
        raise HostLacks(
            f"the environment names a {place.scheme} proxy for {url.host}; only http and https proxies can be used. "
            "Set HTTP_PROXY or HTTPS_PROXY to one, or NO_PROXY to that host"
        )
    return place


def _is_direct(url: URL, no_proxy: str) -> bool:
    """Whether NO_PROXY matches a URL: by host, parent domain, optional port, or network."""
    host = url.host or ""
    if urllib.request.proxy_bypass(host) or urllib.request.proxy_bypass(f"{host}:{url.port}"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        domains = [name.strip().lower().removeprefix("*") for name in no_proxy.split(",")]
        return any(name.startswith(".") and host.endswith(name) for name in domains)
    return any(address in network for network in _networks(no_proxy))


def _networks(no_proxy: str) -> Iterator[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    for name in no_proxy.split(","):
        with suppress(ValueError):
            yield ipaddress.ip_network(name.strip(), strict=False)


@dataclass(frozen=True, slots=True)
class _Doubt:
    """A request without a response, and the time at which that became final."""

    request: Generate
    reason: str
    #: None: the server failed.
    blame: Blame | None
    at: float


class ChatServerEngine:
    """A backlog of requests, and up to `concurrency` coroutines that each serve one at a time."""

    def __init__(self, model: str, chosen: options.OpenAIOptions, url: URL, key: str | None, proxy: URL | None) -> None:
        self.version = f"openai-compatible {url.host}"
        self.window = 2 * chosen.concurrency
        self._model = model
        self._options = chosen
        self._url = url
        self._proxy = proxy
        self._loop = asyncio.new_event_loop()
        self._session = self._loop.run_until_complete(_open(chosen, key))
        self._secrets = {secret: mark for secret, mark in ((key, "[key]"), (_password(proxy), "[password]")) if secret}
        self._backlog: deque[Generate] = deque()
        self._workers: set[asyncio.Task[None]] = set()
        self._finished: list[Result] = []
        self._error: BaseException | None = None
        self._is_closing = False
        self._resume_at = 0.0
        self._doubts: list[_Doubt] = []
        #: Ids of requests on their last attempt.
        self._last: set[int] = set()
        self._unanswered = 0
        self._looking = asyncio.Lock()
        self.pending = 0

    def submit(self, requests: Sequence[Request]) -> None:
        """Append requests to the backlog."""
        for request in requests:
            assert isinstance(request, Generate)
            self._backlog.append(request)
        self.pending += len(requests)

    def step(self) -> list[Result]:
        """Serve until something is finished or a moment has passed; return everything finished."""
        for _ in range(min(len(self._backlog), self._options.concurrency - len(self._workers))):
            self._begin()
        if self._doubts and not self._backlog and not self._workers:
            self._begin()
        if self._workers and not self._finished:
            alarm = self._loop.call_later(_MOMENT_SECONDS, self._loop.stop)
            self._loop.run_forever()
            alarm.cancel()
        if self._error is not None and not self._finished:
            raise self._error
        results, self._finished = self._finished, []
        self.pending -= len(results)
        return results

    def close(self) -> None:
        """Cancel requests in flight and close the connections."""
        self._is_closing = True
        self._loop.run_until_complete(self._close())
        self._loop.close()

    async def _close(self) -> None:
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        await self._session.close()

    def _begin(self) -> None:
        worker = self._loop.create_task(self._work())
        self._workers.add(worker)
        worker.add_done_callback(self._end)

    async def _work(self) -> None:
        """Serve the backlog; when it is empty and nothing else is in flight, resolve requests in doubt."""
        while self._backlog and self._error is None:
            # Evaluate `self._finished` after the await: `step` replaces the list it returns.
            if (result := await self._serve(self._backlog.popleft())) is not None:
                self._finished.append(result)
            if self._unanswered > _DOUBT_AFTER:
                await self._look()
            self._wake()
        if self._doubts and len(self._workers) == 1 and self._error is None:
            await self._look()
            self._wake()

    def _wake(self) -> None:
        """Make `step` return, except during `close`, which waits for several workers."""
        if not self._is_closing:
            self._loop.stop()

    def _end(self, worker: asyncio.Task[None]) -> None:
        self._workers.discard(worker)
        if not worker.cancelled() and (error := worker.exception()) is not None:
            self._error = self._error or error
            self._wake()

    async def _serve(self, request: Generate) -> Result | None:
        """The request's result; None while it is in doubt."""
        began = self._loop.time()
        try:
            result = await self._ask_patiently(request)
        except RefusedError as error:
            if error.blame == "account":
                raise AccountError(self._tell(str(error))) from error
            if error.blame != "prompt":
                self._doubt(_Doubt(request, str(error), error.blame, self._loop.time()))
                return None
            result = Failed(request.id, str(error))
        except RetryableError as error:
            if error.is_absent:
                raise OutageError(
                    f"no server at {self._url}: {error}; check that it is running, and base_url"
                ) from error
            self._doubt(_Doubt(request, f"server_error: {error}", None, self._loop.time()))
            return None
        self._settle(began)
        return result

    def _doubt(self, doubt: _Doubt) -> None:
        self._doubts.append(doubt)
        self._unanswered += 1

    def _settle(self, since: float, *, is_greeting: bool = False) -> None:
        """The server answered a request sent at `since`, so it is not the cause of earlier doubts.

        Those requests fail. One that met a failing server gets a last attempt, as the server may have recovered.
        """
        self._unanswered = 0
        known = [doubt for doubt in self._doubts if doubt.at <= since]
        self._doubts = [doubt for doubt in self._doubts if doubt.at > since]
        for doubt in known:
            may_retry = is_greeting or self._options.max_retries
            if doubt.blame is None and may_retry and doubt.request.id not in self._last:
                self._last.add(doubt.request.id)
                self._backlog.append(doubt.request)
            else:
                self._last.discard(doubt.request.id)
                self._finished.append(Failed(doubt.request.id, doubt.reason))

    async def _look(self) -> None:
        """Resolve the doubts by probing the server: if it answers, it is not the cause.

        Raises `OutageError` or `AccountError`, which leaves every request in doubt unanswered.
        """
        async with self._looking:
            if not self._doubts or self._error is not None:
                return  # resolved in the meantime
            is_much = self._unanswered > _DOUBT_AFTER
            if is_much or any(doubt.blame != "request" for doubt in self._doubts):
                await self._greet(is_much=is_much)
            self._settle(self._loop.time(), is_greeting=True)

    async def _greet(self, *, is_much: bool) -> None:
        many = f"{self._unanswered} request{'s' if self._unanswered > 1 else ''} in a row"
        try:
            await self._ask(_greeting(self._doubts[-1]))
        except RetryableError as error:
            raise OutageError(f"{many} were not answered by {self._url}: {error}") from error
        except RefusedError as error:
            is_form = error.blame == "request" and is_much and any(doubt.blame == "request" for doubt in self._doubts)
            if error.blame in ("access", "account") or is_form:
                raise AccountError(self._tell(str(error))) from error

    def _tell(self, reason: str) -> str:
        key = self._options.api_key_env or "api_key_env, which is not set"
        return (
            f"{self._url} answered {reason.removeprefix('refused: ')}; check base_url, the model {self._model!r} and "
            f"{key}, and that the account may use them"
        )

    async def _ask_patiently(self, request: Generate) -> Result:
        began = time.perf_counter()
        for attempt in range(0 if request.id in self._last else self._options.max_retries):
            try:
                return await self._ask(request, began)
            except RetryableError as error:
                # Rate limits are server-wide: pause all requests.
                self._resume_at = max(self._resume_at, self._loop.time() + error.pause_seconds)
                longest = min(_LONGEST_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2**attempt)
                await asyncio.sleep(random.uniform(longest / 2, longest))  # noqa: S311 - spreads load, hides nothing
        return await self._ask(request, began)

    async def _ask(self, request: Generate, began: float | None = None) -> Result:
        """One attempt. Raises `RetryableError` or `RefusedError`."""
        began = time.perf_counter() if began is None else began
        chosen = self._options
        while (pause := self._resume_at - self._loop.time()) > 0:
            await asyncio.sleep(pause)
        body = chat_completions.body(self._model, request, chosen)
        try:
            async with self._session.post(self._url, data=body, allow_redirects=False, proxy=self._proxy) as response:
                content = await response.read()
        except TimeoutError as error:
            raise RetryableError(f"no answer within {chosen.timeout_seconds:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            is_absent = isinstance(error, aiohttp.ClientConnectorError)
            said = self._clean(f"{type(error).__name__}: {error}")
            raise RetryableError(said, is_absent=is_absent) from error
        answer = self._clean(chat_completions.decode(content, response.charset))
        if 200 <= response.status < 300:
            seconds = time.perf_counter() - began
            return chat_completions.read(request.id, answer, response.headers, seconds, chosen.inline_reasoning)
        found = complaints.complaint(chat_completions.parse(answer))
        raise complaints.trouble(response.status, response.headers, found)

    def _clean(self, text: str) -> str:
        """Remove the key from a server's message, in case the server repeats it."""
        for secret, mark in self._secrets.items():
            text = text.replace(secret, mark)
        return text


def key_header(chosen: options.OpenAIOptions, key: str | None) -> dict[str, str]:
    """The header with the key; none without a key."""
    header = chosen.api_key_header
    return {header: f"Bearer {key}" if header.lower() == "authorization" else key} if key else {}


def _greeting(doubt: _Doubt) -> Generate:
    """The probe sent in place of a request in doubt: the same form, but short and harmless.

    It keeps the request's `max_tokens` if the server rejected that number.
    """
    request, sampling = doubt.request, doubt.request.sampling
    if not complaints.MAX_TOKENS.search(doubt.reason):
        sampling = msgspec.structs.replace(sampling, max_tokens=_GREETING_TOKENS)
    return Generate(request.id, [{"role": "user", "content": _GREETING}], sampling, request.seed)


def _password(proxy: URL | None) -> str | None:
    return proxy.raw_password if proxy is not None else None


async def _open(chosen: options.OpenAIOptions, key: str | None) -> aiohttp.ClientSession:
    headers = {"Content-Type": "application/json", **key_header(chosen, key)}
    return aiohttp.ClientSession(
        # The number of workers already limits connections.
        connector=aiohttp.TCPConnector(limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=chosen.timeout_seconds),
    )
